"""Compressed attention on the Pallas Triton backend: the forward kernel and the differentiable op."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.compressed_attention import tiling
from pallas_kernels.compressed_attention.tiling import Problem, Tile
from pallas_kernels.compressed_attention.triton_backward import backward
from pallas_kernels.residuals import named
from pallas_kernels.tiles import exp2
from pallas_kernels.triton_call import triton_call


def compressed_attention(
    q: Float[Array, "B Tq H Dk"],
    k: Float[Array, "B Nc K Dk"],
    v: Float[Array, "B Nc K Dv"],
    starts: Int[Array, "B Tq"] | None,
    query_offset: int | Int[Array, ""],
    *,
    compress_block: int,
    compress_stride: int,
    scale: float,
    interpret: bool = False,
) -> tuple[Float[Array, "B Tq H Dv"], Float[Array, "B H Tq"]]:
    """Attention of every query over the compressed tokens it may see (arXiv 2502.11089, equations 5 and 7).

    Args:
      q: queries, bfloat16, float16 or float32; row r is position `query_offset + r`.
      k: compressed keys of q's dtype; token i stands for positions [i d, i d + l).
      v: compressed values of q's dtype.
      starts: int32, the position of the first token of each query's segment, never decreasing along Tq; None means 0.
      query_offset: position of the first query, an int or an int32 scalar.
      compress_block: l, tokens per compressed token.
      compress_stride: d, tokens between neighbouring compressed tokens.
      scale: factor of the scores, positive.
      interpret: run the kernels in Pallas' interpreter.

    Returns:
      o of q's dtype, and lse in float32 (natural logarithm). Queries that see nothing have o = 0 and lse = -inf.

    Raises:
      NotImplementedError: a dtype, head size, group size or scale that the kernels do not support.
    """
    tiling.check_supported(q, {"k": k, "v": v}, scale)
    B, Tq, H, _ = q.shape
    if 0 in (B, Tq, k.shape[1]):
        return jnp.zeros((B, Tq, H, v.shape[3]), q.dtype), jnp.full((B, H, Tq), -jnp.inf, jnp.float32)
    problem = Problem(compress_block, compress_stride, float(scale), interpret)
    offset = jnp.asarray(query_offset, jnp.int32).reshape(1)
    return _attend(q, k, v, starts, offset, problem)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(
    q: jax.Array, k: jax.Array, v: jax.Array, starts: jax.Array | None, offset: jax.Array, problem: Problem
) -> tuple[jax.Array, jax.Array]:
    return forward(q, k, v, starts, offset, problem)


def _attend_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, starts: jax.Array | None, offset: jax.Array, problem: Problem
) -> tuple[tuple[jax.Array, jax.Array], Any]:
    o, lse = named(forward(q, k, v, starts, offset, problem))
    return (o, lse), (q, k, v, starts, offset, o, lse)


def _attend_backward(problem: Problem, residuals: Any, cotangents: Any) -> tuple[Any, ...]:
    q, k, v, starts, offset, o, lse = residuals
    do, dlse = cotangents
    dq, dk, dv, _ = backward(q, k, v, o, do, lse, dlse, starts, offset, problem)
    return dq, dk, dv, None, None


_attend.defvjp(_attend_forward, _attend_backward)


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    starts: jax.Array | None,
    offset: jax.Array,
    problem: Problem,
    tile: Tile | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Runs the forward kernel; `tile` overrides the table, for measurements."""
    B, Tq, H, Dk = q.shape
    _, Nc, K, Dv = v.shape
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
