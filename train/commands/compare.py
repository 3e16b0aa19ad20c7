"""Compares a pretrained model with transformers: `python -m train compare FOLDER_OR_FILE --out FILE`.

Both read the same file, each with its own code, and compute in float32. Needs the extra `transformers`.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from pallas_kernels.benchmarks.provenance import provenance
from train.commands.evaluate import held_out_tokens
from train.commands.output import check_output, missing_extra
from train.config import DataConfig
from train.data.corpus import load_corpus
from train.model.transformer import Transformer, decoding_parameters, extend, init_caches, logits
from train.pretrained.read import read
from train.pretrained.run import parameters, tokenizer_of
from train.run_folder import write

PACKAGES = ("torch", "transformers", "gguf", "safetensors")


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Compares logits over some tokens, a greedy continuation and the tokens of a text with those of transformers.

    The text is held-out documents of the standard library's source.
    """

    source: tyro.conf.Positional[Path]  # a Hugging Face folder, or a GGUF file
    tokens: int = 512  # whose logits are compared
    prompt: int = 64  # tokens of the same text that are continued
    continuation: int = 64  # tokens of the greedy continuation
    out: Path | None = None  # JSON file to write


def compare(arguments: Arguments) -> None:
    """Prints how far the logits are apart and whether all else is the same, and writes it where asked.

    Raises:
      ValueError: the model cannot be read, or a setting is impossible.
    """
    for name in ("tokens", "prompt", "continuation"):
        if (value := getattr(arguments, name)) < 1:
            raise ValueError(f"{name} = {value}: expected at least 1")
    if arguments.out is not None:
        check_output("out", arguments.out)
    with missing_extra("pretrained"):
        pretrained = read(arguments.source)
    if pretrained.family is None:
        raise ValueError(f"source = {arguments.source}: expected a model of a family that transformers knows")
    tokenizer = tokenizer_of(pretrained)
    model, params = Transformer(pretrained.config, tokenizer.vocab_size), parameters(pretrained, tokenizer.vocab_size)
    most = max(arguments.tokens, arguments.prompt)
    tokens = held_out_tokens(load_corpus(DataConfig()), tokenizer, most)[None, :most]
    if tokens.shape[1] < most:
        raise ValueError(f"tokens = {most}: expected at most {tokens.shape[1]}, which the text has")
    prompt, text = tokens[:, : arguments.prompt], tokenizer.decode(tokens[0])
    with missing_extra("transformers"):
        theirs, their_continuation = _theirs(arguments, tokens[:, : arguments.tokens], prompt)
        their_tokens = _their_tokens(arguments.source, text)

    def forward(params: Any, tokens: Any) -> Any:
        hidden: Any = model.apply({"params": params}, tokens)
        return logits(params, hidden, model.config)

    ours = np.asarray(jax.jit(forward)(params, tokens[:, : arguments.tokens]))[..., : theirs.shape[-1]]
    continuation = _continued(params, model, prompt, arguments.continuation)
    difference = np.abs(ours - theirs[..., : ours.shape[-1]])
    found = {
        "relative_error": float(difference.max() / np.abs(theirs).max()),  # largest of all, over the largest logit
        "normwise_error": float(np.linalg.norm(difference) / np.linalg.norm(theirs)),
        "same_first_choice": float(np.mean(ours.argmax(axis=-1) == theirs.argmax(axis=-1))),
        "same_continuation": continuation == their_continuation,
        "same_tokens": tokenizer.encode(text).tolist() == their_tokens,
    }
    for name, value in found.items():
        print(f"{name.replace('_', ' ')}: {value}")
    print(tokenizer.decode(prompt[0]) + tokenizer.decode(continuation))
    if arguments.out is not None:
        content = {
            "provenance": provenance(["python", "-m", "train", *sys.argv[1:]]),
            "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
            "model": {
                "source": arguments.source.name,
                "sha256": _digest(arguments.source),
                "family": pretrained.family.name,
            },
            "tokens": arguments.tokens,
            "prompt": arguments.prompt,
            "continuation": tokenizer.decode(continuation),
            **found,
        }
        write(arguments.out, json.dumps(content, indent=1) + "\n")


def _theirs(arguments: Arguments, tokens: np.ndarray, prompt: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """Logits and greedy continuation of transformers, which reads the file by itself."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(**_place(arguments.source), dtype=torch.float32).eval()
    continuation = []
    with torch.no_grad():
        computed = model(torch.from_numpy(tokens.astype(np.int64))).logits.numpy()
        ids, cache = torch.from_numpy(prompt.astype(np.int64)), None
        # Not `generate`, which has its own opinions on ends of texts and penalties.
        for _ in range(arguments.continuation):
            out = model(ids, past_key_values=cache, use_cache=True)
            ids, cache = out.logits[:, -1:].argmax(dim=-1), out.past_key_values
            continuation.append(int(ids))
    return computed, continuation


def _their_tokens(source: Path, text: str) -> list[int]:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(**_place(source))
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _place(source: Path) -> dict[str, str]:
    """How transformers is told where a model is."""
    if source.is_dir():
        return {"pretrained_model_name_or_path": str(source)}
    return {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}


def _continued(params: Any, model: Transformer, prompt: np.ndarray, count: int) -> list[int]:
    """Greedy continuation of a prompt [1, T], through the caches that generation uses."""
    config = model.config

    @jax.jit
    def step(params: Any, tokens: Any, caches: Any) -> Any:
        hidden, caches = extend(params, config, tokens, caches)
        scores = logits(params, hidden[:, -1:], config)[..., : model.vocab_size]
        return jnp.argmax(scores, axis=-1).astype(jnp.int32), caches

    params = decoding_parameters(params, config)
    caches, tokens = init_caches(config, batch_size=1, max_length=prompt.shape[1] + count), jnp.asarray(prompt)
    continuation = []
    for _ in range(count):
        tokens, caches = step(params, tokens, caches)
        continuation.append(int(tokens[0, 0]))
    return continuation


def _digest(source: Path) -> str | dict[str, str]:
    """The SHA-256 of a file, or those of a folder's files by their names."""
    if source.is_dir():
        return {file.name: _sha256(file) for file in sorted(source.iterdir()) if file.is_file()}
    return _sha256(source)


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
