"""The folder of a run as a folder in the layout of Hugging Face.

A dense model becomes one that transformers loads. Any other, such as one with NSA, gets a config.json of this trainer's
own, with the parameters under the names that they have in checkpoints. `train.pretrained.hugging_face` reads both.
"""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
import tokenizers

from train.checkpoints.saved import SavedModel
from train.config import DataConfig
from train.data import chat
from train.data.bpe import byte_tokenizer
from train.data.tokenizer import HuggingFaceTokenizer, Tokenizer
from train.model.transformer import padded_vocabulary
from train.pretrained.chat_template import ChatTemplate
from train.pretrained.families import family_of, hugging_face_fields
from train.pretrained.hugging_face import OWN, WHOLE
from train.pretrained.weights import own_tensors, to_tensors
from train.run_folder import write

Dtype = Literal["float32", "bfloat16", "float16"]


def export(saved: SavedModel, template: ChatTemplate | None, folder: Path, *, dtype: Dtype = "float32") -> str:
    """Writes a model, its tokenizer and its chat template into an empty folder.

    Args:
      saved: the model.
      template: the chat template that came with it; None: that of the trainer, if it was trained on conversations.
      folder: to write into.
      dtype: of the numbers in the file. With float32, reading the folder gives the same bits.

    Returns:
      What reads the folder, in words.
    """
    from safetensors.numpy import save_file

    config, tokenizer = saved.config.model, saved.tokenizer
    definition = tokenizer.definition if isinstance(tokenizer, HuggingFaceTokenizer) else byte_tokenizer()
    family, reason = family_of(config)
    if family is None:
        fields: dict[str, Any] = {
            "model_type": OWN,
            "architectures": ["Transformer"],
            "model": dataclasses.asdict(config),
        }
        tensors: Iterable[tuple[str, np.ndarray]] = own_tensors(saved.params)
    else:
        fields = hugging_face_fields(family, config)
        tensors = to_tensors(saved.params, config)
    template = template or _own_template(tokenizer, saved.config.data)
    tokens = _special_tokens(definition, tokenizer, template)
    ids = tokenizers.Tokenizer.from_str(definition)
    fields |= {
        "vocab_size": padded_vocabulary(tokenizer.vocab_size),
        "max_position_embeddings": saved.config.data.sequence_length,
        "torch_dtype": dtype,
        **{f"{name}_id": ids.token_to_id(token) for name, token in tokens.items()},
    }
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": saved.config.data.sequence_length,
        "clean_up_tokenization_spaces": False,
        **tokens,
    }
    if template is not None:
        settings["chat_template"] = template.template
    arrays = {name: np.ascontiguousarray(array.astype(jnp.dtype(dtype))) for name, array in tensors}
    save_file(arrays, folder / WHOLE, metadata={"format": "pt"})
    write(folder / "config.json", json.dumps(fields, indent=2) + "\n")
    write(folder / "tokenizer.json", definition)
    write(folder / "tokenizer_config.json", json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    if family is None:
        return f"this trainer's own format, because no family that transformers knows has {reason}"
    return f"transformers' {family.architecture}"


def _own_template(tokenizer: Tokenizer, data: DataConfig) -> ChatTemplate | None:
    """The trainer's template in Jinja, for models that were trained with it."""
    if data.format not in chat.LAYOUTS or len(tokenizer.encode_marker(data.chat_end)) != 1:
        return None
    start, end = json.dumps(data.chat_start), json.dumps(data.chat_end)
    template = (
        "{{ bos_token }}{% for message in messages %}{{ " + start + " + message['role'] + '\\n' + message['content'] + "
        f"{end} + '\\n' "
        "}}{% endfor %}{% if add_generation_prompt %}{{ " + f"{start} + '{chat.LEARNT}\\n' " + "}}{% endif %}"
    )
    return ChatTemplate(template, None, data.chat_end)


def _special_tokens(definition: str, tokenizer: Tokenizer, template: ChatTemplate | None) -> dict[str, str]:
    """The tokens that begin and end a text, by the names of transformers: those of the template, if it says them."""
    names = tokenizers.Tokenizer.from_str(definition)
    tokens = {
        "bos_token": names.id_to_token(tokenizer.bos_id) or "",
        "eos_token": names.id_to_token(tokenizer.eos_id) or "",
    }
    known = {} if template is None else {"bos_token": template.bos_token, "eos_token": template.eos_token}
    return tokens | {name: token for name, token in known.items() if token is not None}
