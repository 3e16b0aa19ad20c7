"""The families of models that can be read and written, as data, and their settings as the model's."""

import dataclasses
from typing import Any, NamedTuple

from nsa_jax import RopeScaling
from nsa_jax.layer import NORM_EPSILON
from train.config import ModelConfig
from train.pretrained.fields import Fields


class Family(NamedTuple):
    """Decoders with RMSNorm, rotary embedding, SwiGLU and grouped queries that differ in what is listed here."""

    name: str  # model_type in config.json
    architecture: str  # class in transformers
    gguf: str  # general.architecture of GGUF files
    qkv_bias: bool = False  # biases of the query, key and value projections
    qk_norm: bool = False  # RMSNorm of every query and key head
    window: bool = False  # layers may have a sliding window
    head_dim: int | None = None  # where config.json has none; None: hidden_size / num_attention_heads
    sliding_window: int | None = None  # where config.json does not have the field; None: no window


# transformers' defaults for what config.json leaves out are the same for all of them, except as listed.
FAMILIES = {
    family.name: family
    for family in (
        Family("llama", "LlamaForCausalLM", "llama"),  # Llama 2 to 3.2, SmolLM2
        Family("mistral", "MistralForCausalLM", "llama", window=True, sliding_window=4096),
        Family("qwen2", "Qwen2ForCausalLM", "qwen2", qkv_bias=True),  # Qwen 2 and 2.5
        Family("qwen3", "Qwen3ForCausalLM", "qwen3", qk_norm=True, head_dim=128),
    )
}

# A setting of the model: its name in config.json, and after the architecture's name in a GGUF file.
SIZES = {
    "num_layers": ("num_hidden_layers", "block_count"),
    "embed_dim": ("hidden_size", "embedding_length"),
    "mlp_dim": ("intermediate_size", "feed_forward_length"),
    "num_heads": ("num_attention_heads", "attention.head_count"),
}
NUM_KV_HEADS = ("num_key_value_heads", "attention.head_count_kv")
HEAD_DIM = ("head_dim", "attention.key_length")
NORM_EPS = ("rms_norm_eps", "attention.layer_norm_rms_epsilon")
HUGGING_FACE, GGUF = 0, 1  # which of the two names


def model_config(
    family: Family,
    fields: Fields,
    source: int,
    *,
    prefix: str = "",
    rope_theta: float,
    rope_scaling: RopeScaling,
    tie_embeddings: bool,
    window: int | None,
) -> ModelConfig:
    """The settings of a model, of which those that both kinds of files have are read here.

    Args:
      family: of the model.
      fields: of config.json or of a GGUF file.
      source: `HUGGING_FACE` or `GGUF`.
      prefix: of names in a GGUF file.
      rope_theta: base of the rotary embedding.
      rope_scaling: its stretching.
      tie_embeddings: whether the output layer is the transposed embedding.
      window: positions that a query sees, its own included; None: all before it.

    Raises:
      ValueError: naming file and field, where one is missing or impossible.
    """
    names = {name: prefix + both[source] for name, both in SIZES.items()}
    kv_heads_name, head_dim_name, norm_name = (prefix + both[source] for both in (NUM_KV_HEADS, HEAD_DIM, NORM_EPS))
    sizes: dict[str, Any] = {name: fields.integer(written) for name, written in names.items()}
    heads, width = sizes["num_heads"], sizes["embed_dim"]
    kv_heads = fields.integer(kv_heads_name, heads)
    if heads % kv_heads:
        raise fields.wrong(kv_heads_name, f"a divisor of {names['num_heads']} = {heads}")
    default = family.head_dim if source == HUGGING_FACE else None
    if default is None and width % heads and fields.values.get(head_dim_name) is None:
        raise fields.wrong(head_dim_name, f"it, because {names['num_heads']} = {heads} does not divide {width}")
    head_dim = fields.integer(head_dim_name, default or width // heads)
    if head_dim % 2:
        raise fields.wrong(head_dim_name, "an even number, for the rotary embedding")
    norm_eps = fields.number(norm_name, 1e-6)
    if family.qk_norm and norm_eps != NORM_EPSILON:
        raise fields.wrong(norm_name, f"{NORM_EPSILON}, which the model's norm of queries and keys has")
    config = ModelConfig(
        **sizes,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        attention="full" if window is None else "window",
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        norm_eps=norm_eps,
        tie_embeddings=tie_embeddings,
    )
    if window is None:
        return config
    return dataclasses.replace(config, nsa=dataclasses.replace(config.nsa, window=window))


def family_of(config: ModelConfig) -> tuple[Family | None, str]:
    """The family that a model belongs to; or None, and what no family has."""
    plain = ModelConfig()
    kinds = set(config.attention_of_layers)
    windowed = kinds == {"window"}
    found = [
        family
        for family in FAMILIES.values()
        if (family.qkv_bias, family.qk_norm, family.window) == (config.qkv_bias, config.qk_norm, windowed)
    ]
    for holds, reason in (
        (kinds in ({"full"}, {"window"}), f"attention = {config.attention_name}"),
        (config.moe == plain.moe, f"model.moe.num_routed = {config.moe.num_routed}"),
        (config.v_head_dim in (None, config.head_dim), f"model.v_head_dim = {config.v_head_dim}"),
        (
            config.rope_scaling.kind in ("none", "linear", "llama3"),
            f"model.rope_scaling.kind = {config.rope_scaling.kind}",
        ),
        (
            not config.qk_norm or config.norm_eps == NORM_EPSILON,
            f"model.qk_norm with model.norm_eps = {config.norm_eps}",
        ),
        (
            bool(found),
            f"model.qkv_bias = {config.qkv_bias} and model.qk_norm = {config.qk_norm} with attention = "
            f"{config.attention_name}",
        ),
    ):
        if not holds:
            return None, reason
    return found[0], ""


def hugging_face_fields(family: Family, config: ModelConfig) -> dict[str, Any]:
    """What config.json says of a model; `hugging_face.read` reads it back."""
    scaling = config.rope_scaling
    rope: dict[str, Any] = {"rope_type": "default"}
    if scaling.kind != "none":
        rope = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        rope |= {
            "low_freq_factor": scaling.beta_slow,
            "high_freq_factor": scaling.beta_fast,
            "original_max_position_embeddings": scaling.original_length,
        }
    fields = {
        "model_type": family.name,
        "architectures": [family.architecture],
        **{name: getattr(config, ours) for ours, (name, _) in SIZES.items()},
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": "silu",
        "rope_theta": config.rope_theta,
        # Older versions of transformers read the two fields above and below, newer ones this group.
        "rope_scaling": None if scaling.kind == "none" else rope,
        "rope_parameters": {**rope, "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_embeddings,
    }
    if family.window:
        fields["sliding_window"] = config.nsa.window
    return fields
