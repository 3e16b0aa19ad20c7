"""Sliding window attention on the Pallas Mosaic GPU backend."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.contract import Gradients, Sizes
from pallas_kernels.mosaic import intervals
from pallas_kernels.mosaic.interval_backward import check_heads, gradients
from pallas_kernels.mosaic.interval_forward import attend
from pallas_kernels.mosaic.launch import check_version
from pallas_kernels.mosaic.problem import check_supported


def forward(
    q: Float[Array, "B Tq H Dk"],
    k: Float[Array, "B T K Dk"],
    v: Float[Array, "B T K Dv"],
    segment_starts: Int[Array, "B Tq"] | None,
    query_offset: int | Int[Array, ""],
    *,
    config: Sizes,
    scale: float,
    interpret: bool = False,
) -> tuple[Float[Array, "B Tq H Dv"], Float[Array, "B H Tq"]]:
    """(o, lse); see the contract.

    Raises:
      NotImplementedError: a version of JAX, dtype, head size, group size or scale that the kernels do not support.
    """
    check_version(interpret)
    check_supported(q, k, v, scale=scale)
    (B, Tq, H, _), (_, T, _, Dv) = q.shape, v.shape
    if 0 in (Tq, T):
        return jnp.zeros((B, Tq, H, Dv), q.dtype), jnp.full((B, H, Tq), -jnp.inf, jnp.float32)
    keys, (k, v) = visible(q, k, v, segment_starts, query_offset, config)
    return attend(q, k, v, keys, scale=scale, name="window_attention_forward", interpret=interpret)


def backward(
    q: Float[Array, "B Tq H Dk"],
    k: Float[Array, "B T K Dk"],
    v: Float[Array, "B T K Dv"],
    o: Float[Array, "B Tq H Dv"],
    lse: Float[Array, "B H Tq"],
    do: Float[Array, "B Tq H Dv"],
    segment_starts: Int[Array, "B Tq"] | None,
    query_offset: int | Int[Array, ""],
    *,
    config: Sizes,
    scale: float,
    gate: Float[Array, "B Tq H"] | None = None,
    dq: Float[Array, "B Tq H Dk"] | None = None,
    interpret: bool = False,
) -> Gradients:
    """(dq, dk, dv, delta) of gate * o; see the contract.

    Raises:
      NotImplementedError: a version of JAX, dtype, head size, group size or scale that the kernels do not support.
    """
    check_version(interpret)
    check_supported(q, k, v, scale=scale)
    check_heads(q, v)
    (B, Tq, H, _), T = q.shape, k.shape[1]
    if 0 in (Tq, T):
        delta = jnp.zeros((B, H, Tq), jnp.float32)
        return Gradients(jnp.zeros_like(q) if dq is None else dq, jnp.zeros_like(k), jnp.zeros_like(v), delta)
    keys, (k, v) = visible(q, k, v, segment_starts, query_offset, config)
    options: dict[str, Any] = dict(scale=scale, dlse=None, gate=gate, dq=dq, run=None, interpret=interpret)
    return gradients(q, k, v, o, lse, do, keys, name="window_attention", **options)


def visible(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_starts: jax.Array | None,
    query_offset: int | jax.Array,
    config: Sizes,
) -> tuple[intervals.Intervals, tuple[jax.Array, jax.Array]]:
    """The positions that each query sees; keys and values, with zeros for those that none sees."""
    T = k.shape[1]
    keys = intervals.window_keys(intervals.positions(q.shape, query_offset), segment_starts, T, config)
    if isinstance(query_offset, int) and query_offset == 0 and q.shape[1] >= T:
        return keys, (k, v)
    return keys, (intervals.seen_alone(k, keys), intervals.seen_alone(v, keys))
