"""Block-major forward of selected attention, for small groups (Flash Sparse Attention, arXiv 2508.18224).

One query's few heads fill a small part of a tile's 16 rows. Here a program takes one block and gathers the queries that
chose it into full tiles, writing what each got from this block alone. A second kernel combines, for each query, the
partial outputs of its blocks by their lse.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.selected_attention.block_items import item_of
from pallas_kernels.selected_attention.inverse_index import invert
from pallas_kernels.triton.heads import accumulate, dot_pieces, head_pieces
from pallas_kernels.triton.integers import loop, next_power_of_two
from pallas_kernels.triton.launch import launch
from pallas_kernels.triton.problem import Problem
from pallas_kernels.triton.rows import load_rows, load_starts, packed_rows, program_pair, store_rows
from pallas_kernels.triton.softmax import softmax_finish, softmax_start, softmax_step
from pallas_kernels.triton.tiles import BlockTile

_COMBINE_ROWS = 32


def block_major_forward(
    q: Float[Array, "B Tq H Dk"],
    k: Float[Array, "B T K Dk"],
    v: Float[Array, "B T K Dv"],
    block_indices: Int[Array, "B K Tq n"],
    starts: Int[Array, "B Tq"] | None,
    offset: Int[Array, "1"],
    *,
    problem: Problem,
    tile: BlockTile,
) -> tuple[Float[Array, "B Tq H Dv"], Float[Array, "BK Tq G"]]:
    """(o, lse in the rows' layout)."""
    (B, Tq, H, _), (_, T, K, Dv) = q.shape, v.shape
    G, n = H // K, block_indices.shape[-1]
    padded_group = next_power_of_two(G)
    rows = block_indices.reshape(B * K, Tq, n)
    index = invert(rows, pl.cdiv(T, problem.select_block), tile.queries)
    options: dict[str, Any] = dict(num_selected=n, padded_group=padded_group, problem=problem)
    part, part_lse = launch(
        functools.partial(_partial_kernel, num_rows=max(tile.rows, padded_group), **options),
        name="selected_attention_partial",
        grid=(index.block.shape[1], B * K),
        out_shape=(
            jax.ShapeDtypeStruct((B * K, Tq * n, G, Dv), q.dtype),
            jax.ShapeDtypeStruct((B * K, Tq * n, G), jnp.float32),
        ),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        interpret=problem.interpret,
    )(q, k, v, *index[:-1], offset, starts)
    combine_rows = max(_COMBINE_ROWS, padded_group)
    return launch(
        functools.partial(_combine_kernel, num_rows=combine_rows, **options),
        name="selected_attention_combine",
        grid=(pl.cdiv(Tq, combine_rows // padded_group), B * K),
        out_shape=(
            jax.ShapeDtypeStruct((B, Tq, H, Dv), q.dtype),
            jax.ShapeDtypeStruct((B * K, Tq, G), jnp.float32),
        ),
        num_warps=4,
        num_stages=2,
        interpret=problem.interpret,
    )(rows, part, part_lse)


def _partial_kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    choices_ref: Any,
    block_ref: Any,
    first_ref: Any,
    count_ref: Any,
    rank_ref: Any,
    first_query_ref: Any,
    last_query_ref: Any,
    offset_ref: Any,
    starts_ref: Any,
    o_ref: Any,
    lse_ref: Any,
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
    rows, key_position = item.rows, item.key_position

    @pl.when(item.count > 0)
    def _work() -> None:
        places = item.places(offset_ref[0], starts_ref, k_ref.shape[1])
        at = (pair.batch, places, pair.kv_head)
        k = load_rows(k_ref, at, key_pieces, item.inside)
        v = load_rows(v_ref, at, value_pieces, item.inside)

        def step(i: Any, carry: Any, *, edge: bool) -> Any:
            choice, query, listed = item.gather(i, num_selected)
            valid = rows.valid(listed)
            s = dot_pieces(load_rows(q_ref, (pair.batch, query, rows.head), key_pieces, valid), k)
            if edge:
                s = jnp.where(key_position[None, :] <= (offset_ref[0] + query)[:, None], s, -jnp.inf)
            if item.inside is not None:
                s = jnp.where(item.inside[None, :], s, -jnp.inf)
            if starts_ref is not None:
                start = load_starts(starts_ref, pair.batch, query, listed)
                s = jnp.where(key_position[None, :] >= start[:, None], s, -jnp.inf)
            m, total, acc = softmax_start(num_rows, value_pieces)
            p, m, total, _ = softmax_step(s, m, total, problem.scale_log2, problem.interpret)
            o, lse = softmax_finish(m, total, accumulate(acc, p, v), problem.scale)
            place = jnp.where(listed, choice, o_ref.shape[1])
            store_rows(o_ref, (pair.index, place, rows.group_head), value_pieces, o, valid)
            plgpu.store(lse_ref.at[pair.index, place, rows.group_head], lse, mask=valid)
            return carry

        item.walk(step, jnp.int32(0))


def _combine_kernel(
    indices_ref: Any,
    part_ref: Any,
    part_lse_ref: Any,
    o_ref: Any,
    lse_ref: Any,
    *,
    problem: Problem,
    num_selected: int,
    num_rows: int,
    padded_group: int,
) -> None:
    (_, Tq, H, Dv), G = o_ref.shape, part_ref.shape[2]
    pieces = head_pieces(Dv)
    pair = program_pair(H // G)
    rows = packed_rows(0, num_rows, padded_group, pair, H, H // G)
    query = pl.program_id(0) * (num_rows // padded_group) + rows.query
    valid = rows.valid(query < Tq)

    def step(slot: Any, carry: Any) -> Any:
        m, total, acc = carry
        chosen = plgpu.load(indices_ref.at[pair.index, query, slot], mask=valid, other=-1) >= 0
        at = (pair.index, query * num_selected + slot, rows.group_head)
        part_lse = plgpu.load(part_lse_ref.at[at], mask=chosen, other=-jnp.inf)
        part = load_rows(part_ref, at, pieces, chosen)
        m_new = jnp.maximum(m, part_lse)
        decay, weight = jnp.exp(m - m_new), jnp.exp(part_lse - m_new)
        acc = tuple(a * decay[:, None] + x * weight[:, None] for a, x in zip(acc, part, strict=True))
        return m_new, total * decay + weight, acc

    m, total, acc = loop(0, num_selected, step, softmax_start(num_rows, pieces))
    o, lse = softmax_finish(m, total, acc, 1.0)
    store_rows(o_ref, (pair.batch, query, rows.head), pieces, o, valid)
    plgpu.store(lse_ref.at[pair.index, query, rows.group_head], lse, mask=valid)
