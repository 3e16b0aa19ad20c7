"""Attention in which each query sees an interval of the keys: what compressed and window attention have in common.

The query of row r sees keys begin[r] .. end[r] - 1, and neither bound ever decreases from one query to the next. A tile
of adjacent queries therefore sees one interval, within which lies one that all of its queries see. The same holds of
keys: who sees key j is an interval of the queries.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.contract import Sizes
from pallas_kernels.mosaic.packing import ALIGNMENT, Packing


class Intervals(NamedTuple):
    """The keys of each query, int32 [B, Tq] each."""

    begin: jax.Array
    end: jax.Array


def positions(shape: tuple[int, ...], query_offset: int | jax.Array) -> jax.Array:
    """Positions of the queries, int32 [B, Tq], for q's shape."""
    row = jnp.arange(shape[1], dtype=jnp.int32)
    return jnp.broadcast_to(row + jnp.asarray(query_offset, jnp.int32), shape[:2])


def compressed_keys(position: jax.Array, segment_starts: jax.Array | None, num_keys: int, config: Sizes) -> Intervals:
    """Compressed tokens i with i d >= segment start and i d + l - 1 <= position."""
    d, ahead = config.compress_stride, config.compress_stride + 1 - config.compress_block
    end = jnp.minimum(jnp.maximum(position + ahead, 0) // d, num_keys)
    begin = jnp.zeros_like(end) if segment_starts is None else -(-segment_starts // d)
    return Intervals(jnp.minimum(begin, end), end)


def window_keys(position: jax.Array, segment_starts: jax.Array | None, num_keys: int, config: Sizes) -> Intervals:
    """Positions above position - w, from the segment's start on."""
    end = jnp.minimum(position + 1, num_keys)
    begin = jnp.maximum(position + 1 - config.window, 0)
    if segment_starts is not None:
        begin = jnp.maximum(begin, segment_starts)
    return Intervals(jnp.minimum(begin, end), end)


def queries_of_keys(keys: Intervals, num_keys: int) -> Intervals:
    """The reverse: the queries of each key, int32 [B, N] each, as bounds that never decrease."""
    key = jnp.arange(num_keys, dtype=jnp.int32)

    def count(bound: jax.Array) -> jax.Array:  # of the bounds that are at most the key
        return jax.vmap(lambda x: jnp.searchsorted(x, key, side="right"))(bound).astype(jnp.int32)

    begin = count(keys.end)
    return Intervals(begin, jnp.maximum(count(keys.begin), begin))


def steps(seen: Intervals, tile: int, step: int, alignment: int = ALIGNMENT) -> jax.Array:
    """How a tile of `tile` adjacent rows walks along what they see, `step` at a time: int32 [B, tiles, 4].

    (first, n, inner, outer): n steps from `alignment` x first on. Every row sees steps inner .. outer - 1 whole.
    """
    pad = -seen.begin.shape[1] % tile
    begin, end = (
        jnp.pad(x, ((0, 0), (0, pad)), mode="edge").reshape(x.shape[0], -1, tile) for x in (seen.begin, seen.end)
    )
    first = begin[:, :, 0] // alignment * alignment
    n = jnp.maximum(-(-(end[:, :, -1] - first) // step), 0)
    n = jnp.where(end[:, :, -1] > begin[:, :, 0], n, 0)
    inner = jnp.clip(-(-(begin[:, :, -1] - first) // step), 0, n)
    outer = jnp.clip((end[:, :, 0] - first) // step, inner, n)
    return jnp.stack([first // alignment, n, inner, outer], axis=-1).astype(jnp.int32)


def cut_into_runs(walk: jax.Array, step: int, run: int, runs: int) -> jax.Array:
    """`steps` aligned to whole steps, cut where the rows are cut into runs of `run`: int32 [B, tiles, runs, 4]."""
    first, n, inner, outer = (walk[:, :, None, j] for j in range(4))
    cuts = jnp.arange(runs + 1, dtype=jnp.int32) * (run // step)
    low, high = (jnp.clip(cut[None, None] - first, 0, n) for cut in (cuts[:-1], cuts[1:].at[-1].set(2**30)))
    inner, outer = (jnp.clip(x - low, 0, high - low) for x in (inner, outer))
    return jnp.stack([first + low, high - low, inner, outer], axis=-1).astype(jnp.int32)


def by_length(walk: jax.Array) -> jax.Array:
    """The cuts of `cut_into_runs` by their steps, the shortest first: int32 [B runs tiles].

    Number (b runs + run) tiles + tile is a cut. Of equally long ones, neighbours read the same queries.
    """
    return jnp.argsort(walk[..., 1].swapaxes(1, 2).reshape(-1), stable=True).astype(jnp.int32)


def row_bounds(seen: Intervals, padded: int, packing: Packing | None) -> jax.Array:
    """The bounds of each row of a matrix of scores, int32 [B, 2, rows], padded to so many queries or keys."""
    both = jnp.stack(seen, axis=1)
    both = jnp.pad(both, ((0, 0), (0, 0), (0, padded - both.shape[-1])), mode="edge")
    return both if packing is None else packing.rows_of_queries(both)


def seen_alone(
    k: jax.Array, v: jax.Array, keys: Intervals, query_offset: int | jax.Array, to_the_end: bool
) -> tuple[jax.Array, jax.Array]:
    """Keys and values [B, N, K, D] with zeros in place of those before and after all that the call's queries see.

    Those may hold anything, and a product with a weight of zero would keep a NaN. There are none if the queries begin
    at position 0 and see the keys `to_the_end`.
    """
    if isinstance(query_offset, int) and query_offset == 0 and to_the_end:
        return k, v
    key = jnp.arange(k.shape[1], dtype=jnp.int32)[None, :]
    inside = ((key >= keys.begin[:, :1]) & (key < keys.end[:, -1:]))[:, :, None, None]
    k, v = (jnp.where(inside, x, jnp.zeros((), x.dtype)) for x in (k, v))
    return k, v
