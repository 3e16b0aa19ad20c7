"""Backward pass of sliding window attention: dq query-major, dk and dv key-major. No two programs write one place."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.contract import Gradients, Sizes
from pallas_kernels.tiles import (
    LOG2_E,
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
from pallas_kernels.triton.problem import check_supported, group_last, heads_first, offset_array


@dataclasses.dataclass(frozen=True)
class BackwardTile:
    """One program's work: `num_rows` rows (query x head) against `num_keys` keys, of which dq or dk and dv stay."""

    num_rows: int
    num_keys: int
    num_warps: int
    num_stages: int


def dq_tile(head_dim: int, itemsize: int) -> BackwardTile:
    """The tile of dq for the larger head size `head_dim` and elements of `itemsize` bytes."""
    if itemsize == 4:
        return BackwardTile(32, 32, 4, 1)
    if head_dim > 128:
        return BackwardTile(128, 64, 8, 2)
    return BackwardTile(64, 64, 4, 2)  # H100, G = 16, D = 128, 64k: 5.1 ms, with 128 rows and 8 warps 5.7.


def dkv_tile(head_dim: int, itemsize: int) -> BackwardTile:
    """The tile of dk and dv, by the same."""
    if itemsize == 4:
        return BackwardTile(32, 32, 4, 1)
    if head_dim > 128:
        return BackwardTile(64, 64, 8, 2)
    return BackwardTile(64, 64, 4, 2)  # H100, G = 16, D = 128, 64k: 6.8 ms, with 8 warps 11.9.


def key_band(first_position, num_queries: int, segment, T: int, *, window: int, num_keys: int):
    """Which keys a tile of adjacent queries reads: (first, tiles, inner, outer).

    It reads `tiles` tiles of `num_keys` keys from position `first` on. Tiles `inner` to `outer` - 1 lie inside every
    query's window and need no mask. `segment` is the first token of the first query's segment.
    """
    first = jnp.maximum(jnp.maximum(first_position - window + 1, 0), segment)
    last_position = first_position + num_queries - 1
    tiles = jnp.maximum(pl.cdiv(jnp.minimum(last_position + 1, T) - first, num_keys), 0)
    inner = jnp.clip(pl.cdiv(jnp.maximum(last_position - window + 1 - first, 0), num_keys), 0, tiles)
    outer = jnp.clip(lax.div(jnp.maximum(first_position + 1 - first, 0), jnp.int32(num_keys)), inner, tiles)
    return first, tiles, inner, outer


def _dq_kernel(
    q_ref,
    k_ref,
    v_ref,
    o_ref,
    do_ref,
    lse_ref,
    offset_ref,
    starts_ref,
    gate_ref,
    dq_before_ref,
    dq_ref,
    delta_ref,
    *,
    num_rows: int,
    num_keys: int,
    padded_group: int,
    window: int,
    scale: float,
    interpret: bool,
):
    tile, bk = pl.program_id(0), pl.program_id(1)
    (_, Tq, H, Dk), (_, T, K, Dv) = q_ref.shape, v_ref.shape
    G, num_queries = H // K, num_rows // padded_group
    b, kv_head = lax.div(bk, jnp.int32(K)), lax.rem(bk, jnp.int32(K))
    row = jnp.arange(num_rows, dtype=jnp.int32)
    t = tile * num_queries + lax.div(row, jnp.int32(padded_group))
    g = lax.rem(row, jnp.int32(padded_group))
    valid = (t < Tq) & (g < G)
    head, group_row = jnp.where(g < G, kv_head * G + g, H), jnp.where(g < G, g, G)
    position = offset_ref[0] + t
    lowest = jnp.maximum(position - window + 1, 0)
    segment = jnp.int32(0)
    if starts_ref is not None:
        lowest = jnp.maximum(lowest, plgpu.load(starts_ref.at[b, t], mask=t < Tq, other=0))
        segment = starts_ref[b, tile * num_queries]
    first, tiles, inner, outer = key_band(
        offset_ref[0] + tile * num_queries, num_queries, segment, T, window=window, num_keys=num_keys
    )
    q = load_rows(q_ref, (b,), t, head, Dk, valid)
    do = load_rows(do_ref, (b,), t, head, Dv, valid)
    o = load_rows(o_ref, (b,), t, head, Dv, valid)
    delta = row_products(o, do)
    plgpu.store(delta_ref.at[bk, t, group_row], delta, mask=valid)
    lse = base2_lse(plgpu.load(lse_ref.at[bk, t, group_row], mask=valid, other=-jnp.inf))
    key = jnp.arange(num_keys, dtype=jnp.int32)

    def step(i, dq, *, edge):
        key_position = first + i * num_keys + key
        in_bounds = key_position < T if edge else None
        k = load_rows(k_ref, (b,), key_position, kv_head, Dk, in_bounds)
        v = load_rows(v_ref, (b,), key_position, kv_head, Dv, in_bounds)
        p = exp2(dot_pieces(q, k) * (scale * LOG2_E) - lse[:, None], interpret)
        if edge:
            p = jnp.where(key_position[None, :] <= position[:, None], p, 0)
        if edge or starts_ref is not None:
            p = jnp.where(key_position[None, :] >= lowest[:, None], p, 0)
        return accumulate(dq, p * (dot_pieces(do, v) - delta[:, None]), k)

    edge, middle = functools.partial(step, edge=True), functools.partial(step, edge=False)
    dq = lax.fori_loop(0, inner, edge, zeros(num_rows, Dk))
    dq = lax.fori_loop(inner, outer, middle, dq)
    dq = lax.fori_loop(outer, tiles, edge, dq)
    dq = finish_query_gradient(dq, scale, gate_ref, dq_before_ref, b, t, head, valid)
    store_rows(dq_ref, (b,), t, head, Dk, dq, valid)


