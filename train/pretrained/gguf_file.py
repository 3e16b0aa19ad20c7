"""GGUF files, the format of llama.cpp, in whichever quantisation: numbers are dequantised to float32."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from nsa_jax import RopeScaling
from nsa_jax.rope import rope_frequencies
from train.config import ModelConfig
from train.pretrained import gguf_tokenizer
from train.pretrained.chat_template import ChatTemplate
from train.pretrained.families import FAMILIES, GGUF, Family, model_config
from train.pretrained.fields import Fields
from train.pretrained.hugging_face import Pretrained
from train.pretrained.weights import EMBEDDING, FINAL_NORM, LAYER, OUTPUT, Tensor

# Names in the file and in transformers, without ".weight" and ".bias".
OUTER = {"token_embd": EMBEDDING, "output_norm": FINAL_NORM, "output": OUTPUT}
IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k": "self_attn.k_proj",
    "attn_k_norm": "self_attn.k_norm",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_FACTORS = "rope_freqs.weight"  # what divides each frequency, in files of Llama 3.1 and later
# As all of these models have them; the file holds only the factors that follow from them.
BETA_FAST, BETA_SLOW, ORIGINAL_LENGTH = 4.0, 1.0, 8192


def read(file: Path) -> Pretrained:
    """The model in a file.

    Raises:
      ValueError: naming file, field, value and what was expected, where something is missing, unknown or damaged.
    """
    fields, tensors = _open(file)
    architecture = fields.text("general.architecture")
    families = {family.gguf: family for family in reversed(FAMILIES.values())}  # llama and not mistral
    if architecture not in families:
        raise fields.wrong("general.architecture", f"one of {', '.join(sorted(families))}")
    family, prefix = families[architecture], f"{architecture}."
    factors = tensors.pop(ROPE_FACTORS, None)
    config = _config(family, fields, prefix, factors, tie_embeddings="output.weight" not in tensors)
    heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads} if architecture == "llama" else {}
    return Pretrained(
        source=file,
        family=family,
        config=config,
        context_length=fields.integer(f"{prefix}context_length", 2048),
        tensors=dict(_renamed(name, tensor, heads) for name, tensor in tensors.items()),
        tokenizer=gguf_tokenizer.read(fields),
        chat_template=_chat_template(fields),
    )


def _open(file: Path) -> tuple[Fields, dict[str, Tensor]]:
    """Everything that is in a file, checked only as far as it can be read."""
    import gguf

    try:
        reader = gguf.GGUFReader(file)
        values = {name: _plain(field.contents()) for name, field in reader.fields.items()}
    except Exception as error:  # of a damaged file the reader raises whatever it meets
        raise ValueError(f"{file}: expected a GGUF file, but {error}") from error

    def reader_of(tensor: Any) -> Callable[[], np.ndarray]:
        def dequantised() -> np.ndarray:
            try:
                return gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            except NotImplementedError as error:
                raise ValueError(
                    f"{file}: tensor {tensor.name} is {tensor.tensor_type.name}: expected a type that gguf dequantises"
                ) from error

        return dequantised

    tensors = {}
    for tensor in reader.tensors:
        shape = tuple(int(size) for size in reversed(tensor.shape))
        tensors[tensor.name] = Tensor(file, shape, reader_of(tensor))
    fields = Fields(file, values)
    fields.check("split.count", 0, 1, why="; llama-gguf-split --merge makes one file of several")
    return fields, tensors


def _plain(value: Any) -> Any:
    """A value of the reader as Python's own; a float32 becomes the shortest decimal that rounds to it."""
    if isinstance(value, float) and float(np.float32(value)) == value:
        return float(str(np.float32(value)))
    return value


