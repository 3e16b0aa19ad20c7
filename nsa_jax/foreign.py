"""Fields that attention layers of other libraries have: what to use instead of them here, or why there is no such."""

from collections.abc import Collection, Mapping
from typing import Any

from nsa_jax.arguments import shown

_DROPOUT = "no such field, for kernels never hold attention weights; drop out the layer's output instead"
_SOFT_CAP = "no such field: scores of NSA are not capped; qk_norm bounds them"
_SINKS = "no such field: no implementation has attention sinks; the first block is always read (NSAConfig.num_init)"
_DECODING = "the methods init_cache, prefill and decode_step"
_WIDTH = "no such field: input and output of a layer have one width, which NNX calls embed_dim"
_FLOAT32 = "no such field: softmax and its sums are in float32 at least"
_RULES = "logical_axes, see nsa_jax.naming"
_WINDOW = "config=NSAConfig(window=...), or window of FullAttention"
_EPSILON = "no such field: that of the norm of queries and keys is fixed, nsa_jax.layer.NORM_EPSILON"

# What the message says after "expected".
INSTEAD: Mapping[str, str] = {
    # Flax
    "in_features": _WIDTH,
    "in_kv_features": _WIDTH,
    "out_features": _WIDTH,
    "qkv_features": "head_dim, which is qkv_features / num_heads",
    "out_kernel_init": "kernel_init, and output_init_scale for the output projection",
    "bias_init": "no such field: biases begin at 0",
    "out_bias_init": "no such field: biases begin at 0",
    "dropout_rate": _DROPOUT,
    "broadcast_dropout": _DROPOUT,
    "deterministic": _DROPOUT,
    "attention_fn": "no such field: nsa_jax.NSAttentionFn is an attention_fn for Flax's own layers",
    "decode": _DECODING,
    "normalize_qk": "qk_norm, which is an RMSNorm",
    "force_fp32_for_softmax": _FLOAT32,
    # MaxText
    "num_query_heads": "num_heads",
    "attention_kernel": "implementation",
    "use_qk_norm": "qk_norm",
    "use_bias_in_projections": "use_bias",
    "query_pre_attn_scalar": "scale: MaxText's number itself, Transformers' to the power of -0.5",
    "weight_dtype": "param_dtype",
    "float32_qk_product": _FLOAT32,
    "float32_logits": _FLOAT32,
    "rope_max_timescale": "rope_theta",
    "rope_min_timescale": "rotate, a rotary embedding of your own, where it is not 1",
    "rope_type": "rope_scaling",
    "max_target_length": "max_length of init_cache",
    "max_prefill_predict_length": "prefill, which takes any number of tokens",
    "sliding_window_size": _WINDOW,
    "window": "config=NSAConfig(window=...)",
    "attn_logits_soft_cap": _SOFT_CAP,
    "logits_soft_cap": _SOFT_CAP,
    "sinks": _SINKS,
    "attention_sinks": _SINKS,
    "use_attention_sinks": _SINKS,
    "quant": "no such field: see the page on integrations for int8 with qwix",
    "mesh": "batch_axes, head_axes and context_axes; the mesh is the one in context",
    "kernel_axes": _RULES,
    "matmul_precision": "precision",
    "normalization_layer_epsilon": _EPSILON,
    # Transformers
    "hidden_size": _WIDTH,
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "attention_bias": "use_bias",
    "attention_dropout": _DROPOUT,
    "rope_parameters": "rope_theta and rope_scaling",
    "partial_rotary_factor": "rotate, a rotary embedding of your own, where it is not 1",
    "max_position_embeddings": "no such field: no position is too large; a cache has max_length of init_cache",
    "sliding_window": _WINDOW,
    "attn_logit_softcapping": _SOFT_CAP,
    "rms_norm_eps": _EPSILON,
}


def refuse_foreign(known: Collection[str], fields: Mapping[str, Any]) -> None:
    """Raises ValueError for a field of another library that is not among the known ones, with what to use instead.

    Example:
      >>> refuse_foreign(["num_heads"], {"num_heads": 8, "normalize_qk": True})
      Traceback (most recent call last):
      ValueError: normalize_qk = True: expected qk_norm, which is an RMSNorm
    """
    for name, value in fields.items():
        if name in INSTEAD and name not in known:
            raise ValueError(f"{name} = {shown(value)}: expected {INSTEAD[name]}")
