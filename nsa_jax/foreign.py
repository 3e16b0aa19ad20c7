"""Fields of other libraries' attention layers, and of ours in a core: what to use instead, or why there is none."""

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
_OWN_ROPE = "rotate, a rotary embedding of your own"
_NO_BIAS_INIT = "no such field: biases begin at 0"
_QUANTISED = "no such field: see the page on integrations for int8 with qwix"
_PRODUCTS = "no such field: qwix replaces products with parameters, see the page on integrations"
_KINDS = "a layer of each kind: NSAttention, or FullAttention with its window"
_TEMPERATURE = "no such field: multiply the queries, which NSACore takes"
_PROJECTED = "no such field: a core takes queries, keys and values that are projected and normed"
_EPSILON = "no such field: that of the norm of queries and keys is fixed, nsa_jax.layer.NORM_EPSILON"

# What the message says after "expected".
INSTEAD: Mapping[str, str] = {
    # Flax
    "in_features": _WIDTH,
    "in_kv_features": _WIDTH,
    "out_features": _WIDTH,
    "qkv_features": "head_dim, which is qkv_features / num_heads",
    "out_kernel_init": "kernel_init, and output_init_scale for the output projection",
    "out_bias": "use_bias, which is for all projections, or qkv_bias, which is for all except the output's",
    "bias_init": _NO_BIAS_INIT,
    "out_bias_init": _NO_BIAS_INIT,
    "dropout_rate": _DROPOUT,
    "broadcast_dropout": _DROPOUT,
    "deterministic": _DROPOUT,
    "attention_fn": "no such field: nsa_jax.NSAttentionFn is an attention_fn for Flax's own layers",
    "decode": _DECODING,
    "normalize_qk": "qk_norm, which is an RMSNorm",
    "qkv_dot_general": _PRODUCTS,
    "out_dot_general": _PRODUCTS,
    "qkv_dot_general_cls": _PRODUCTS,
    "out_dot_general_cls": _PRODUCTS,
    "kernel_metadata": _RULES,
    "out_kernel_metadata": _RULES,
    "force_fp32_for_softmax": _FLOAT32,
    # Keras
    "key_dim": "head_dim",
    "value_dim": "v_head_dim",
    "dropout": _DROPOUT,
    "kernel_initializer": "kernel_init",
    "bias_initializer": _NO_BIAS_INIT,
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
    "rope_min_timescale": f"{_OWN_ROPE}, where it is not 1",
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
    "attention_type": _KINDS,
    "is_nope_layer": "rope_theta=None",
    "use_mrope": _OWN_ROPE,
    "temperature_tuning": _TEMPERATURE,
    "model_mode": _DECODING,
    "quant": _QUANTISED,
    "kv_quant": 'kv_dtype="int8" of init_cache',
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
    "partial_rotary_factor": f"{_OWN_ROPE}, where it is not 1",
    "max_position_embeddings": "no such field: no position is too large; a cache has max_length of init_cache",
    "sliding_window": _WINDOW,
    "use_sliding_window": _WINDOW,
    "layer_types": _KINDS,
    "no_rope_layers": "rope_theta=None in these layers",
    "attn_logit_softcapping": _SOFT_CAP,
    "rms_norm_eps": _EPSILON,
    # Our layers, for cores
    **dict.fromkeys(("qk_norm", "use_bias", "qkv_bias", "kernel_init", "output_init_scale"), _PROJECTED),
    "rope_theta": _OWN_ROPE,
    "rope_scaling": _OWN_ROPE,
}

# Transformers' kinds that are here, too: our fields, and what they are called there. Its yarn is not the paper's.
_ROPE_SCALING: Mapping[str, Mapping[str, str]] = {
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "original_length": "original_max_position_embeddings",
        "beta_fast": "high_freq_factor",
        "beta_slow": "low_freq_factor",
    },
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


def rope_scaling_here(fields: Mapping[str, Any]) -> str:
    """What to use instead of the fields that Transformers has under rope_scaling or rope_parameters.

    Example:
      >>> rope_scaling_here({"rope_type": "linear", "factor": 4.0})
      "nsa_jax.RopeScaling('linear', factor=4.0)"
    """
    kind = fields.get("rope_type", fields.get("type", "default"))
    theta = f", and rope_theta={fields['rope_theta']!r}" if "rope_theta" in fields else ""
    if kind == "default":
        return f"nsa_jax.RopeScaling(), which is the default{theta}"
    if kind not in _ROPE_SCALING:
        return f"{_OWN_ROPE}; of Transformers' kinds, nsa_jax.RopeScaling has linear and llama3"
    given = [f"{ours}={fields.get(theirs, '...')}" for ours, theirs in _ROPE_SCALING[kind].items()]
    return f"nsa_jax.RopeScaling({kind!r}, {', '.join(given)}){theta}"
