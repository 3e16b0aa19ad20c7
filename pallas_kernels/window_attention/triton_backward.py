"""Backward pass of sliding window attention: dq query-major, dk and dv key-major. No two programs write one entry."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.contract import Gradients, Sizes
from pallas_kernels.tiles import find_tile, key_of
from pallas_kernels.triton.heads import accumulate, dot_pieces, head_pieces, scaled, zeros
from pallas_kernels.triton.integers import cdiv, div, iota, loop, next_power_of_two
from pallas_kernels.triton.launch import launch
from pallas_kernels.triton.problem import Problem, check_supported, group_last, heads_first, offset_array, problem_of
from pallas_kernels.triton.rows import load_rows, load_starts, packed_rows, program_pair, store_rows, where_all
from pallas_kernels.triton.softmax import exp2, finish_query_gradient, load_delta, load_lse_log2
from pallas_kernels.triton.tiles import Tile
from pallas_kernels.window_attention import tiles
from pallas_kernels.window_attention.band import band_of, key_positions, visible


def backward(
    q: Float[Array, "B Tq H Dk"],
    k: Float[Array, "B T K Dk"],
    v: Float[Array, "B T K Dv"],
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
    query_tile: Tile | None = None,
    key_tile: Tile | None = None,
) -> Gradients:
    """(dq, dk, dv, delta) of gate * o and of lse; see the contract. Tiles override the table, for tests and tuning.

    Raises:
      NotImplementedError: a dtype, head size, group size or scale that the kernels do not support.
    """
    check_supported(q, k, v, scale=scale)
    (B, Tq, H, _), (_, T, K, _) = q.shape, k.shape
    query_tile = query_tile or find_tile(tiles.QUERY_GRADIENT, key_of(q, k, v))
    key_tile = key_tile or find_tile(tiles.KEY_GRADIENT, key_of(q, k, v))
    offset, starts = offset_array(query_offset), segment_starts
    lse, dlse = group_last(lse, K), None if dlse is None else group_last(dlse, K)
    padded_group = next_power_of_two(H // K)
    options: dict[str, Any] = dict(problem=problem_of(config, scale, interpret), padded_group=padded_group)

    num_rows = max(query_tile.rows, padded_group)
    dq, delta = launch(
        functools.partial(_query_gradient_kernel, tile=query_tile, num_rows=num_rows, **options),
        name="window_attention_query_gradient",
        grid=(pl.cdiv(Tq, num_rows // padded_group), B * K),
        out_shape=(jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct(lse.shape, jnp.float32)),
        num_warps=query_tile.num_warps,
        num_stages=query_tile.num_stages,
        interpret=interpret,
    )(q, k, v, o, do, lse, dlse, offset, starts, gate, dq)
    dk, dv = launch(
        functools.partial(_key_gradient_kernel, tile=key_tile, num_rows=max(key_tile.rows, padded_group), **options),
        name="window_attention_key_gradient",
        grid=(pl.cdiv(T, key_tile.keys), B * K),
        out_shape=(jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)),
        num_warps=key_tile.num_warps,
        num_stages=key_tile.num_stages,
        interpret=interpret,
    )(q, k, v, do, lse, delta, offset, starts, gate)
    return Gradients(dq, dk, dv, heads_first(delta, K))


def _query_gradient_kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    o_ref: Any,
    do_ref: Any,
    lse_ref: Any,
    dlse_ref: Any,
    offset_ref: Any,
    starts_ref: Any,
    gate_ref: Any,
    dq_before_ref: Any,
    dq_ref: Any,
    delta_ref: Any,
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
    statistic_at = (pair.index, band.query, band.rows.group_head)
    q = load_rows(q_ref, at, key_pieces, band.valid)
    do = load_rows(do_ref, at, value_pieces, band.valid)
    o = load_rows(o_ref, at, value_pieces, band.valid)
    lse_log2 = load_lse_log2(lse_ref, statistic_at, band.valid)
    delta = load_delta(o, do, lse_log2, dlse_ref, statistic_at, band.valid)
    plgpu.store(delta_ref.at[statistic_at], delta, mask=band.valid)

    def step(i: Any, dq: Any, edge: bool) -> Any:
        key = key_positions(band, i, tile.keys)
        key_at = (pair.batch, band.places(key, edge), pair.kv_head)
        k = load_rows(k_ref, key_at, key_pieces)
        v = load_rows(v_ref, key_at, value_pieces)
        p = exp2(dot_pieces(q, k) * problem.scale_log2 - lse_log2[:, None], problem.interpret)
        mask = visible(band, key, edge, starts_ref is not None)
        if mask is not None:
            p = jnp.where(mask, p, 0)
        return accumulate(dq, p * (dot_pieces(do, v) - delta[:, None]), k)

    dq = band.walk(step, zeros(num_rows, key_pieces))
    dq = finish_query_gradient(
        dq, problem.scale, gate_ref, dq_before_ref, pair.batch, band.query, band.rows, key_pieces, band.valid
    )
    store_rows(dq_ref, at, key_pieces, dq, band.valid)


def _key_gradient_kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    do_ref: Any,
    lse_ref: Any,
    delta_ref: Any,
    offset_ref: Any,
    starts_ref: Any,
    gate_ref: Any,
    dk_ref: Any,
    dv_ref: Any,
    *,
    problem: Problem,
    tile: Tile,
    num_rows: int,
    padded_group: int,
) -> None:
    (_, Tq, H, Dk), (_, T, K, Dv) = q_ref.shape, v_ref.shape
    key_pieces, value_pieces = head_pieces(Dk, tile.widest), head_pieces(Dv, tile.widest)
    window, num_queries = problem.window, num_rows // padded_group
    pair = program_pair(K)
    rows = packed_rows(0, num_rows, padded_group, pair, H, K)
    first_key = pl.program_id(0) * tile.keys
    last_key = first_key + tile.keys - 1
    key = first_key + iota(tile.keys)
    offset = offset_ref[0]
    # Zeros in the stead of keys that no query of the call sees: their scores and products are finite.
    seen = (key > offset - window) & (key < jnp.minimum(offset + Tq, T))
    if starts_ref is not None:
        seen &= key >= starts_ref[pair.batch, 0]
    k = load_rows(k_ref, (pair.batch, key, pair.kv_head), key_pieces, seen)
    v = load_rows(v_ref, (pair.batch, key, pair.kv_head), value_pieces, seen)

    # Queries from the first key's position to the last that sees the last key, as rows of q. Steps `inner` to
    # `outer` - 1 hold only queries that see every key of the tile, segments aside.
    begin = jnp.clip(first_key - offset, 0, Tq)
    end = jnp.clip(last_key + window - offset, begin, Tq)
    steps = cdiv(end - begin, num_queries)
    inner = jnp.clip(cdiv(jnp.maximum(last_key - offset - begin, 0), num_queries), 0, steps)
    outer = jnp.clip(div(jnp.maximum(first_key + window - offset - begin, 0), num_queries), inner, steps)

    def step(i: Any, carry: Any, *, edge: bool) -> Any:
        dk, dv = carry
        query = begin + i * num_queries + rows.query
        valid = rows.valid(query < end)
        at, statistic_at = (pair.batch, query, rows.head), (pair.index, query, rows.group_head)
        q = load_rows(q_ref, at, key_pieces, valid)
        do = load_rows(do_ref, at, value_pieces, valid)
        lse_log2 = load_lse_log2(lse_ref, statistic_at, valid)
        delta = plgpu.load(delta_ref.at[statistic_at], mask=valid, other=0)
        p = exp2(dot_pieces(k, q) * problem.scale_log2 - lse_log2[None, :], problem.interpret)
        if gate_ref is not None:
            p *= plgpu.load(gate_ref.at[at], mask=valid, other=0)[None, :]
        if edge:
            position = (offset + query)[None, :]
            p = where_all([key[:, None] <= position, key[:, None] > position - window], p)
        if starts_ref is not None:
            start = load_starts(starts_ref, pair.batch, query, valid)
            p = jnp.where(key[:, None] >= start[None, :], p, 0)
        dv = accumulate(dv, p, do)
        return accumulate(dk, p * (dot_pieces(v, do) - delta[None, :]), q), dv

    edge, middle = functools.partial(step, edge=True), functools.partial(step, edge=False)
    carry = loop(0, inner, edge, (zeros(tile.keys, key_pieces), zeros(tile.keys, value_pieces)))
    dk, dv = loop(outer, steps, edge, loop(inner, outer, middle, carry))
    key_at = (pair.batch, jnp.where(key < T, key, T), pair.kv_head)
    store_rows(dk_ref, key_at, key_pieces, scaled(dk, problem.scale), key < T)
    store_rows(dv_ref, key_at, value_pieces, dv, key < T)
