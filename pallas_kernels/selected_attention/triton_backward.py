"""Backward pass of selected attention: dq query-major, dk and dv block-major over the inverse index.

Nothing is added atomically. Each work item writes its own float32 partial, and a second kernel adds the partials of
a block in a fixed order, so that the same inputs give the same bits.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.contract import Gradients, Sizes
from pallas_kernels.selected_attention.block_union import by_overlap
from pallas_kernels.selected_attention.inverse_index import InverseIndex, invert
from pallas_kernels.tiles import (
    LOG2_E,
    NEVER,
    accumulate,
    base2_lse,
    dot_pieces,
    exp2,
    finish_query_gradient,
    launch,
    load_rows,
    next_power_of_two,
    row_products,
    store_rows,
    zeros,
)
from pallas_kernels.triton.problem import check_select_block, check_supported, group_last, heads_first, offset_array


@dataclasses.dataclass(frozen=True)
class QueryTile:
    """One program of dq: `num_queries` adjacent queries of one K/V head over the union of their blocks."""

    num_queries: int
    num_warps: int
    num_stages: int


@dataclasses.dataclass(frozen=True)
class BlockTile:
    """One program of dk and dv: up to `item_size` queries of one block, `num_rows` rows (query x head) at a time."""

    num_rows: int
    item_size: int
    num_warps: int
    num_stages: int


def query_tiles(group_size: int, head_dim: int, itemsize: int) -> tuple[QueryTile, QueryTile | None]:
    """Tiles of dq for selections that neighbours do not share, and for those they share (None: the same).

    By the heads in a group, the larger head size, and the bytes of an element.
    """
    lone = max(1, 16 // next_power_of_two(group_size))
    if itemsize == 4:
        return QueryTile(lone, 4, 1), None
    if head_dim > 128:
        return QueryTile(lone, 4, 2), None
    if 8 < group_size <= 16:  # H100, G = 16, D = 128, 64k: 18.9 ms on random selections, 10.7 on local ones.
        return QueryTile(1, 4, 2), QueryTile(4, 4, 2)
    return QueryTile(lone, 4, 2), None


def block_tile(group_size: int, head_dim: int, itemsize: int) -> BlockTile:
    """The tile of dk and dv, by the same."""
    padded_group = next_power_of_two(group_size)
    if itemsize == 4:
        return BlockTile(max(16, padded_group), 512, 4, 1)
    if head_dim > 128:
        return BlockTile(64, 1024, 8, 2)
    # H100, G = 16, D = 128, 64k: 12.6 ms; with items of 512 13.2, with 8 warps 23.4, with 128 rows 20.7.
    return BlockTile(64, 1024, 4, 2)


def _dq_kernel(
    q_ref,
    k_ref,
    v_ref,
    o_ref,
    do_ref,
    lse_ref,
    union_ref,
    offset_ref,
    starts_ref,
    gate_ref,
    dq_before_ref,
    dq_ref,
    delta_ref,
    *,
    num_queries: int,
    padded_group: int,
    select_block: int,
    scale: float,
    interpret: bool,
):
    tile, bk = pl.program_id(0), pl.program_id(1)
    (_, Tq, H, Dk), (_, T, K, Dv) = q_ref.shape, v_ref.shape
    G = H // K
    b, kv_head = lax.div(bk, jnp.int32(K)), lax.rem(bk, jnp.int32(K))
    row = jnp.arange(num_queries * padded_group, dtype=jnp.int32)
    query, g = lax.div(row, jnp.int32(padded_group)), lax.rem(row, jnp.int32(padded_group))
    t = tile * num_queries + query
    valid = (t < Tq) & (g < G)
    head, group_row = jnp.where(g < G, kv_head * G + g, H), jnp.where(g < G, g, G)
    position = offset_ref[0] + t
    first_position = offset_ref[0] + tile * num_queries
    start = None if starts_ref is None else plgpu.load(starts_ref.at[b, t], mask=t < Tq, other=0)

    size = union_ref.shape[-1]
    place = jnp.arange(next_power_of_two(size), dtype=jnp.int32)
    entries = plgpu.load(union_ref.at[bk, tile, place], mask=place < size, other=-1)
    num_entries = jnp.sum((entries >= 0).astype(jnp.int32))
    shift = num_queries if num_queries > 1 else 0
    past = lax.shift_right_arithmetic(entries, jnp.int32(shift)) < lax.div(first_position + 1, jnp.int32(select_block))
    num_past = jnp.sum(((entries >= 0) & past).astype(jnp.int32))

    q = load_rows(q_ref, (b,), t, head, Dk, valid)
    do = load_rows(do_ref, (b,), t, head, Dv, valid)
    o = load_rows(o_ref, (b,), t, head, Dv, valid)
    delta = row_products(o, do)
    plgpu.store(delta_ref.at[bk, t, group_row], delta, mask=valid)
    lse = plgpu.load(lse_ref.at[bk, t, group_row], mask=valid, other=-jnp.inf)
    lse = base2_lse(lse)

    key = jnp.arange(next_power_of_two(select_block), dtype=jnp.int32)
    whole = key.shape[0] == select_block
    c = scale * LOG2_E

    def step(i, dq, *, edge):
        entry = union_ref[bk, tile, i]
        key_position = lax.shift_right_arithmetic(entry, jnp.int32(shift)) * select_block + key
        in_block = None if whole else key < select_block
        if edge:
            in_block = key_position < T if whole else in_block & (key_position < T)
        k = load_rows(k_ref, (b,), key_position, kv_head, Dk, in_block)
        v = load_rows(v_ref, (b,), key_position, kv_head, Dv, in_block)
        s = dot_pieces(q, k)
        reference = lse
        if num_queries > 1:
            member = (lax.shift_right_logical(jnp.broadcast_to(entry, query.shape), query) & 1) == 1
            reference = jnp.where(member, lse, NEVER)
        p = exp2(s * c - reference[:, None], interpret)
        if edge:
            p = jnp.where(key_position[None, :] <= position[:, None], p, 0)
        if start is not None:
            p = jnp.where(key_position[None, :] >= start[:, None], p, 0)
        ds = p * (dot_pieces(do, v) - delta[:, None])
        # Rows of K past the block's end were loaded as zeros, so that their columns of ds add nothing.
        return accumulate(dq, ds, k)

    dq = lax.fori_loop(0, num_past, functools.partial(step, edge=False), zeros(row.shape[0], Dk))
    dq = lax.fori_loop(num_past, num_entries, functools.partial(step, edge=True), dq)
    dq = finish_query_gradient(dq, scale, gate_ref, dq_before_ref, b, t, head, valid)
    store_rows(dq_ref, (b,), t, head, Dk, dq, valid)


def _dkv_kernel(
    q_ref,
    k_ref,
    v_ref,
    do_ref,
    lse_ref,
    delta_ref,
    places_ref,
    block_ref,
    first_ref,
    count_ref,
    rank_ref,
    offset_ref,
    starts_ref,
    gate_ref,
    dk_ref,
    dv_ref,
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
    c = scale * LOG2_E

    @pl.when(count > 0)
    def _work():
        k = load_rows(k_ref, (b,), key_position, kv_head, Dk, in_block)
        v = load_rows(v_ref, (b,), key_position, kv_head, Dv, in_block)

        def step(i, carry, *, edge):
            dk, dv = carry
            entry = i * queries + query
            listed = entry < count
            t = lax.div(plgpu.load(places_ref.at[bk, first + entry], mask=listed, other=0), jnp.int32(num_selected))
            valid = listed & (g < G)
            q = load_rows(q_ref, (b,), t, head, Dk, valid)
            do = load_rows(do_ref, (b,), t, head, Dv, valid)
            lse = plgpu.load(lse_ref.at[bk, t, group_row], mask=valid, other=-jnp.inf)
            delta = plgpu.load(delta_ref.at[bk, t, group_row], mask=valid, other=0)
            s = dot_pieces(k, q)
            p = exp2(s * c - base2_lse(lse)[None, :], interpret)
            if gate_ref is not None:
                p *= plgpu.load(gate_ref.at[b, t, head], mask=valid, other=0)[None, :]
            if edge:
                p = jnp.where(key_position[:, None] <= (offset_ref[0] + t)[None, :], p, 0)
            if starts_ref is not None:
                start = plgpu.load(starts_ref.at[b, t], mask=listed, other=0)
                p = jnp.where(key_position[:, None] >= start[None, :], p, 0)
            dv = accumulate(dv, p, do)
            ds = p * (dot_pieces(v, do) - delta[None, :])
            return accumulate(dk, ds, q), dv

        # A block's list begins with the block's own queries, the only ones that do not see all of it.
        steps = pl.cdiv(count, queries)
        own = jnp.minimum(pl.cdiv(jnp.maximum(select_block - rank, 0), queries), steps)
        carry = (zeros(key.shape[0], Dk), zeros(key.shape[0], Dv))
        carry = lax.fori_loop(0, own, functools.partial(step, edge=True), carry)
        dk, dv = lax.fori_loop(own, steps, functools.partial(step, edge=False), carry)
        everywhere = key < select_block
        key_row = jnp.where(everywhere, key, select_block)
        store_rows(dk_ref, (bk, item), key_row, None, Dk, tuple(piece * scale for piece in dk), everywhere)
        store_rows(dv_ref, (bk, item), key_row, None, Dv, dv, everywhere)


_REDUCE_ROWS = 16


def _reduce_kernel(block_items_ref, dk_item_ref, dv_item_ref, dk_ref, dv_ref, *, select_block):
    part, bk = pl.program_id(0), pl.program_id(1)
    (_, T, K, Dk), Dv = dk_ref.shape, dv_ref.shape[-1]
    b, kv_head = lax.div(bk, jnp.int32(K)), lax.rem(bk, jnp.int32(K))
    parts = pl.cdiv(select_block, _REDUCE_ROWS)
    block = lax.div(part, jnp.int32(parts))
    key = lax.rem(part, jnp.int32(parts)) * _REDUCE_ROWS + jnp.arange(_REDUCE_ROWS, dtype=jnp.int32)
    key_position = block * select_block + key
    valid = (key < select_block) & (key_position < T)

    def add(item, carry):
        dk, dv = carry
        dk_item = load_rows(dk_item_ref, (bk, item), key, None, Dk, valid)
        dv_item = load_rows(dv_item_ref, (bk, item), key, None, Dv, valid)
        return tuple(map(jnp.add, dk, dk_item)), tuple(map(jnp.add, dv, dv_item))

    carry = (zeros(_REDUCE_ROWS, Dk), zeros(_REDUCE_ROWS, Dv))
    dk, dv = lax.fori_loop(block_items_ref[bk, block], block_items_ref[bk, block + 1], add, carry)
    key_position = jnp.where(valid, key_position, T)
    store_rows(dk_ref, (b,), key_position, kv_head, Dk, dk, valid)
    store_rows(dv_ref, (b,), key_position, kv_head, Dv, dv, valid)


def query_gradient(
    q, k, v, o, do, lse, union, starts, offset, gate=None, dq=None, *, select_block, scale, tile, interpret
):
    """dq over the `block_union` of `tile`, and delta = sum(o * do) [B * K, Tq, G] for the other kernel."""
    (B, Tq, H, _), K = q.shape, k.shape[2]
    G = H // K
    kernel = functools.partial(
        _dq_kernel,
        num_queries=tile.num_queries,
        padded_group=max(next_power_of_two(G), 16 // tile.num_queries),
        select_block=select_block,
        scale=scale,
        interpret=interpret,
    )
    return launch(
        kernel,
        out_shape=(jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct(lse.shape, jnp.float32)),
        grid=(pl.cdiv(Tq, tile.num_queries), B * K),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        interpret=interpret,
        name="selected_attention_dq",
    )(q, k, v, o, do, lse, union, offset, starts, gate, dq)


def key_gradients(
    q, k, v, do, lse, delta, block_indices, starts, offset, gate=None, *, select_block, scale, tile, interpret
):
    """dk and dv."""
    (B, Tq, H, Dk), (_, T, K, Dv) = q.shape, v.shape
    G, n = H // K, block_indices.shape[-1]
    num_blocks = pl.cdiv(T, select_block)
    index: InverseIndex = invert(block_indices.reshape(B * K, Tq, n), num_blocks, tile.item_size)
    padded_group = next_power_of_two(G)
    kernel = functools.partial(
        _dkv_kernel,
        num_selected=n,
        num_rows=max(tile.num_rows, padded_group),
        padded_group=padded_group,
        select_block=select_block,
        scale=scale,
        interpret=interpret,
    )
    items = index.block.shape[1]
    dk_items, dv_items = launch(
        kernel,
        out_shape=tuple(jax.ShapeDtypeStruct((B * K, items, select_block, D), jnp.float32) for D in (Dk, Dv)),
        grid=(items, B * K),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        interpret=interpret,
        name="selected_attention_dkv",
    )(q, k, v, do, lse, delta, *index[:-1], offset, starts, gate)
    return launch(
        functools.partial(_reduce_kernel, select_block=select_block),
        out_shape=(jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)),
        grid=(num_blocks * pl.cdiv(select_block, _REDUCE_ROWS), B * K),
        num_warps=4,
        num_stages=2,
        interpret=interpret,
        name="selected_attention_dkv_reduce",
    )(index.block_items, dk_items, dv_items)


def backward(
    q: Float[Array, "B Tq H Dk"],
    k: Float[Array, "B T K Dk"],
    v: Float[Array, "B T K Dv"],
    block_indices: Int[Array, "B K Tq n"],
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
    query_tile: QueryTile | None = None,
    key_tile: BlockTile | None = None,
) -> Gradients:
    """(dq, dk, dv, delta) of gate * o; see the contract. Tiles override the table, for tests and tuning.

    Raises:
      NotImplementedError: a dtype, head size, group size, scale or size of blocks that the kernels do not support.
    """
    check_supported(q, k, v, scale=scale)
    check_select_block(config)
    sizes = (q.shape[2] // k.shape[2], max(q.shape[-1], v.shape[-1]), q.dtype.itemsize)
    options = dict(select_block=config.select_block, scale=float(scale), interpret=interpret)
    starts, offset = segment_starts, offset_array(query_offset)
    block_indices = block_indices.astype(jnp.int32)
    lse = group_last(lse, k.shape[2])
    dq_before = dq

    def attend(union, tile):
        return query_gradient(q, k, v, o, do, lse, union, starts, offset, gate, dq_before, tile=tile, **options)

    rows = block_indices.reshape(-1, *block_indices.shape[2:])
    tiles = query_tiles(*sizes) if query_tile is None else (query_tile, None)
    dq, delta = by_overlap(rows, *tiles, attend, interpret=interpret)
    tile = key_tile or block_tile(*sizes)
    dk, dv = key_gradients(q, k, v, do, lse, delta, block_indices, starts, offset, gate, tile=tile, **options)
    return Gradients(dq, dk, dv, heads_first(delta, k.shape[2]))
