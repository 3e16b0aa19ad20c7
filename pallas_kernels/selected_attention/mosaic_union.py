"""The union of the blocks that adjacent queries selected, as the lists that the Mosaic GPU kernels walk along.

A tile's list holds every block that one of its queries selected, once, in pairs that are one step of the kernels. First
come the blocks whose keys not every member sees: those of the queries themselves and of their segments' starts. Then
come the blocks with members in both of a program's warpgroups. The rest are pairs of blocks of one warpgroup and of the
other by turns, so that a warpgroup can skip whole steps.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic.intervals import Intervals
from pallas_kernels.mosaic.launch import Barriers, Vectors, launch, num_programs
from pallas_kernels.mosaic.products import (
    OF_COLUMNS,
    ROWS,
    Products,
    along_columns,
    down_rows,
    filled,
    i32,
    index,
    load_numbers,
)

MOST_ENTRIES = 256  # of a list
SPLIT = 16  # bits for the members of a block, below the block's number
MOST_BLOCKS = 1 << (31 - SPLIT)
_COPIED = 4  # numbers, which are all the same: the least that a copy takes
_WARPGROUPS = 4  # each makes the list of a tile by itself
_EDGE = 1 << 20
_NONE = 1 << 30


class Lists(NamedTuple):
    """What the tiles of adjacent queries read."""

    entries: jax.Array  # int32 [B K, tiles, entries]: block << 16 | members, one bit a query
    counts: jax.Array  # int32 [B K, tiles, 2]: steps of two entries, and how many of them need a mask


def entries_of(num_selected: int, queries: int) -> int:
    """Entries that the list of so many queries has room for."""
    each = max(1, 2 * ROWS // queries)  # with as many columns as rows, layouts would be ambiguous
    return -(-num_selected // each) * each * queries


def union_lists(block_indices: jax.Array, keys: Intervals, block: int, queries: int, interpret: bool) -> Lists:
    """The lists of tiles of `queries` queries that see `keys` of the blocks they selected, int32 [B, K, Tq, n]."""
    B, K, Tq, n = block_indices.shape
    room = entries_of(n, queries)
    tiles = pl.cdiv(Tq, queries)
    begin, last = keys.begin[:, None, :, None], keys.end[:, None, :, None] - 1
    edge = (block_indices == last // block) | (begin > block_indices * block)
    codes = jnp.where(block_indices < 0, -1, block_indices + jnp.where(edge, _EDGE, 0)).astype(jnp.int32)
    padding = ((0, 0), (0, 0), (0, tiles * queries - Tq), (0, room // queries - n))
    codes = jnp.pad(codes, padding, constant_values=-1).reshape(B * K, tiles, room)
    entries, counts = launch(
        functools.partial(_kernel, queries=queries, programs=num_programs(interpret)),
        name="selected_attention_union",
        out_shape=(
            jax.ShapeDtypeStruct((B * K, tiles, room), jnp.int32),
            jax.ShapeDtypeStruct((B * K, tiles, 2, _COPIED), jnp.int32),
        ),
        scratch=(
            Vectors((_WARPGROUPS, room), jnp.int32),
            Vectors((_WARPGROUPS, room), jnp.int32),
            Vectors((_WARPGROUPS, room), jnp.int32),
            Vectors((_WARPGROUPS, 2, ROWS), jnp.int32),
            Barriers(_WARPGROUPS),
        ),
        warpgroups=_WARPGROUPS,
        interpret=interpret,
    )(codes)
    return Lists(entries, counts[:, :, :, 0])


def _kernel(
    products: Products,
    codes_ref: Any,
    entries_ref: Any,
    counts_ref: Any,
    codes_shared: Any,
    orders_shared: Any,
    packed_shared: Any,
    counts_shared: Any,
    full: Any,
    *,
    queries: int,
    programs: int,
) -> None:
    pairs, tiles, room = codes_ref.shape
    warpgroup = lax.axis_index("warpgroup")
    codes_here, orders_here, packed_here, counts_here = (
        x.at[warpgroup] for x in (codes_shared, orders_shared, packed_shared, counts_shared)
    )
    shape = (ROWS, room)
    rows = range(0, room, ROWS)
    half = i32((1 << (queries // 2)) - 1)

    def total(condition: Any, values: Any) -> Any:  # of each row
        return jnp.where(condition, values, i32(0)).sum(axis=1)

    def work(j: Any, _: Any) -> Any:
        number = lax.axis_index("program") * i32(_WARPGROUPS) + warpgroup + j * i32(_WARPGROUPS * programs)
        pair, tile = lax.div(number, i32(tiles)), lax.rem(number, i32(tiles))
        plgpu.wait_smem_to_gmem(0)
        plgpu.copy_gmem_to_smem(codes_ref.at[pair, tile], codes_here, full.at[warpgroup])
        plgpu.barrier_wait(full.at[warpgroup])

        codes = load_numbers(codes_here, OF_COLUMNS)
        column = along_columns(codes, ROWS)
        place = index(shape, 1)
        ones = filled(shape, 1, jnp.int32)
        one = lax.shift_left(ones, place // i32(room // queries))
        block_of_column = column & i32(_EDGE - 1)
        for at in rows:  # every row finds who else selected its block
            code = load_numbers(codes_here.at[pl.ds(at, ROWS)])
            block = code & i32(_EDGE - 1)
            same = (block_of_column == down_rows(block, room)) & (column >= i32(0))
            members = total(same, one)
            edge = total(same & (column >= i32(_EDGE)), one) > i32(0)
            before = total(same & (place < index(shape, 0) + i32(at)), one)
            left, right = members & half, members // i32(1 << (queries // 2))
            both = (left > i32(0)) & (right > i32(0))
            kind = jnp.where(edge, i32(0), jnp.where(both, i32(1), jnp.where(left > i32(0), i32(2), i32(3))))
            kept = (code >= i32(0)) & (before == i32(0))
            orders_here[pl.ds(at, ROWS)] = jnp.where(kept, kind * i32(_EDGE) + block, i32(_NONE))
            packed_here[pl.ds(at, ROWS)] = block * i32(1 << SPLIT) + members
        plgpu.commit_smem()

        order = along_columns(load_numbers(orders_here, OF_COLUMNS), ROWS)
        kind_of_column = order // i32(_EDGE)
        # The same in every row, so that every row can use them.
        edges = total(kind_of_column == i32(0), ones)
        shared = total(kind_of_column <= i32(1), ones)
        listed = total(order < i32(_NONE), ones)
        gap = shared & i32(1)  # blocks of one warpgroup begin at an even place
        new_orders = []
        for at in rows:
            mine = load_numbers(orders_here.at[pl.ds(at, ROWS)])
            kind = mine // i32(_EDGE)
            rank = total(order < down_rows(mine, room), ones)
            among = total((order < down_rows(mine, room)) & (kind_of_column == down_rows(kind, room)), ones)
            turn = (among // i32(2)) * i32(4) + among % i32(2) + jnp.where(kind == i32(3), i32(2), i32(0))
            by_turns = jnp.where(kind >= i32(2), i32(2 * _EDGE) + turn, kind * i32(_EDGE) + rank)
            new_orders.append(jnp.where(mine < i32(_NONE), by_turns, i32(_NONE)))
        plgpu.commit_smem()
        for at, mine in zip(rows, new_orders, strict=True):
            orders_here[pl.ds(at, ROWS)] = mine
        plgpu.commit_smem()

        order = along_columns(load_numbers(orders_here, OF_COLUMNS), ROWS)
        ranks = []
        for at in rows:
            mine = load_numbers(orders_here.at[pl.ds(at, ROWS)])
            rank = total(order < down_rows(mine, room), ones)
            rank = jnp.where(mine >= i32(2 * _EDGE), rank + gap, rank)
            ranks.append(jnp.where(mine < i32(_NONE), rank, i32(_NONE)))
        plgpu.commit_smem()
        for at, mine in zip(rows, ranks, strict=True):
            orders_here[pl.ds(at, ROWS)] = mine
        plgpu.commit_smem()

        order = along_columns(load_numbers(orders_here, OF_COLUMNS), ROWS)
        packed = along_columns(load_numbers(packed_here, OF_COLUMNS), ROWS)
        # What is left over holds a block of the list, without members.
        spare = total(order == i32(0), packed - (packed & i32((1 << SPLIT) - 1)))
        lists = []
        for at in rows:
            row = index(shape, 0) + i32(at)
            found = total(order == row, ones)
            lists.append(jnp.where(found > i32(0), total(order == row, packed), spare))
        plgpu.commit_smem()
        for at, mine in zip(rows, lists, strict=True):
            codes_here[pl.ds(at, ROWS)] = mine
        length = jnp.where(listed > shared, listed + gap, listed)
        counts_here[0] = (length + i32(1)) // i32(2)
        counts_here[1] = (edges + i32(1)) // i32(2)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(codes_here, entries_ref.at[pair, tile], commit_group=False)
        for k in range(2):
            source = counts_here.at[k, pl.ds(0, _COPIED)]
            plgpu.copy_smem_to_gmem(source, counts_ref.at[pair, tile, i32(k)], commit_group=False)
        plgpu.commit_smem_to_gmem_group()
        return i32(0)

    left = i32(pairs * tiles + _WARPGROUPS * programs - 1)
    mine = left - lax.axis_index("program") * i32(_WARPGROUPS) - warpgroup
    lax.fori_loop(i32(0), lax.div(mine, i32(_WARPGROUPS * programs)), work, i32(0))
    plgpu.wait_smem_to_gmem(0)