def _config(
    family: Family, fields: Fields, prefix: str, factors: Tensor | None, *, tie_embeddings: bool
) -> ModelConfig:
    fields.check(f"{prefix}expert_count", 0)
    fields.check(f"{prefix}rope.scaling.type", "none", "linear")
    scaling = RopeScaling()
    if fields.values.get(f"{prefix}rope.scaling.type") == "linear":
        scaling = RopeScaling("linear", fields.number(f"{prefix}rope.scaling.factor"))
    theta = fields.number(f"{prefix}rope.freq_base", 10_000.0)
    window_name = f"{prefix}attention.sliding_window"
    if family.gguf != "llama":
        fields.check(window_name, 0)
    config = model_config(
        family,
        fields,
        GGUF,
        prefix=prefix,
        rope_theta=theta,
        rope_scaling=scaling,
        tie_embeddings=tie_embeddings,
        window=fields.integer(window_name) if fields.values.get(window_name) else None,
    )
    for name in ("rope.dimension_count", "attention.value_length"):
        fields.check(f"{prefix}{name}", config.head_dim, why=", the size of the heads")
    if factors is None:
        return config
    return dataclasses.replace(config, rope_scaling=_llama3(factors, config.head_dim, theta))


def _llama3(factors: Tensor, head_dim: int, theta: float) -> RopeScaling:
    """The scaling whose frequencies are the plain ones divided by `factors`."""
    divisors, plain = np.asarray(factors.read(), np.float64), rope_frequencies(head_dim, theta, RopeScaling())
    s, length = float(divisors.max(initial=1)), ORIGINAL_LENGTH
    between = (divisors > 1) & (divisors < s)
    if divisors.shape == plain.shape and between.any():
        # The turns in the original length, from which such a frequency's factor was computed.
        kept = (1 / divisors[between] - 1 / s) / (1 - 1 / s)
        turns = BETA_SLOW + kept * (BETA_FAST - BETA_SLOW)
        length = round(float(np.median(turns * 2 * np.pi / plain[between])))
    scaling = RopeScaling("llama3", s, max(1, length), beta_fast=BETA_FAST, beta_slow=BETA_SLOW)
    expected = plain / rope_frequencies(head_dim, theta, scaling)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-5):
        raise ValueError(
            f"{factors.file}: tensor {ROPE_FACTORS} = {divisors.tolist()}: expected the factors of Llama 3.1 or later, "
            f"{expected.round(4).tolist()}"
        )
    return scaling


def _renamed(name: str, tensor: Tensor, heads: Mapping[str, int]) -> tuple[str, Tensor]:
    """A tensor with the name and the order of rows that it has in transformers; `heads` of those that differ."""
    part, _, kind = name.rpartition(".")
    if part in OUTER and kind == "weight":
        return OUTER[part], tensor
    block, _, rest = part.partition(".")
    layer, _, inner = rest.partition(".")
    if block != "blk" or not layer.isdecimal() or inner not in IN_LAYER or kind not in ("weight", "bias"):
        return name, tensor  # and is refused as unknown
    if inner in heads:
        tensor = tensor._replace(read=_interleaved_back(tensor, heads[inner]))
    return f"{LAYER.format(int(layer))}{IN_LAYER[inner]}.{kind}", tensor


def _interleaved_back(tensor: Tensor, heads: int) -> Callable[[], Float32[np.ndarray, "..."]]:
    """Rows in transformers' order, where the rotary embedding turns row i of a head with row i + D/2.

    In files of the architecture "llama" it turns neighbouring rows.
    """

    def read() -> np.ndarray:
        array = tensor.read()
        return array.reshape(heads, -1, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)

    return read


def _chat_template(fields: Fields) -> ChatTemplate | None:
    template = fields.text("tokenizer.chat_template", "")
    if not template:
        return None
    tokens = fields.values["tokenizer.ggml.tokens"]

    def token(name: str) -> str | None:
        number = fields.values.get(f"tokenizer.ggml.{name}")
        if number is None:
            return None
        if not isinstance(number, int) or not 0 <= number < len(tokens):
            raise fields.wrong(f"tokenizer.ggml.{name}", f"0 to {len(tokens) - 1}, the tokens of the tokenizer")
        return tokens[number]

    return ChatTemplate(template, token("bos_token_id"), token("eos_token_id"))
