"""Compressed attention on the Pallas Triton backend: the forward kernel."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.compressed_attention import tiles
from pallas_kernels.compressed_attention.visibility import Visibility, walk
from pallas_kernels.contract import Sizes, sees_nothing
from pallas_kernels.tiles import find_tile, key_of
from pallas_kernels.triton.heads import accumulate, dot_pieces, head_pieces
from pallas_kernels.triton.integers import div, iota
from pallas_kernels.triton.launch import launch
from pallas_kernels.triton.problem import Problem, check_supported, offset_array, problem_of
from pallas_kernels.triton.rows import Pair, Rows, load_rows, packed_rows, program_pair, store_rows
from pallas_kernels.triton.softmax import softmax_finish, softmax_start, softmax_step
from pallas_kernels.triton.tiles import Tile


def forward(
    q: Float[Array, "B Tq H Dk"],
    k: Float[Array, "B Nc K Dk"],
    v: Float[Array, "B Nc K Dv"],
    segment_starts: Int[Array, "B Tq"] | None,
    query_offset: int | Int[Array, ""],
    *,
    config: Sizes,
    scale: float,
    interpret: bool = False,
    tile: Tile | None = None,
) -> tuple[Float[Array, "B Tq H Dv"], Float[Array, "B H Tq"]]:
    """(o, lse); see the contract. `tile` overrides the table, for tests and tuning.

    Raises:
      NotImplementedError: a dtype, head size, group size or scale that the kernels do not support.
    """
    check_supported(q, k, v, scale=scale)
    (B, Tq, H, _), (_, Nc, K, Dv) = q.shape, v.shape
    if 0 in (B, Tq, Nc):
        return sees_nothing(q, v)
    tile = tile or find_tile(tiles.FORWARD, key_of(q, k, v))
    num_tiles = pl.cdiv(Tq * (H // K), tile.rows)
    return launch(
        functools.partial(
            _forward_kernel, problem=problem_of(config, scale, interpret), tile=tile, num_tiles=num_tiles
        ),
        name="compressed_attention_forward",
        grid=(num_tiles, B * K),
        out_shape=(jax.ShapeDtypeStruct((B, Tq, H, Dv), q.dtype), jax.ShapeDtypeStruct((B, H, Tq), jnp.float32)),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        interpret=interpret,
    )(offset_array(query_offset), segment_starts, q, k, v)


def query_major_rows(
    pair: Pair, tile: Tile, num_tiles: int, shape: tuple[int, ...], K: int
) -> tuple[Any, Rows, tuple[Any, Any]]:
    """(first row, rows, (first query, last query)) of this program's tile of q [B, Tq, H, Dk].

    The longest tiles come last in the sequence and go first, so that the short ones fill the end of the run.
    """
    _, Tq, H, _ = shape
    first_row = (num_tiles - 1 - pl.program_id(0)) * tile.rows
    rows = packed_rows(first_row, tile.rows, H // K, pair, H, K)
    last_query = jnp.minimum(div(first_row + tile.rows - 1, H // K), Tq - 1)
    return first_row, rows, (div(first_row, H // K), last_query)


def _forward_kernel(
    offset_ref: Any,
    starts_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    o_ref: Any,
    lse_ref: Any,
    *,
    problem: Problem,
    tile: Tile,
    num_tiles: int,
) -> None:
    (_, Tq, _, Dk), (_, Nc, K, Dv) = q_ref.shape, v_ref.shape
    key_pieces, value_pieces = head_pieces(Dk, tile.widest), head_pieces(Dv, tile.widest)
    pair = program_pair(K)
    _, rows, ends = query_major_rows(pair, tile, num_tiles, q_ref.shape, K)
    valid = rows.query < Tq
    sight = Visibility(problem, Nc, pair.batch, offset_ref[0], starts_ref)
    q = load_rows(q_ref, (pair.batch, rows.query, rows.head), key_pieces, valid)

    def step(i: Any, carry: Any, edge: bool) -> Any:
        m, total, acc = carry
        key = i * tile.keys + iota(tile.keys)
        place, read = sight.places(key, ends) if edge else (key, None)
        at = (pair.batch, place, pair.kv_head)
        s = dot_pieces(q, load_rows(k_ref, at, key_pieces, read))
        if edge:
            s = jnp.where(sight.mask(key, rows.query, 0), s, -jnp.inf)
        p, m, total, decay = softmax_step(s, m, total, problem.scale_log2, problem.interpret)
        return m, total, accumulate(acc, p, load_rows(v_ref, at, value_pieces, read), decay)

    m, total, acc = walk(sight.key_ranges(ends, tile.keys), step, softmax_start(tile.rows, value_pieces))
    o, lse = softmax_finish(m, total, acc, problem.scale)
    store_rows(o_ref, (pair.batch, rows.query, rows.head), value_pieces, o, valid)
    plgpu.store(lse_ref.at[pair.batch, rows.head, rows.query], lse, mask=valid)
