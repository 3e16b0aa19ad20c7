"""What stands behind `NSAttentionFn`, an `attention_fn` for the attention layers of Flax, in Linen and in NNX."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from nsa_jax import arguments
from nsa_jax.arguments import describe, shown
from nsa_jax.explicit import on_auto_axes, split_of

# Arguments of an attention_fn that NSA has no counterpart for, with what is said if they are not None.
_REFUSED = {
    "bias": "None: scores of NSA have no bias",
    "module": "None: kernels never hold attention weights, so that none can be sown",
    "qk_attn_weights_einsum": "None: the attention is no einsum",
    "attn_weights_value_einsum": "None: the attention is no einsum",
}


def check_core(core: Any, kind: type, name: str) -> None:
    """Raises ValueError for a core that is none of this flavour's, whose parameters would not be found."""
    if not isinstance(core, kind):
        raise ValueError(f"core = {shown(core)}: expected an {name}")


def attend(
    core: Callable[..., Array],
    query: Float[Array, "B T H Dk"],
    key: Float[Array, "B T K Dk"],
    value: Float[Array, "B T K Dv"],
    *,
    mask: Any,
    dropout_rate: float,
    deterministic: bool,
    dtype: Any,
    others: Mapping[str, Any],
    **options: Any,
) -> Float[Array, "B T H Dv"]:
    """The core's attention, whose gates are made of the queries: an `attention_fn` sees nothing else of its layer.

    Raises:
      ValueError: an argument asks for what NSA does not do, named with what was expected.
    """
    for name, expected in _REFUSED.items():
        if others.get(name) is not None:
            raise ValueError(f"{name} = {shown(others[name])}: expected {expected}")
    if dropout_rate and not deterministic:
        raise ValueError(f"dropout_rate = {dropout_rate}: expected 0, for kernels never hold attention weights")
    query, key, value = (arguments.array(name, x) for name, x in (("query", query), ("key", key), ("value", value)))
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim != 4:
            raise ValueError(f"{name}: {describe(x)}: expected 4 axes (batch, tokens, heads, head size)")
    if mask is not None:
        _check_causal(mask, query.shape[1])
    if dtype is not None:
        query, key, value = (x.astype(dtype) for x in (query, key, value))
    return core(of_all_heads(query), query, key, value, **options)


@on_auto_axes(lambda given: PartitionSpec(*split_of(given["query"], 0), None, None))
def of_all_heads(query: Float[Array, "B T H Dk"]) -> Float[Array, "B T H*Dk"]:
    """The queries of all heads beside one another, of which gates are made."""
    return query.reshape(*query.shape[:2], query.shape[2] * query.shape[3])


def _check_causal(mask: Any, T: int) -> None:
    """Raises ValueError for a mask that is not known to be what NSA does anyway."""
    known = None if isinstance(mask, jax.core.Tracer) else np.asarray(mask)
    if known is None or known.shape[-2:] != (T, T) or (known.astype(bool) != np.tri(T, dtype=bool)).any():
        raise ValueError(
            f"mask: {describe(mask if known is None else known)}: expected None, or a causal mask that is known when "
            "tracing. NSA is causal by itself, segment_ids tell documents apart, and NSACore decodes over a cache"
        )
