"""Sliding window attention on the Pallas Triton backend: the forward kernel.

The heads of a group are packed into the rows of a tile: 128 rows are then few queries, whose windows differ by few
keys, so that little of a tile's work falls outside the band.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.contract import Sizes
from pallas_kernels.tiles import find_tile, key_of
from pallas_kernels.triton.heads import accumulate, dot_pieces, head_pieces
from pallas_kernels.triton.integers import next_power_of_two
from pallas_kernels.triton.launch import launch
from pallas_kernels.triton.problem import Problem, check_supported, heads_first, offset_array, problem_of
from pallas_kernels.triton.rows import load_rows, program_pair, store_rows
from pallas_kernels.triton.softmax import softmax_finish, softmax_start, softmax_step
from pallas_kernels.triton.tiles import Tile
from pallas_kernels.window_attention import tiles
from pallas_kernels.window_attention.band import band_of, key_positions, visible


def forward(
    q: Float[Array, "B Tq H Dk"],
    k: Float[Array, "B T K Dk"],
    v: Float[Array, "B T K Dv"],
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
    (B, Tq, H, _), (_, _, K, Dv) = q.shape, v.shape
    tile = tile or find_tile(tiles.FORWARD, key_of(q, k, v))
    padded_group = next_power_of_two(H // K)
    num_rows = max(tile.rows, padded_group)
    problem = problem_of(config, scale, interpret)
    o, lse = launch(
        functools.partial(_forward_kernel, problem=problem, tile=tile, num_rows=num_rows, padded_group=padded_group),
        name="window_attention_forward",
        grid=(pl.cdiv(Tq, num_rows // padded_group), B * K),
        out_shape=(
            jax.ShapeDtypeStruct((B, Tq, H, Dv), q.dtype),
            jax.ShapeDtypeStruct((B * K, Tq, H // K), jnp.float32),
        ),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        interpret=interpret,
    )(q, k, v, offset_array(query_offset), segment_starts)
    return o, heads_first(lse, K)


def _forward_kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    offset_ref: Any,
    starts_ref: Any,
    o_ref: Any,
    lse_ref: Any,
    *,
    problem: Problem,
    tile: Tile,
    num_rows: int,
    padded_group: int,
) -> None:
    Dk, (_, _, K, Dv) = q_ref.shape[-1], v_ref.shape
    key_pieces, value_pieces = head_pieces(Dk, tile.widest), head_pieces(Dv, tile.widest)
    pair = program_pair(K)
    band = band_of(
        pair, q_ref.shape, k_ref.shape, num_rows, tile.keys, padded_group, offset_ref[0], starts_ref, problem
    )
    at = (pair.batch, band.query, band.rows.head)
    q = load_rows(q_ref, at, key_pieces, band.valid)

    def step(i: Any, carry: Any, edge: bool) -> Any:
        m, total, acc = carry
        key = key_positions(band, i, tile.keys)
        key_at = (pair.batch, band.places(key, edge), pair.kv_head)
        s = dot_pieces(q, load_rows(k_ref, key_at, key_pieces))
        mask = visible(band, key, edge, starts_ref is not None)
        if mask is not None:
            s = jnp.where(mask, s, -jnp.inf)
        p, m, total, decay = softmax_step(s, m, total, problem.scale_log2, problem.interpret)
        return m, total, accumulate(acc, p, load_rows(v_ref, key_at, value_pieces), decay)

    m, total, acc = band.walk(step, softmax_start(num_rows, value_pieces))
    o, lse = softmax_finish(m, total, acc, problem.scale)
    store_rows(o_ref, at, value_pieces, o, band.valid)
    plgpu.store(lse_ref.at[pair.index, band.query, band.rows.group_head], lse, mask=band.valid)