def _dkv_kernel(
    q_ref,
    k_ref,
    v_ref,
    do_ref,
    lse_ref,
    delta_ref,
    offset_ref,
    starts_ref,
    gate_ref,
    dk_ref,
    dv_ref,
    *,
    num_rows: int,
    num_keys: int,
    padded_group: int,
    window: int,
    scale: float,
    interpret: bool,
):
    tile, bk = pl.program_id(0), pl.program_id(1)
    (_, Tq, H, Dk), (_, T, K, Dv) = q_ref.shape, v_ref.shape
    G, num_queries = H // K, num_rows // padded_group
    b, kv_head = lax.div(bk, jnp.int32(K)), lax.rem(bk, jnp.int32(K))
    row = jnp.arange(num_rows, dtype=jnp.int32)
    query, g = lax.div(row, jnp.int32(padded_group)), lax.rem(row, jnp.int32(padded_group))
    head, group_row = jnp.where(g < G, kv_head * G + g, H), jnp.where(g < G, g, G)
    first_key = tile * num_keys
    key_position = first_key + jnp.arange(num_keys, dtype=jnp.int32)
    in_bounds = key_position < T
    k = load_rows(k_ref, (b,), key_position, kv_head, Dk, in_bounds)
    v = load_rows(v_ref, (b,), key_position, kv_head, Dv, in_bounds)

    # Queries from the first key's position to the last that sees the last key, as rows of q. Steps `inner` to
    # `outer` - 1 hold only queries that see every key of the tile, segments aside.
    offset = offset_ref[0]
    begin = jnp.clip(first_key - offset, 0, Tq)
    end = jnp.clip(first_key + num_keys - 1 + window - offset, begin, Tq)
    steps = pl.cdiv(end - begin, num_queries)
    inner = jnp.clip(pl.cdiv(jnp.maximum(first_key + num_keys - 1 - offset - begin, 0), num_queries), 0, steps)
    outer = jnp.clip(lax.div(jnp.maximum(first_key + window - offset - begin, 0), jnp.int32(num_queries)), inner, steps)

    def step(i, carry, *, edge):
        dk, dv = carry
        t = begin + i * num_queries + query
        valid = (t < end) & (g < G)
        q = load_rows(q_ref, (b,), t, head, Dk, valid)
        do = load_rows(do_ref, (b,), t, head, Dv, valid)
        lse = base2_lse(plgpu.load(lse_ref.at[bk, t, group_row], mask=valid, other=-jnp.inf))
        delta = plgpu.load(delta_ref.at[bk, t, group_row], mask=valid, other=0)
        p = exp2(dot_pieces(k, q) * (scale * LOG2_E) - lse[None, :], interpret)
        if gate_ref is not None:
            p *= plgpu.load(gate_ref.at[b, t, head], mask=valid, other=0)[None, :]
        if edge:
            position = (offset + t)[None, :]
            p = jnp.where(key_position[:, None] <= position, p, 0)
            p = jnp.where(key_position[:, None] > position - window, p, 0)
        if starts_ref is not None:
            start = plgpu.load(starts_ref.at[b, t], mask=t < end, other=0)
            p = jnp.where(key_position[:, None] >= start[None, :], p, 0)
        dv = accumulate(dv, p, do)
        return accumulate(dk, p * (dot_pieces(v, do) - delta[None, :]), q), dv

    edge, middle = functools.partial(step, edge=True), functools.partial(step, edge=False)
    carry = lax.fori_loop(0, inner, edge, (zeros(num_keys, Dk), zeros(num_keys, Dv)))
    carry = lax.fori_loop(inner, outer, middle, carry)
    dk, dv = lax.fori_loop(outer, steps, edge, carry)
    key_row = jnp.where(in_bounds, key_position, T)
    store_rows(dk_ref, (b,), key_row, kv_head, Dk, tuple(piece * scale for piece in dk), in_bounds)
    store_rows(dv_ref, (b,), key_row, kv_head, Dv, dv, in_bounds)


