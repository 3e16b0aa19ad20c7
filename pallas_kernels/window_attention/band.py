"""Which keys a tile of adjacent queries reads, for the query-major kernels of window attention."""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.triton.integers import cdiv, div, iota, loop
from pallas_kernels.triton.problem import Problem
from pallas_kernels.triton.rows import Pair, Rows, load_starts, packed_rows


class Band(NamedTuple):
    """The queries of a tile, and the tiles of keys that they read.

    They read `tiles` tiles of keys from position `first` on. Tiles `inner` to `outer` - 1 lie inside every query's
    window and need no mask.
    """

    rows: Rows
    query: Any  # row of q of each packed row
    valid: Any
    position: Any
    lowest: Any  # the lowest position that each row sees
    first: Any
    last: Any  # the last position that a row sees
    tiles: Any
    inner: Any
    outer: Any

    def places(self, key_position: Any, edge: bool) -> Any:
        """Where keys are read: each at its position, but for those after the last that a row sees, that one again.

        An index costs less than a mask. The mask of the scores hides them.
        """
        return jnp.minimum(key_position, self.last) if edge else key_position

    def walk(self, step: Any, carry: Any) -> Any:
        """Runs `step(i, carry, edge)` over the tiles of keys."""
        for begin, end, edge in (
            (0, self.inner, True),
            (self.inner, self.outer, False),
            (self.outer, self.tiles, True),
        ):
            carry = loop(begin, end, functools.partial(step, edge=edge), carry)
        return carry


def band_of(
    pair: Pair,
    q_shape: tuple[int, ...],
    k_shape: tuple[int, ...],
    num_rows: int,
    num_keys: int,
    padded_group: int,
    offset: Any,
    starts_ref: Any,
    problem: Problem,
) -> Band:
    """The band of this program: program id 0 counts tiles of `num_rows` packed rows."""
    (_, Tq, H, _), (_, T, K, _) = q_shape, k_shape
    num_queries = num_rows // padded_group
    first_query = pl.program_id(0) * num_queries
    rows = packed_rows(0, num_rows, padded_group, pair, H, K)
    query = first_query + rows.query
    position = offset + query
    lowest = jnp.maximum(position - problem.window + 1, 0)
    first_position = offset + first_query
    first = jnp.maximum(first_position - problem.window + 1, 0)
    if starts_ref is not None:
        lowest = jnp.maximum(lowest, load_starts(starts_ref, pair.batch, query, query < Tq))
        first = jnp.maximum(first, starts_ref[pair.batch, first_query])
    last_position = first_position + num_queries - 1
    last = jnp.minimum(offset + jnp.minimum(first_query + num_queries, Tq), T) - 1
    tiles = jnp.maximum(cdiv(jnp.minimum(last_position + 1, T) - first, num_keys), 0)
    inner = jnp.clip(cdiv(jnp.maximum(last_position - problem.window + 1 - first, 0), num_keys), 0, tiles)
    outer = jnp.clip(div(jnp.maximum(first_position + 1 - first, 0), num_keys), inner, tiles)
    return Band(rows, query, rows.valid(query < Tq), position, lowest, first, last, tiles, inner, outer)


def visible(band: Band, key_position: Any, edge: bool, segments: bool) -> Any:
    """Mask [rows, keys] of a tile of scores; None where every row sees every key."""
    mask = None
    if edge or segments:
        mask = key_position[None, :] >= band.lowest[:, None]
    if edge:
        mask &= key_position[None, :] <= band.position[:, None]
    return mask


def key_positions(band: Band, i: Any, num_keys: int) -> Any:
    """Positions of the keys of tile i."""
    return band.first + i * num_keys + iota(num_keys)
