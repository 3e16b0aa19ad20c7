"""Folders in the layout of Hugging Face: config.json, safetensors and tokenizer.json."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nsa_jax import RopeScaling
from train.config import ModelConfig, model_from_dict
from train.pretrained.chat_template import ChatTemplate
from train.pretrained.families import FAMILIES, HUGGING_FACE, Family, model_config
from train.pretrained.fields import Fields
from train.pretrained.weights import Tensor

OWN = "nsa-jax"  # model_type of models that transformers does not know, which `export` writes
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = ("F32", "F16", "BF16")


class Pretrained(NamedTuple):
    """A model as it was read, with its tensors still in their file."""

    source: Path
    family: Family | None  # None: a model of this trainer's own
    config: ModelConfig
    context_length: int  # tokens that the model was made for
    tensors: Mapping[str, Tensor]
    tokenizer: str  # a tokenizers JSON file
    chat_template: ChatTemplate | None


def read(folder: Path) -> Pretrained:
    """The model in a folder.

    Raises:
      ValueError: naming file, field, value and what was expected, where something is missing, unknown or damaged.
    """
    file = folder / "config.json"
    fields = Fields(file, read_json(file))
    model_type = fields.text("model_type")
    if model_type != OWN and model_type not in FAMILIES:
        raise fields.wrong("model_type", f"one of {', '.join([*FAMILIES, OWN])}")
    settings = Fields(folder / "tokenizer_config.json", _read_if_there(folder / "tokenizer_config.json"))
    family = FAMILIES.get(model_type)
    return Pretrained(
        source=folder,
        family=family,
        config=_own_config(fields) if family is None else _config(family, fields),
        context_length=fields.integer("max_position_embeddings", 2048),
        tensors=_tensors(folder),
        tokenizer=_text(
            folder / "tokenizer.json", "a tokenizers JSON file, which transformers' save_pretrained writes"
        ),
        chat_template=_chat_template(folder, settings),
    )


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      ValueError: it is not there, or no JSON object.
    """
    text = _text(file, "a JSON object")
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{file}: expected a JSON object, but {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds {type(values).__name__}: expected a JSON object")
    return values


def _own_config(fields: Fields) -> ModelConfig:
    try:
        return model_from_dict(dict(fields.group("model").values))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{fields.file}: model: expected the settings of a model, but {error}") from error


def _config(family: Family, fields: Fields) -> ModelConfig:
    fields.check("hidden_act", "silu")
    fields.check("attention_bias", False)
    fields.check("mlp_bias", False)
    fields.check("partial_rotary_factor", 1)
    if fields.values.get("quantization_config") is not None:
        raise fields.wrong("quantization_config", "weights that are not quantised; GGUF files may be")
    theta, scaling = _rope(fields)
    return model_config(
        family,
        fields,
        HUGGING_FACE,
        rope_theta=theta,
        rope_scaling=scaling,
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        window=_window(family, fields),
    )


def _window(family: Family, fields: Fields) -> int | None:
    """The sliding window, which all layers or none must have."""
    given = fields.values.get("layer_types")
    if not family.window:
        fields.check("use_sliding_window", False)
        if given is not None and set(given) != {"full_attention"}:
            raise fields.wrong("layer_types", "full_attention in every layer")
        return None
    if "sliding_window" not in fields.values:
        return family.sliding_window
    window = None if fields.values["sliding_window"] is None else fields.integer("sliding_window")
    kind = "full_attention" if window is None else "sliding_attention"
    if given is not None and set(given) != {kind}:
        raise fields.wrong("layer_types", f"{kind} in every layer, because sliding_window = {window}")
    return window


def _rope(fields: Fields) -> tuple[float, RopeScaling]:
    """Base and stretching of the rotary embedding, as versions of transformers before and from 5 on write them."""
    name = "rope_scaling" if fields.values.get("rope_parameters") is None else "rope_parameters"
    rope = fields.group(name)
    theta = rope.number("rope_theta", None) if "rope_theta" in rope.values else fields.number("rope_theta", 10_000.0)
    kind = rope.text("rope_type", rope.text("type", "default"))
    if kind == "default":
        return theta, RopeScaling()
    if kind == "linear":
        return theta, RopeScaling("linear", rope.number("factor"))
    if kind == "llama3":
        return theta, RopeScaling(
            "llama3",
            factor=rope.number("factor"),
            original_length=rope.integer("original_max_position_embeddings"),
            beta_fast=rope.number("high_freq_factor"),
            beta_slow=rope.number("low_freq_factor"),
        )
    raise rope.wrong("rope_type" if "rope_type" in rope.values else "type", "default, linear or llama3")


def _tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors in the safetensors files of a folder, by name."""
    if (folder / INDEX).is_file():
        index = Fields(folder / INDEX, read_json(folder / INDEX))
        parts: dict[str, list[str]] = {}
        for name, part in index.group("weight_map").values.items():
            if not isinstance(part, str) or Path(part).name != part or not part.endswith(".safetensors"):
                raise ValueError(f"{index.file}: weight_map.{name} = {part!r}: expected a safetensors file beside it")
            parts.setdefault(part, []).append(name)
        if not parts:
            raise index.wrong("weight_map", "the file of each tensor by its name")
        tensors: dict[str, Tensor] = {}
        for part, names in parts.items():
            found = read_safetensors(folder / part)
            for name in names:
                if name not in found:
                    raise ValueError(f"{folder / part}: tensor {name} is missing: expected it by {index.file}")
                tensors[name] = found[name]
        return tensors
    if not (folder / WHOLE).is_file():
        others = sorted(path.name for path in folder.glob("*") if path.suffix in (".bin", ".pt", ".pth", ".h5"))
        there = f"; {', '.join(others)} cannot be read" if others else ""
        raise ValueError(f"{folder}: expected {WHOLE} or {INDEX}{there}")
    return read_safetensors(folder / WHOLE)


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a file by name.

    Raises:
      ValueError: it cannot be read, or has numbers of a dtype that is none of float32, float16 and bfloat16.
    """
    from safetensors import SafetensorError, safe_open

    try:
        opened = safe_open(file, "np")
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118, it is no mapping
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: expected a safetensors file, but {error}") from error

    def reader(name: str) -> Any:
        return lambda: np.asarray(opened.get_tensor(name))

    tensors = {}
    for name, part in slices.items():
        # Buffers that old versions of transformers saved; the model computes them.
        if name.endswith("rotary_emb.inv_freq"):
            continue
        if part.get_dtype() not in DTYPES:
            raise ValueError(f"{file}: tensor {name} is {part.get_dtype()}: expected one of {', '.join(DTYPES)}")
        tensors[name] = Tensor(file, tuple(part.get_shape()), reader(name))
    return tensors


def _text(file: Path, expected: str) -> str:
    if not file.is_file():
        raise ValueError(f"{file} is missing: expected {expected}")
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: expected {expected}, but {error}") from error


def _read_if_there(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


def _chat_template(folder: Path, settings: Fields) -> ChatTemplate | None:
    """The chat template, which may be a file of its own; of several, the one that is named default."""
    if (file := folder / "chat_template.jinja").is_file():
        value: Any = _text(file, "a template")
    else:
        value = settings.values.get("chat_template")
    if value is None:
        return None
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        value = named.get("default")
    if not isinstance(value, str):
        raise settings.wrong("chat_template", "a template, or a list of them by name")
    return ChatTemplate(value, _token(settings, "bos_token"), _token(settings, "eos_token"))


def _token(settings: Fields, name: str) -> str | None:
    """The text of a special token, which may be described by an object."""
    value = settings.values.get(name)
    if isinstance(value, dict):
        value = value.get("content")
    if not isinstance(value, str | None):
        raise settings.wrong(name, "the text of a token")
    return value