def _sizes(q, k, v) -> tuple[int, int]:
    return max(q.shape[-1], v.shape[-1]), q.dtype.itemsize


def query_gradient(q, k, v, o, do, lse, starts, offset, gate=None, dq=None, *, window, scale, interpret, tile=None):
    """dq, and delta = sum(o * do) [B * K, Tq, G] for the other kernel."""
    tile = tile or dq_tile(*_sizes(q, k, v))
    (B, Tq, H, _), K = q.shape, k.shape[2]
    padded_group = next_power_of_two(H // K)
    num_rows = max(tile.num_rows, padded_group)
    kernel = functools.partial(
        _dq_kernel,
        num_rows=num_rows,
        num_keys=tile.num_keys,
        padded_group=padded_group,
        window=window,
        scale=scale,
        interpret=interpret,
    )
    return launch(
        kernel,
        out_shape=(jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct(lse.shape, jnp.float32)),
        grid=(pl.cdiv(Tq, num_rows // padded_group), B * K),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        interpret=interpret,
        name="window_attention_dq",
    )(q, k, v, o, do, lse, offset, starts, gate, dq)


def key_gradients(q, k, v, do, lse, delta, starts, offset, gate=None, *, window, scale, interpret, tile=None):
    """dk and dv."""
    tile = tile or dkv_tile(*_sizes(q, k, v))
    (_, _, H, _), (B, T, K, _) = q.shape, v.shape
    padded_group = next_power_of_two(H // K)
    kernel = functools.partial(
        _dkv_kernel,
        num_rows=max(tile.num_rows, padded_group),
        num_keys=tile.num_keys,
        padded_group=padded_group,
        window=window,
        scale=scale,
        interpret=interpret,
    )
    return launch(
        kernel,
        out_shape=(jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)),
        grid=(pl.cdiv(T, tile.num_keys), B * K),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        interpret=interpret,
        name="window_attention_dkv",
    )(q, k, v, do, lse, delta, offset, starts, gate)


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
    gate: Float[Array, "B Tq H"] | None = None,
    dq: Float[Array, "B Tq H Dk"] | None = None,
    interpret: bool = False,
    query_tile: BackwardTile | None = None,
    key_tile: BackwardTile | None = None,
) -> Gradients:
    """(dq, dk, dv, delta) of gate * o; see the contract. Tiles override the table, for tests and tuning.

    Raises:
      NotImplementedError: a dtype, head size, group size or scale that the kernels do not support.
    """
    check_supported(q, k, v, scale=scale)
    starts, offset = segment_starts, offset_array(query_offset)
    options = dict(window=config.window, scale=float(scale), interpret=interpret)
    lse = group_last(lse, k.shape[2])
    dq, delta = query_gradient(q, k, v, o, do, lse, starts, offset, gate, dq, tile=query_tile, **options)
    dk, dv = key_gradients(q, k, v, do, lse, delta, starts, offset, gate, tile=key_tile, **options)
    return Gradients(dq, dk, dv, heads_first(delta, k.shape[2]))
