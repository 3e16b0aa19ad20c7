"""Block-major forward of selected attention, for small groups (Flash Sparse Attention, arXiv 2508.18224).

One query's few heads fill a small part of a tile's 16 rows. Here a program takes one block and gathers the queries that
chose it into full tiles, writing what each got from this block alone. A second kernel combines, for each query, the
partial outputs of its blocks by their lse.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.selected_attention.inverse_index import invert
from pallas_kernels.tiles import (
    LEAST,
    LOG2_E,
    accumulate,
    dot_pieces,
    launch,
    load_rows,
    next_power_of_two,
    softmax_finish,
    softmax_step,
    store_rows,
    zeros,
)


@dataclasses.dataclass(frozen=True)
class BlockMajorTile:
    """Up to `item_size` queries of one block to a program, `num_rows` rows (query x head) at a time."""

    num_rows: int
    item_size: int
    num_warps: int
    num_stages: int


def block_major_tile(group_size: int, head_dim: int, itemsize: int) -> BlockMajorTile | None:
    """The tile for a group of `group_size` heads, or None where query-major is faster."""
    if group_size > 4 or itemsize == 4 or head_dim > 128:
        return None
    return BlockMajorTile(128, 512, 4, 2)  # H100, D = 128, 64k, G = 1, 2, 4: 2.1, 3.3, 5.9 ms; query-major 14.7 at best


def _partial_kernel(
    q_ref,
    k_ref,
    v_ref,
    places_ref,
    block_ref,
    first_ref,
    count_ref,
    rank_ref,
    offset_ref,
    starts_ref,
    o_ref,
    lse_ref,
    *,
    num_selected: int,
    num_rows: int,
    padded_group: int,
    select_block: int,
    scale: float,
    interpret: bool,
):
    item, bk = pl.program_id(0), pl.program_id(1)
    (_, _, H, Dk), (_, T, K, Dv) = q_ref.shape, v_ref.shape
    G = H // K
    b, kv_head = lax.div(bk, jnp.int32(K)), lax.rem(bk, jnp.int32(K))
    row = jnp.arange(num_rows, dtype=jnp.int32)
    query, g = lax.div(row, jnp.int32(padded_group)), lax.rem(row, jnp.int32(padded_group))
    queries = num_rows // padded_group
    head, group_row = jnp.where(g < G, kv_head * G + g, H), jnp.where(g < G, g, G)
    block, first, count, rank = (ref[bk, item] for ref in (block_ref, first_ref, count_ref, rank_ref))
    key = jnp.arange(next_power_of_two(select_block), dtype=jnp.int32)
    key_position = block * select_block + key
    in_block = (key < select_block) & (key_position < T)

    @pl.when(count > 0)
    def _work():
        k = load_rows(k_ref, (b,), key_position, kv_head, Dk, in_block)
        v = load_rows(v_ref, (b,), key_position, kv_head, Dv, in_block)

        def step(i, carry, *, edge):
            entry = i * queries + query
            listed = entry < count
            place = plgpu.load(places_ref.at[bk, first + entry], mask=listed, other=0)
            t = lax.div(place, jnp.int32(num_selected))
            valid = listed & (g < G)
            s = dot_pieces(load_rows(q_ref, (b,), t, head, Dk, valid), k)
            if edge:
                s = jnp.where(key_position[None, :] <= (offset_ref[0] + t)[:, None], s, -jnp.inf)
            if key.shape[0] != select_block:
                s = jnp.where((key < select_block)[None, :], s, -jnp.inf)
            if starts_ref is not None:
                start = plgpu.load(starts_ref.at[b, t], mask=listed, other=0)
                s = jnp.where(key_position[None, :] >= start[:, None], s, -jnp.inf)
            least = jnp.full((num_rows,), LEAST, jnp.float32)
            p, m, total, _ = softmax_step(s, least, jnp.zeros((num_rows,), jnp.float32), scale * LOG2_E, interpret)
            o, lse = softmax_finish(m, total, accumulate(zeros(num_rows, Dv), p, v), scale)
            store_rows(o_ref, (bk,), place, group_row, Dv, o, valid)
            plgpu.store(lse_ref.at[bk, place, group_row], lse, mask=valid)
            return carry

        # A block's list begins with the block's own queries, the only ones that do not see all of it.
        steps = pl.cdiv(count, queries)
        own = jnp.minimum(pl.cdiv(jnp.maximum(select_block - rank, 0), queries), steps)
        lax.fori_loop(0, own, functools.partial(step, edge=True), 0)
        lax.fori_loop(own, steps, functools.partial(step, edge=False), 0)


def _combine_kernel(
    indices_ref, part_ref, part_lse_ref, o_ref, lse_ref, *, num_selected, num_rows, padded_group, scale
):
    tile, bk = pl.program_id(0), pl.program_id(1)
    _, Tq, H, Dv = o_ref.shape
    G = part_ref.shape[2]
    K = H // G
    b, kv_head = lax.div(bk, jnp.int32(K)), lax.rem(bk, jnp.int32(K))
    row = jnp.arange(num_rows, dtype=jnp.int32)
    t = tile * (num_rows // padded_group) + lax.div(row, jnp.int32(padded_group))
    g = lax.rem(row, jnp.int32(padded_group))
    valid = (t < Tq) & (g < G)
    head, group_row = jnp.where(g < G, kv_head * G + g, H), jnp.where(g < G, g, G)

    def step(slot, carry):
        m, total, acc = carry
        chosen = plgpu.load(indices_ref.at[bk, t, slot], mask=valid, other=-1) >= 0
        place = t * num_selected + slot
        part_lse = plgpu.load(part_lse_ref.at[bk, place, group_row], mask=chosen, other=-jnp.inf)
        part = load_rows(part_ref, (bk,), place, group_row, Dv, chosen)
        m_new = jnp.maximum(m, part_lse)
        decay, weight = jnp.exp(m - m_new), jnp.exp(part_lse - m_new)
        acc = tuple(a * decay[:, None] + x * weight[:, None] for a, x in zip(acc, part, strict=True))
        return m_new, total * decay + weight, acc

    start = (jnp.full((num_rows,), LEAST, jnp.float32), jnp.zeros((num_rows,), jnp.float32), zeros(num_rows, Dv))
    m, total, acc = lax.fori_loop(0, num_selected, step, start)
    o, lse = softmax_finish(m, total, acc, 1.0)
    store_rows(o_ref, (b,), t, head, Dv, o, valid)
    plgpu.store(lse_ref.at[bk, t, group_row], lse, mask=valid)


def block_major_forward(q, k, v, block_indices, starts, offset, *, select_block, scale, tile, interpret):
    """Output [B, Tq, H, Dv] and natural-log lse [B * K, Tq, G] of selected attention, block-major."""
    (B, Tq, H, _), (_, T, K, Dv) = q.shape, v.shape
    G, n = H // K, block_indices.shape[-1]
    rows = block_indices.reshape(B * K, Tq, n)
    index = invert(rows, pl.cdiv(T, select_block), tile.item_size)
    sizes = dict(num_selected=n, padded_group=next_power_of_two(G), scale=scale)
    part, part_lse = launch(
        functools.partial(
            _partial_kernel, num_rows=tile.num_rows, select_block=select_block, interpret=interpret, **sizes
        ),
        out_shape=(
            jax.ShapeDtypeStruct((B * K, Tq * n, G, Dv), q.dtype),
            jax.ShapeDtypeStruct((B * K, Tq * n, G), jnp.float32),
        ),
        grid=(index.block.shape[1], B * K),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        interpret=interpret,
        name="selected_attention_partial",
    )(q, k, v, *index[:-1], offset, starts)
    combine_rows = 32
    return launch(
        functools.partial(_combine_kernel, num_rows=combine_rows, **sizes),
        out_shape=(
            jax.ShapeDtypeStruct((B, Tq, H, Dv), q.dtype),
            jax.ShapeDtypeStruct((B * K, Tq, G), jnp.float32),
        ),
        grid=(pl.cdiv(Tq, combine_rows // sizes["padded_group"]), B * K),
        num_warps=4,
        num_stages=2,
        interpret=interpret,
        name="selected_attention_combine",
    )(rows, part, part_lse)
