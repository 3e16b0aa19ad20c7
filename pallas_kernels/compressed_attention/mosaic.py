"""Compressed attention on the Pallas Mosaic GPU backend."""

from typing import Any

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels.compressed_attention import tiles
from pallas_kernels.contract import Gradients, Sizes, gradients_of_nothing, sees_nothing
from pallas_kernels.mosaic import intervals
from pallas_kernels.mosaic.interval_backward import check_heads, gradients
from pallas_kernels.mosaic.interval_forward import attend
from pallas_kernels.mosaic.launch import check_version
from pallas_kernels.mosaic.problem import check_supported
from pallas_kernels.mosaic.tiles import IntervalTile, PartialTile, RingTile


def forward(
    q: Float[Array, "B Tq H Dk"],
    k: Float[Array, "B Nc K Dk"],
    v: Float[Array, "B Nc K Dv"],
    segment_starts: Int[Array, "B Tq"] | None,
    query_offset: int | Int[Array, ""],
    *,
    config: Sizes,
    scale: float,
    interpret: bool = False,
    tile: IntervalTile | None = None,
) -> tuple[Float[Array, "B Tq H Dv"], Float[Array, "B H Tq"]]:
    """(o, lse); see the contract. `tile` overrides the table, for tests and tuning.

    Raises:
      NotImplementedError: a version of JAX, dtype, head size, group size or scale that the kernels do not support.
      ValueError: a `tile` that the kernel does not take.
    """
    check_version(interpret)
    check_supported(q, k, v, scale=scale)
    if 0 in (q.shape[1], k.shape[1]):
        return sees_nothing(q, v)
    keys, (k, v) = visible(q, k, v, segment_starts, query_offset, config)
    options: dict[str, Any] = dict(tile=tile, table=tiles.MOSAIC_FORWARD, scale=scale, interpret=interpret)
    return attend(q, k, v, keys, name="compressed_attention_forward", **options)


def backward(
    q: Float[Array, "B Tq H Dk"],
    k: Float[Array, "B Nc K Dk"],
    v: Float[Array, "B Nc K Dv"],
    o: Float[Array, "B Tq H Dv"],
    lse: Float[Array, "B H Tq"],
    do: Float[Array, "B Tq H Dv"],
    segment_starts: Int[Array, "B Tq"] | None,
    query_offset: int | Int[Array, ""],
    *,
    config: Sizes,
    scale: float,
    dlse: Float[Array, "B H Tq"] | None = None,
    gate: Float[Array, "B Tq H"] | None = None,
    dq: Float[Array, "B Tq H Dk"] | None = None,
    interpret: bool = False,
    query_tile: RingTile | None = None,
    key_tile: PartialTile | None = None,
) -> Gradients:
    """(dq, dk, dv, delta) of gate * o and of lse; see the contract. Tiles override the tables.

    Raises:
      NotImplementedError: a version of JAX, dtype, head size, group size or scale that the kernels do not support.
      ValueError: a tile that the kernel does not take.
    """
    check_version(interpret)
    check_supported(q, k, v, scale=scale)
    check_heads(q, v)
    if 0 in (q.shape[1], k.shape[1]):
        return gradients_of_nothing(q, k, v, dq)
    keys, (k, v) = visible(q, k, v, segment_starts, query_offset, config)
    options: dict[str, Any] = dict(scale=scale, dlse=dlse, gate=gate, dq=dq, interpret=interpret)
    options.update(query_tile=query_tile, key_tile=key_tile)
    options.update(tables=(tiles.MOSAIC_QUERY_GRADIENT, tiles.MOSAIC_KEY_GRADIENT))
    return gradients(q, k, v, o, lse, do, keys, name="compressed_attention", **options)


def visible(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_starts: jax.Array | None,
    query_offset: int | jax.Array,
    config: Sizes,
) -> tuple[intervals.Intervals, tuple[jax.Array, jax.Array]]:
    """The compressed tokens that each query sees; keys and values, with zeros for those that none sees."""
    Nc, Tq = k.shape[1], q.shape[1]
    keys = intervals.compressed_keys(intervals.positions(q.shape, query_offset), segment_starts, Nc, config)
    last_end = (Tq - 1) + config.compress_stride + 1 - config.compress_block  # of the last query, times d
    to_the_end = segment_starts is None and last_end // config.compress_stride >= Nc
    return keys, intervals.seen_alone(k, v, keys, query_offset, to_the_end)
