"""Which blocks a tile of adjacent queries reads: the union of their selections, and its members per block."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Int

from pallas_kernels.triton.integers import count, div, iota, loop, next_power_of_two, rem
from pallas_kernels.triton.launch import launch
from pallas_kernels.triton.problem import Problem
from pallas_kernels.triton.rows import Pair, Rows, load_starts, packed_rows
from pallas_kernels.triton.tiles import QueryTile

_PAST_EVERY_BLOCK = 2**30
# Below this many queries the choice between two tiles is not worth its own cost, and the first is taken.
_ADAPTIVE_FROM = 4096
_MOST_ENTRIES = 1 << 20  # of a list: no array that Triton holds is larger


def _block_union_kernel(indices_ref: Any, union_ref: Any, *, num_queries: int, num_selected: int) -> None:
    tile, pair = pl.program_id(0), pl.program_id(1)
    size = union_ref.shape[-1]
    slot = iota(size)
    query, choice = rem(slot, num_queries), div(slot, num_queries)
    t = tile * num_queries + query
    valid = (t < indices_ref.shape[1]) & (choice < num_selected)
    blocks = plgpu.load(indices_ref.at[pair, t, choice], mask=valid, other=-1)
    blocks = jnp.where(blocks < 0, _PAST_EVERY_BLOCK, blocks)
    bit = lax.shift_left(jnp.ones_like(query), query)

    def merge(carry: Any) -> Any:
        i, block, union = carry
        members = jnp.sum(jnp.where(blocks == block, bit, 0), dtype=jnp.int32)
        union = jnp.where(slot == i, block * (1 << num_queries) + members, union)
        return i + 1, jnp.min(jnp.where(blocks > block, blocks, _PAST_EVERY_BLOCK)), union

    start = (jnp.int32(0), jnp.min(blocks), jnp.full((size,), -1, jnp.int32))
    _, _, union = lax.while_loop(lambda carry: carry[1] < _PAST_EVERY_BLOCK, merge, start)
    plgpu.store(union_ref.at[pair, tile, slot], union)


def block_union(
    block_indices: Int[Array, "BK Tq n"], num_queries: int, *, interpret: bool
) -> Int[Array, "BK tiles size"]:
    """Ascending union of the blocks that each run of `num_queries` queries selected.

    An entry is block << num_queries | members, where bit i of members says that query i of the run selected the
    block. Unused entries are -1. With one query per tile, the union is that query's blocks, and an entry is a block.
    """
    pairs, Tq, n = block_indices.shape
    if num_queries * n > _MOST_ENTRIES:
        raise NotImplementedError(f"block_indices.shape[3] = {n}: expected at most {_MOST_ENTRIES // num_queries}")
    if num_queries == 1:
        return block_indices
    size = next_power_of_two(num_queries * n)
    tiles = pl.cdiv(Tq, num_queries)
    return launch(
        functools.partial(_block_union_kernel, num_queries=num_queries, num_selected=n),
        name="block_union",
        grid=(tiles, pairs),
        out_shape=jax.ShapeDtypeStruct((pairs, tiles, size), jnp.int32),
        num_warps=1,
        num_stages=1,
        interpret=interpret,
    )(block_indices)


def tile_queries(tile: QueryTile, group: int) -> int:
    """Queries of a tile."""
    return max(1, tile.rows // next_power_of_two(group))


def by_overlap(
    block_indices: Int[Array, "B K Tq n"],
    group: int,
    tile: QueryTile,
    attend: Callable[[Int[Array, "BK tiles size"], QueryTile], Any],
    *,
    interpret: bool,
) -> Any:
    """`attend(union, tile)`, with `tile.shared` where neighbours' selections overlap.

    A tile of four queries does four times the arithmetic of one query for each block in its union, and reads the block
    once instead of up to four times. It wins while the union stays below about twice one query's blocks, which is
    measured here on the whole selection. Both tiles give the same result up to rounding.
    """
    B, K, Tq, n = block_indices.shape
    rows = block_indices.reshape(B * K, Tq, n)

    def attend_with(tile: QueryTile) -> Any:
        return attend(block_union(rows, tile_queries(tile, group), interpret=interpret), tile)

    shared = tile.shared
    if shared is None or B * K * Tq < _ADAPTIVE_FROM:
        return attend_with(tile)
    union = block_union(rows, tile_queries(shared, group), interpret=interpret)
    blocks = jnp.sum(union >= 0, axis=2).astype(jnp.float32)
    overlap = jnp.mean(blocks) < 2 * n
    return lax.cond(overlap, lambda: attend(union, shared), lambda: attend_with(tile))


class UnionRows(NamedTuple):
    """The queries of a tile of a query-major kernel, and the blocks in their union."""

    rows: Rows
    query: Any  # row of q of each packed row
    valid: Any
    position: Any
    start: Any  # first token of each row's segment; None: 0
    first_position: Any  # of the queries
    first_seen: Any  # the first position that a row sees; None: 0
    num_keys: int
    num_past: Any  # entries, the first ones, whose blocks lie wholly before the tile, and need no causal mask
    num_entries: Any
    load_entry: Callable[[Any], Any]
    shift: int  # bits of members in an entry

    def entry(self, i: Any) -> tuple[Any, Any]:
        """(block of entry i, whether each row's query selected it; None where there is one query)."""
        entry = self.load_entry(i)
        block = lax.shift_right_arithmetic(entry, np.int32(self.shift))
        if self.shift == 0:
            return block, None
        members = jnp.broadcast_to(entry, self.rows.query.shape)
        return block, (lax.shift_right_logical(members, self.rows.query) & 1) == 1

    def places(self, i: Any, key_position: Any, edge: bool) -> Any:
        """Where the keys of entry i are read: at their positions, and at the nearest that a row sees if no row sees it.

        An index costs less than a mask. The mask of the scores hides such keys.
        """
        place = key_position
        if edge:
            last = self.first_position
            if self.shift:
                members = self.load_entry(i) & np.int32((1 << self.shift) - 1)
                last += 31 - lax.clz(members)  # the last query that selected the block
            place = jnp.minimum(place, jnp.minimum(last, self.num_keys - 1))
        return place if self.first_seen is None else jnp.maximum(place, self.first_seen)

    def walk(self, step: Callable[..., Any], carry: Any) -> Any:
        """Runs `step(i, carry, edge)` over the entries."""
        carry = loop(0, self.num_past, functools.partial(step, edge=False), carry)
        return loop(self.num_past, self.num_entries, functools.partial(step, edge=True), carry)


def union_rows(
    pair: Pair,
    q_shape: tuple[int, ...],
    k_shape: tuple[int, ...],
    num_queries: int,
    offset: Any,
    starts_ref: Any,
    union_ref: Any,
    problem: Problem,
) -> UnionRows:
    """The rows of this program: program id 0 counts tiles of `num_queries` queries."""
    (_, Tq, H, _), (_, num_keys, num_kv_heads, _) = q_shape, k_shape
    padded_group = max(next_power_of_two(H // num_kv_heads), 16 // num_queries)
    tile = pl.program_id(0)
    first_query = tile * num_queries
    rows = packed_rows(0, num_queries * padded_group, padded_group, pair, H, num_kv_heads)
    query = first_query + rows.query
    shift = num_queries if num_queries > 1 else 0

    size = union_ref.shape[-1]
    slot = iota(next_power_of_two(size))
    entries = plgpu.load(union_ref.at[pair.index, tile, slot], mask=slot < size, other=-1)
    used = entries >= 0
    blocks = lax.shift_right_arithmetic(entries, np.int32(shift))
    past = used & (blocks < div(offset + first_query + 1, problem.select_block))
    return UnionRows(
        rows=rows,
        query=query,
        valid=rows.valid(query < Tq),
        position=offset + query,
        start=load_starts(starts_ref, pair.batch, query, query < Tq),
        first_position=offset + first_query,
        first_seen=None if starts_ref is None else starts_ref[pair.batch, first_query],
        num_keys=num_keys,
        num_past=count(past),
        num_entries=count(used),
        load_entry=lambda i: union_ref[pair.index, tile, i],
        shift=shift,
    )


def block_keys(problem: Problem) -> tuple[Any, Any]:
    """(key of the block, whether there is such) for all rows of a tile of one block; None: there are all."""
    key = iota(next_power_of_two(problem.select_block))
    return key, None if key.shape[0] == problem.select_block else key < problem.select_block
