"""Which blocks a tile of adjacent queries reads: the union of their selections, with a membership mask per block."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Int

from pallas_kernels.tiles import launch, next_power_of_two

_PAST_EVERY_BLOCK = 2**30


def _block_union_kernel(indices_ref, union_ref, *, num_queries, num_selected):
    tile, row = pl.program_id(0), pl.program_id(1)
    size = union_ref.shape[-1]
    place = jnp.arange(size, dtype=jnp.int32)
    query, slot = lax.rem(place, jnp.int32(num_queries)), lax.div(place, jnp.int32(num_queries))
    t = tile * num_queries + query
    valid = (t < indices_ref.shape[1]) & (slot < num_selected)
    blocks = plgpu.load(indices_ref.at[row, t, slot], mask=valid, other=-1)
    blocks = jnp.where(blocks < 0, _PAST_EVERY_BLOCK, blocks)
    bit = lax.shift_left(jnp.ones_like(query), query)

    def merge(carry):
        i, block, union = carry
        members = jnp.sum(jnp.where(blocks == block, bit, 0))
        union = jnp.where(place == i, block * (1 << num_queries) + members, union)
        return i + 1, jnp.min(jnp.where(blocks > block, blocks, _PAST_EVERY_BLOCK)), union

    start = (jnp.int32(0), jnp.min(blocks), jnp.full((size,), -1, jnp.int32))
    _, _, union = lax.while_loop(lambda carry: carry[1] < _PAST_EVERY_BLOCK, merge, start)
    plgpu.store(union_ref.at[row, tile, place], union)


def block_union(
    block_indices: Int[Array, "BK Tq n"], num_queries: int, *, interpret: bool
) -> Int[Array, "BK tiles size"]:
    """Ascending union of the blocks that each run of `num_queries` queries selected.

    An entry is block << num_queries | members, where bit i of members says that query i of the run selected the
    block. Unused entries are -1. A query on its own is its own union, and then an entry is the block.
    """
    rows, Tq, n = block_indices.shape
    if num_queries == 1:
        return block_indices
    size = next_power_of_two(num_queries * n)
    tiles = pl.cdiv(Tq, num_queries)
    return launch(
        functools.partial(_block_union_kernel, num_queries=num_queries, num_selected=n),
        out_shape=jax.ShapeDtypeStruct((rows, tiles, size), jnp.int32),
        grid=(tiles, rows),
        num_warps=1,
        num_stages=1,
        interpret=interpret,
        name="block_union",
    )(block_indices)


# Below this many queries the choice is not worth its own cost, and is made by the shapes alone.
_ADAPTIVE_FROM = 4096


def by_overlap(rows: Int[Array, "BK Tq n"], lone, shared, attend, *, interpret: bool):
    """`attend(union, tile)` with the tile `shared` where neighbours' selections overlap, and with `lone` where not.

    A tile of four queries does four times the arithmetic of a query alone for each block in its union, and reads the
    block once instead of up to four times. It wins while the union stays below about twice one query's blocks, which
    is measured here on the whole selection. Both tiles give the same result up to rounding.
    """

    def alone():
        return attend(block_union(rows, lone.num_queries, interpret=interpret), lone)

    if shared is None or rows.shape[0] * rows.shape[1] < _ADAPTIVE_FROM:
        return alone()
    shared_union = block_union(rows, shared.num_queries, interpret=interpret)
    blocks = jnp.sum(shared_union >= 0, axis=2).astype(jnp.float32)
    overlap = jnp.mean(blocks) < 2 * rows.shape[2]
    return lax.cond(overlap, lambda: attend(shared_union, shared), alone)
