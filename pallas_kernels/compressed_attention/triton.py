"""Compressed attention on the Pallas Triton backend: the forward kernel."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.compressed_attention import tiling
from pallas_kernels.compressed_attention.tiling import Tile
from pallas_kernels.contract import Sizes
from pallas_kernels.tiles import exp2
from pallas_kernels.triton.problem import Problem, check_supported, offset_array, problem_of
from pallas_kernels.triton_call import triton_call


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
    (B, Tq, H, Dk), (_, Nc, K, Dv) = q.shape, v.shape
    if 0 in (B, Tq, Nc):
        return jnp.zeros((B, Tq, H, Dv), q.dtype), jnp.full((B, H, Tq), -jnp.inf, jnp.float32)
    problem, starts, offset = problem_of(config, scale, interpret), segment_starts, offset_array(query_offset)
    G = H // K
    tile = tile or tiling.forward_tile(max(Dk, Dv), q.dtype)
    num_tiles = pl.cdiv(Tq * G, tile.rows)
    kernel = functools.partial(_forward_kernel, problem=problem, tile=tile, num_tiles=num_tiles)
    o, lse = triton_call(
        kernel,
        name="compressed_attention_forward",
        grid=(num_tiles, B * K),
        in_specs=[
            pl.BlockSpec((1,), lambda i, y: (0,)),
            None if starts is None else pl.BlockSpec((None, Tq), lambda i, y: (lax.div(y, K), 0)),
            *tiling.specs_qkv(Tq, G, K, Nc, Dk, Dv),
        ],
        out_specs=[
            tiling.query_spec(Tq, K, G, Dv),
            pl.BlockSpec((None, None, G, Tq), lambda i, y: (lax.div(y, K), lax.rem(y, K), 0, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((B, Tq, K, G, Dv), q.dtype),
            jax.ShapeDtypeStruct((B, K, G, Tq), jnp.float32),
        ],
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        interpret=problem.interpret,
    )(offset, starts, q.reshape(B, Tq, K, G, Dk), k, v)
    return o.reshape(B, Tq, H, Dv), lse.reshape(B, H, Tq)


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
    num_queries, group, key_size = q_ref.shape
    num_keys, value_size = v_ref.shape
    key_pieces = tiling.head_pieces(key_size, q_ref.dtype)
    value_pieces = tiling.head_pieces(value_size, v_ref.dtype)
    scale = problem.scale * tiling.LOG2E

    # The longest tiles come last in the sequence and go first, so that the short ones fill the end of the run.
    first_row = (num_tiles - 1 - pl.program_id(0)) * tile.rows
    query, head = tiling.packed_rows(first_row, tile.rows, group)
    valid = query < num_queries
    offset = offset_ref[0]
    q = tiling.load_rows(q_ref, query, head, valid, key_pieces)

    def body(masked: bool) -> Any:
        def step(j: Any, carry: Any) -> Any:
            acc, m, total = carry
            first_key = j * tile.keys
            limit = num_keys if masked else None
            k = tiling.load_keys(k_ref, first_key, tile.keys, limit, key_pieces)
            s = tiling.dot_pieces(q, k)
            if masked:
                key = first_key + lax.broadcasted_iota(jnp.int32, (tile.keys,), 0)
                s = jnp.where(tiling.visible(key, query, offset, starts_ref, problem, num_keys, 0), s, -jnp.inf)
            m_next = jnp.maximum(m, jnp.max(s, axis=1))
            # m is kept unscaled, so that scaling and subtraction are one fused operation per score.
            alpha = exp2((m - m_next) * scale, problem.interpret)
            p = exp2(s * scale - (m_next * scale)[:, None], problem.interpret)
            total = total * alpha + jnp.sum(p, axis=1)
            v = tiling.load_keys(v_ref, first_key, tile.keys, limit, value_pieces)
            p = p.astype(v_ref.dtype)
            acc = tuple(a * alpha[:, None] + tiling.dot(p, piece, (1, 0)) for a, piece in zip(acc, v, strict=True))
            return acc, m_next, total

        return step

    first_query = tiling.positive_div(first_row, group)
    last_query = jnp.minimum(tiling.positive_div(first_row + tile.rows - 1, group), num_queries - 1)
    ranges = tiling.key_ranges(first_query, last_query, offset, starts_ref, problem, num_keys, tile.keys)
    acc = tuple(jnp.zeros((tile.rows, width), jnp.float32) for _, width, _ in value_pieces)
    m = jnp.full((tile.rows,), tiling.FLOOR, jnp.float32)
    total = jnp.zeros((tile.rows,), jnp.float32)
    acc, m, total = tiling.walk(ranges, body, (acc, m, total))

    empty = total == 0.0
    inverse = jnp.where(empty, 0.0, 1.0 / jnp.where(empty, 1.0, total))
    tiling.store_rows(o_ref, query, head, valid, value_pieces, [a * inverse[:, None] for a in acc])
    lse = jnp.where(empty, -jnp.inf, m * problem.scale + jnp.log(jnp.where(empty, 1.0, total)))
    plgpu.store(lse_ref.at[head, query], lse, mask=valid)
