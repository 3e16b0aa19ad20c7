"""Backward pass of selected attention: dq query-major, dk and dv block-major over the inverse index.

Nothing is added atomically. Each work item writes its own float32 partial, and a second kernel adds the partials of
a block in a fixed order, so that the same inputs give the same bits.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.contract import Gradients, Sizes
from pallas_kernels.selected_attention import tiles
from pallas_kernels.selected_attention.block_items import item_of
from pallas_kernels.selected_attention.block_union import block_keys, by_overlap, tile_queries, union_rows
from pallas_kernels.selected_attention.inverse_index import invert
from pallas_kernels.tiles import find_tile, key_of
from pallas_kernels.triton.heads import accumulate, dot_pieces, head_pieces, scaled, zeros
from pallas_kernels.triton.integers import div, iota, loop, next_power_of_two, rem
from pallas_kernels.triton.launch import launch
from pallas_kernels.triton.problem import (
    Problem,
    check_select_block,
    check_supported,
    group_last,
    heads_first,
    offset_array,
    problem_of,
)
from pallas_kernels.triton.rows import load_rows, load_starts, program_pair, store_rows, where_all
from pallas_kernels.triton.softmax import NEVER, exp2, finish_query_gradient, load_delta, load_lse_log2
from pallas_kernels.triton.tiles import BlockTile, QueryTile

_REDUCE_ROWS = 16


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
    dlse: Float[Array, "B H Tq"] | None = None,
    gate: Float[Array, "B Tq H"] | None = None,
    dq: Float[Array, "B Tq H Dk"] | None = None,
    interpret: bool = False,
    query_tile: QueryTile | None = None,
    key_tile: BlockTile | None = None,
) -> Gradients:
    """(dq, dk, dv, delta) of gate * o and of lse; see the contract. Tiles override the table, for tests and tuning.

    Raises:
      NotImplementedError: a dtype, head size, group size, scale or size of blocks that the kernels do not support.
    """
    check_supported(q, k, v, scale=scale)
    check_select_block(config)
    problem = problem_of(config, scale, interpret)
    query_tile = query_tile or find_tile(tiles.QUERY_GRADIENT, key_of(q, k, v))
    key_tile = key_tile or find_tile(tiles.KEY_GRADIENT, key_of(q, k, v))
    (B, Tq, H, _), K = q.shape, k.shape[2]
    positions = (offset_array(query_offset), segment_starts)
    block_indices = block_indices.astype(jnp.int32)
    lse, dlse = group_last(lse, K), None if dlse is None else group_last(dlse, K)
    dq_before = dq

    def attend(union: jax.Array, tile: QueryTile) -> Any:
        num_queries = tile_queries(tile, H // K)
        return launch(
            functools.partial(_query_gradient_kernel, problem=problem, num_queries=num_queries),
            name="selected_attention_query_gradient",
            grid=(pl.cdiv(Tq, num_queries), B * K),
            out_shape=(jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct(lse.shape, jnp.float32)),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            interpret=interpret,
        )(q, k, v, o, do, lse, dlse, union, *positions, gate, dq_before)

    dq, delta = by_overlap(block_indices, H // K, query_tile, attend, interpret=interpret)
    dk, dv = _key_gradients(q, k, v, do, lse, delta, block_indices, positions, gate, problem, key_tile)
    return Gradients(dq, dk, dv, heads_first(delta, K))


def _query_gradient_kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    o_ref: Any,
    do_ref: Any,
    lse_ref: Any,
    dlse_ref: Any,
    union_ref: Any,
    offset_ref: Any,
    starts_ref: Any,
    gate_ref: Any,
    dq_before_ref: Any,
    dq_ref: Any,
    delta_ref: Any,
    *,
    problem: Problem,
    num_queries: int,
) -> None:
    Dk, (_, _, K, Dv) = q_ref.shape[-1], v_ref.shape
    key_pieces, value_pieces = head_pieces(Dk), head_pieces(Dv)
    pair = program_pair(K)
    union = union_rows(pair, q_ref.shape, k_ref.shape, num_queries, offset_ref[0], starts_ref, union_ref, problem)
    rows, valid = union.rows, union.valid
    at, statistic_at = (pair.batch, union.query, rows.head), (pair.index, union.query, rows.group_head)
    q = load_rows(q_ref, at, key_pieces, valid)
    do = load_rows(do_ref, at, value_pieces, valid)
    o = load_rows(o_ref, at, value_pieces, valid)
    lse_log2 = load_lse_log2(lse_ref, statistic_at, valid)
    delta = load_delta(o, do, lse_log2, dlse_ref, statistic_at, valid)
    plgpu.store(delta_ref.at[statistic_at], delta, mask=valid)
    key, inside = block_keys(problem)

    def step(i: Any, dq: Any, *, edge: bool) -> Any:
        block, member = union.entry(i)
        key_position = block * problem.select_block + key
        key_at = (pair.batch, union.places(i, key_position, edge), pair.kv_head)
        k = load_rows(k_ref, key_at, key_pieces, inside)
        v = load_rows(v_ref, key_at, value_pieces, inside)
        reference = lse_log2 if member is None else jnp.where(member, lse_log2, NEVER)
        p = exp2(dot_pieces(q, k) * problem.scale_log2 - reference[:, None], problem.interpret)
        seen: list[Any] = []
        if edge:
            seen.append(key_position[None, :] <= union.position[:, None])
        if union.start is not None:
            seen.append(key_position[None, :] >= union.start[:, None])
        dp = dot_pieces(do, v) - delta[:, None]
        if union.start is not None:
            # A block may begin with keys of another segment, which are read, and whose products may not be finite.
            dp = where_all(seen, dp)
        # Rows of K past the block's end were loaded as zeros, so that their columns of ds add nothing.
        return accumulate(dq, where_all(seen, p) * dp, k)

    dq = union.walk(step, zeros(rows.query.shape[0], key_pieces))
    dq = finish_query_gradient(
        dq, problem.scale, gate_ref, dq_before_ref, pair.batch, union.query, rows, key_pieces, valid
    )
    store_rows(dq_ref, at, key_pieces, dq, valid)


def _key_gradients(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    do: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    block_indices: jax.Array,
    positions: Any,
    gate: jax.Array | None,
    problem: Problem,
    tile: BlockTile,
) -> Any:
    """(dk, dv)."""
    (B, Tq, H, Dk), (_, T, K, Dv) = q.shape, v.shape
    s, n = problem.select_block, block_indices.shape[-1]
    num_blocks = pl.cdiv(T, s)
    index = invert(block_indices.reshape(B * K, Tq, n), num_blocks, tile.queries)
    padded_group = next_power_of_two(H // K)
    num_rows = max(tile.rows, padded_group)
    items = index.block.shape[1]
    partials = launch(
        functools.partial(
            _key_gradient_kernel, problem=problem, num_selected=n, num_rows=num_rows, padded_group=padded_group
        ),
        name="selected_attention_key_gradient",
        grid=(items, B * K),
        out_shape=tuple(jax.ShapeDtypeStruct((B * K, items, s, D), jnp.float32) for D in (Dk, Dv)),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        interpret=problem.interpret,
    )(q, k, v, do, lse, delta, *index[:-1], *positions, gate)
    return launch(
        functools.partial(_reduce_kernel, select_block=s),
        name="selected_attention_key_gradient_sum",
        grid=(num_blocks * pl.cdiv(s, _REDUCE_ROWS), B * K),
        out_shape=(jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)),
        num_warps=4,
        num_stages=2,
        interpret=problem.interpret,
    )(index.block_items, *partials)


def _key_gradient_kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    do_ref: Any,
    lse_ref: Any,
    delta_ref: Any,
    choices_ref: Any,
    block_ref: Any,
    first_ref: Any,
    count_ref: Any,
    rank_ref: Any,
    first_query_ref: Any,
    last_query_ref: Any,
    offset_ref: Any,
    starts_ref: Any,
    gate_ref: Any,
    dk_ref: Any,
    dv_ref: Any,
    *,
    problem: Problem,
    num_selected: int,
    num_rows: int,
    padded_group: int,
) -> None:
    key_pieces, value_pieces = head_pieces(q_ref.shape[-1]), head_pieces(v_ref.shape[-1])
    pair = program_pair(k_ref.shape[2])
    index_refs = (choices_ref, block_ref, first_ref, count_ref, rank_ref, first_query_ref, last_query_ref)
    item = item_of(pair, q_ref.shape, k_ref.shape[2], num_rows, padded_group, index_refs, problem)
    rows, key, key_position = item.rows, item.key, item.key_position
    item_index = pl.program_id(0)

    @pl.when(item.count > 0)
    def _work() -> None:
        places = item.places(offset_ref[0], starts_ref, k_ref.shape[1])
        at = (pair.batch, places, pair.kv_head)
        k = load_rows(k_ref, at, key_pieces, item.inside)
        v = load_rows(v_ref, at, value_pieces, item.inside)

        def step(i: Any, carry: Any, *, edge: bool) -> Any:
            dk, dv = carry
            _, query, listed = item.gather(i, num_selected)
            valid = rows.valid(listed)
            at, statistic_at = (pair.batch, query, rows.head), (pair.index, query, rows.group_head)
            q = load_rows(q_ref, at, key_pieces, valid)
            do = load_rows(do_ref, at, value_pieces, valid)
            lse_log2 = load_lse_log2(lse_ref, statistic_at, valid)
            delta = plgpu.load(delta_ref.at[statistic_at], mask=valid, other=0)
            p = exp2(dot_pieces(k, q) * problem.scale_log2 - lse_log2[None, :], problem.interpret)
            if gate_ref is not None:
                p *= plgpu.load(gate_ref.at[at], mask=valid, other=0)[None, :]
            seen: list[Any] = []
            if edge:
                seen.append(key_position[:, None] <= (offset_ref[0] + query)[None, :])
            if starts_ref is not None:
                start = jnp.where(valid, load_starts(starts_ref, pair.batch, query, valid), k_ref.shape[1])
                seen.append(key_position[:, None] >= start[None, :])
            p = where_all(seen, p)
            dv = accumulate(dv, p, do)
            return accumulate(dk, p * (dot_pieces(v, do) - delta[None, :]), q), dv

        dk, dv = item.walk(step, (zeros(key.shape[0], key_pieces), zeros(key.shape[0], value_pieces)))
        inside = key < problem.select_block
        at = (pair.index, item_index, jnp.where(inside, key, problem.select_block))
        store_rows(dk_ref, at, key_pieces, scaled(dk, problem.scale), inside)
        store_rows(dv_ref, at, value_pieces, dv, inside)


def _reduce_kernel(
    block_items_ref: Any, dk_item_ref: Any, dv_item_ref: Any, dk_ref: Any, dv_ref: Any, *, select_block: int
) -> None:
    """Adds the partials of a block, item by item."""
    _, T, K, _ = dk_ref.shape
    pair = program_pair(K)
    parts = pl.cdiv(select_block, _REDUCE_ROWS)
    block = div(pl.program_id(0), parts)
    key = rem(pl.program_id(0), parts) * _REDUCE_ROWS + iota(_REDUCE_ROWS)
    key_position = block * select_block + key
    valid = (key < select_block) & (key_position < T)
    pieces = [head_pieces(ref.shape[-1]) for ref in (dk_ref, dv_ref)]

    def add(item: Any, totals: Any) -> Any:
        return tuple(
            tuple(map(jnp.add, total, load_rows(ref, (pair.index, item, key), cut, valid)))
            for total, ref, cut in zip(totals, (dk_item_ref, dv_item_ref), pieces, strict=True)
        )

    first, end = (block_items_ref[pair.index, block + i] for i in range(2))
    totals = loop(first, end, add, tuple(zeros(_REDUCE_ROWS, cut) for cut in pieces))
    at = (pair.batch, jnp.where(valid, key_position, T), pair.kv_head)
    for ref, cut, total in zip((dk_ref, dv_ref), pieces, totals, strict=True):
        store_rows(ref, at, cut, total, valid)
