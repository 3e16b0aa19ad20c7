"""Selected attention on the Pallas Triton backend: the query-major forward kernel, and the choice of the way."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.contract import Sizes
from pallas_kernels.selected_attention import tiles
from pallas_kernels.selected_attention.block_major import block_major_forward
from pallas_kernels.selected_attention.block_union import block_keys, by_overlap, tile_queries, union_rows
from pallas_kernels.tiles import find_tile, key_of
from pallas_kernels.triton.heads import accumulate, dot_pieces, head_pieces
from pallas_kernels.triton.launch import launch
from pallas_kernels.triton.problem import (
    Problem,
    check_select_block,
    check_supported,
    heads_first,
    offset_array,
    problem_of,
)
from pallas_kernels.triton.rows import load_rows, program_pair, store_rows
from pallas_kernels.triton.softmax import softmax_finish, softmax_start, softmax_step
from pallas_kernels.triton.tiles import BlockTile, QueryTile


def forward(
    q: Float[Array, "B Tq H Dk"],
    k: Float[Array, "B T K Dk"],
    v: Float[Array, "B T K Dv"],
    block_indices: Int[Array, "B K Tq n"],
    segment_starts: Int[Array, "B Tq"] | None,
    query_offset: int | Int[Array, ""],
    *,
    config: Sizes,
    scale: float,
    interpret: bool = False,
    tile: QueryTile | BlockTile | None = None,
) -> tuple[Float[Array, "B Tq H Dv"], Float[Array, "B H Tq"]]:
    """(o, lse); see the contract. `tile` overrides the table, for tests and tuning.

    The kind of the tile says which way is taken: query-major, or block-major for small groups.

    Raises:
      NotImplementedError: a dtype, head size, group size, scale or size of blocks that the kernels do not support.
    """
    check_supported(q, k, v, scale=scale)
    check_select_block(config)
    (B, Tq, H, _), (_, _, K, Dv) = q.shape, v.shape
    tile = tile or find_tile(tiles.FORWARD, key_of(q, k, v))
    problem = problem_of(config, scale, interpret)
    offset, starts = offset_array(query_offset), segment_starts
    block_indices = block_indices.astype(jnp.int32)
    if isinstance(tile, BlockTile):
        o, lse = block_major_forward(q, k, v, block_indices, starts, offset, problem=problem, tile=tile)
        return o, heads_first(lse, K)

    def attend(union: jax.Array, tile: QueryTile) -> Any:
        num_queries = tile_queries(tile, H // K)
        return launch(
            functools.partial(_forward_kernel, problem=problem, num_queries=num_queries),
            name="selected_attention_forward",
            grid=(pl.cdiv(Tq, num_queries), B * K),
            out_shape=(
                jax.ShapeDtypeStruct((B, Tq, H, Dv), q.dtype),
                jax.ShapeDtypeStruct((B * K, Tq, H // K), jnp.float32),
            ),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            interpret=interpret,
        )(q, k, v, union, offset, starts)

    o, lse = by_overlap(block_indices, H // K, tile, attend, interpret=interpret)
    return o, heads_first(lse, K)


def _forward_kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    union_ref: Any,
    offset_ref: Any,
    starts_ref: Any,
    o_ref: Any,
    lse_ref: Any,
    *,
    problem: Problem,
    num_queries: int,
) -> None:
    Dk, (_, _, K, Dv) = q_ref.shape[-1], v_ref.shape
    key_pieces, value_pieces = head_pieces(Dk), head_pieces(Dv)
    pair = program_pair(K)
    union = union_rows(pair, q_ref.shape, k_ref.shape, num_queries, offset_ref[0], starts_ref, union_ref, problem)
    rows, valid = union.rows, union.valid
    q = load_rows(q_ref, (pair.batch, union.query, rows.head), key_pieces, valid)
    key, inside = block_keys(problem)

    def step(i: Any, carry: Any, *, edge: bool) -> Any:
        m, total, acc = carry
        block, member = union.entry(i)
        key_position = block * problem.select_block + key
        at = (pair.batch, union.places(i, key_position, edge), pair.kv_head)
        s = dot_pieces(q, load_rows(k_ref, at, key_pieces, inside))
        if edge:
            s = jnp.where(key_position[None, :] <= union.position[:, None], s, -jnp.inf)
        if inside is not None:
            s = jnp.where(inside[None, :], s, -jnp.inf)
        if union.start is not None:
            s = jnp.where(key_position[None, :] >= union.start[:, None], s, -jnp.inf)
        p, m, total, decay = softmax_step(s, m, total, problem.scale_log2, problem.interpret, member)
        return m, total, accumulate(acc, p, load_rows(v_ref, at, value_pieces, inside), decay)

    m, total, acc = union.walk(step, softmax_start(rows.query.shape[0], value_pieces))
    o, lse = softmax_finish(m, total, acc, problem.scale)
    store_rows(o_ref, (pair.batch, union.query, rows.head), value_pieces, o, valid)
    plgpu.store(lse_ref.at[pair.index, union.query, rows.group_head], lse, mask=valid)
