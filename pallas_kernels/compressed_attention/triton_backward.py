"""Backward of compressed attention: dq query-major, dk and dv key-major, all partial sums in a fixed order.

With p = exp(s - lse), delta = rowsum(do * o) - dlse and dp = do v^T, ds = p (dp - delta). Where the output is gate * o,
every term is gate times that, and delta is the gate's own gradient. The dq kernel also leaves lse (base 2) and delta as
float32 [B K, Tq G], in the order of packed rows, which the dk/dv kernel reads as it walks.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.compressed_attention import tiles
from pallas_kernels.compressed_attention.triton import query_major_rows
from pallas_kernels.compressed_attention.visibility import Visibility, walk
from pallas_kernels.contract import Gradients, Sizes, gradients_of_nothing
from pallas_kernels.tiles import find_tile, key_of
from pallas_kernels.triton.heads import accumulate, dot_pieces, head_pieces, scaled, zeros
from pallas_kernels.triton.integers import cdiv, div, iota, loop, rem
from pallas_kernels.triton.launch import launch
from pallas_kernels.triton.problem import Problem, check_supported, offset_array, problem_of
from pallas_kernels.triton.rows import load_rows, packed_rows, program_pair, store_rows
from pallas_kernels.triton.softmax import NEVER, exp2, finish_query_gradient, load_delta, load_lse_log2
from pallas_kernels.triton.tiles import Tile

# A key tile's queries are cut into chunks until there is about this much work to spread: enough programs to fill any
# GPU several times over, few enough that the float32 partial sums stay far below the size of q.
_WORK_ITEMS = 4096
_LEAST_CHUNK = 256
_SUM_KEYS, _SUM_WIDTH = 32, 64  # of the float32 partial sums that a program adds at a time


def backward(
    q: Float[Array, "B Tq H Dk"],
    k: Float[Array, "B Nc K Dk"],
    v: Float[Array, "B Nc K Dv"],
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
    (B, Tq, H, _), (_, Nc, K, _) = q.shape, k.shape
    if 0 in (B, Tq, Nc):
        return gradients_of_nothing(q, k, v, dq)
    problem, key = problem_of(config, scale, interpret), key_of(q, k, v)
    query_tile = query_tile or find_tile(tiles.QUERY_GRADIENT, key)
    key_tile = key_tile or find_tile(tiles.KEY_GRADIENT, key)
    positions = (offset_array(query_offset), segment_starts)
    dq, lse_log2, delta = _query_gradient(positions, q, k, v, o, lse, do, dlse, gate, dq, problem, query_tile)
    dk, dv = _key_gradients(positions, q, k, v, do, lse_log2, delta, gate, problem, key_tile)
    delta = delta.reshape(B, K, Tq, H // K).swapaxes(2, 3).reshape(B, H, Tq)
    return Gradients(dq, dk, dv, delta)


def _query_gradient(
    positions: Any,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    o: jax.Array,
    lse: jax.Array,
    do: jax.Array,
    dlse: jax.Array | None,
    gate: jax.Array | None,
    dq_before: jax.Array | None,
    problem: Problem,
    tile: Tile,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dq, and lse in base 2 and delta in packed row order."""
    (B, Tq, H, _), K = q.shape, k.shape[2]
    num_tiles = pl.cdiv(Tq * (H // K), tile.rows)
    statistic = jax.ShapeDtypeStruct((B * K, Tq * (H // K)), jnp.float32)
    return launch(
        functools.partial(_query_gradient_kernel, problem=problem, tile=tile, num_tiles=num_tiles),
        name="compressed_attention_query_gradient",
        grid=(num_tiles, B * K),
        out_shape=(jax.ShapeDtypeStruct(q.shape, q.dtype), statistic, statistic),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        interpret=problem.interpret,
    )(*positions, q, k, v, o, lse, do, dlse, gate, dq_before)


def _query_gradient_kernel(
    offset_ref: Any,
    starts_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    o_ref: Any,
    lse_ref: Any,
    do_ref: Any,
    dlse_ref: Any,
    gate_ref: Any,
    dq_before_ref: Any,
    dq_ref: Any,
    lse_log2_ref: Any,
    delta_ref: Any,
    *,
    problem: Problem,
    tile: Tile,
    num_tiles: int,
) -> None:
    (_, Tq, _, Dk), (_, Nc, K, Dv) = q_ref.shape, v_ref.shape
    key_pieces, value_pieces = head_pieces(Dk, tile.widest), head_pieces(Dv, tile.widest)
    pair = program_pair(K)
    first_row, rows, ends = query_major_rows(pair, tile, num_tiles, q_ref.shape, K)
    valid = rows.query < Tq
    sight = Visibility(problem, Nc, pair.batch, offset_ref[0], starts_ref)
    at = (pair.batch, rows.query, rows.head)
    q = load_rows(q_ref, at, key_pieces, valid)
    do = load_rows(do_ref, at, value_pieces, valid)
    o = load_rows(o_ref, at, value_pieces, valid)
    statistic_at = (pair.batch, rows.head, rows.query)
    lse_log2 = load_lse_log2(lse_ref, statistic_at, valid)
    delta = load_delta(o, do, lse_log2, dlse_ref, statistic_at, valid)
    row = first_row + iota(tile.rows)
    plgpu.store(lse_log2_ref.at[pair.index, row], lse_log2, mask=valid)
    plgpu.store(delta_ref.at[pair.index, row], delta, mask=valid)

    def step(i: Any, dq: Any, edge: bool) -> Any:
        key = i * tile.keys + iota(tile.keys)
        place, read = sight.places(key, ends) if edge else (key, None)
        at = (pair.batch, place, pair.kv_head)
        k = load_rows(k_ref, at, key_pieces, read)
        p = exp2(dot_pieces(q, k) * problem.scale_log2 - lse_log2[:, None], problem.interpret)
        v = load_rows(v_ref, at, value_pieces, read)
        seen = sight.mask(key, rows.query, 0) if edge else None
        if seen is not None:
            p = jnp.where(seen, p, 0.0)
        ds = p * (dot_pieces(do, v) - delta[:, None])
        if seen is not None and starts_ref is not None:
            # Keys that straddle two segments are read, and seen by no query: their products may be infinite.
            ds = jnp.where(seen, ds, 0.0)
        return accumulate(dq, ds, k)

    dq = walk(sight.key_ranges(ends, tile.keys), step, zeros(tile.rows, key_pieces))
    dq = finish_query_gradient(
        dq, problem.scale, gate_ref, dq_before_ref, pair.batch, rows.query, rows, key_pieces, valid
    )
    store_rows(dq_ref, at, key_pieces, dq, valid)


def _key_gradients(
    positions: Any,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    do: jax.Array,
    lse_log2: jax.Array,
    delta: jax.Array,
    gate: jax.Array | None,
    problem: Problem,
    tile: Tile,
) -> tuple[jax.Array, jax.Array]:
    """dk [B, Nc, K, Dk] and dv [B, Nc, K, Dv] from the statistics that `_query_gradient` left."""
    (B, Tq, _, Dk), (_, Nc, K, Dv) = q.shape, v.shape
    offset, starts = positions
    num_tiles = pl.cdiv(Nc, tile.keys)
    chunk = _chunk_queries(Tq, num_tiles * B * K)
    num_chunks = pl.cdiv(Tq, chunk)
    padded = num_tiles * tile.keys
    stops = _query_stops(starts, num_tiles, tile.keys, problem)
    query_range = functools.partial(_query_range, problem=problem, num_keys=Nc, keys=tile.keys, num_queries=Tq)
    options: dict[str, Any] = dict(problem=problem, tile=tile, chunk=chunk, query_range=query_range)
    partials = launch(
        functools.partial(_key_gradient_kernel, **options),
        name="compressed_attention_key_gradient",
        grid=(num_tiles * num_chunks, B * K),
        out_shape=tuple(jax.ShapeDtypeStruct((B * K, num_chunks * padded, size), jnp.float32) for size in (Dk, Dv)),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        interpret=problem.interpret,
    )(offset, starts, stops, q, k, v, do, lse_log2, delta, gate)
    reduce_keys = min(tile.keys, _SUM_KEYS)
    return launch(
        functools.partial(_reduce_kernel, keys=reduce_keys, **options),
        name="compressed_attention_key_gradient_sum",
        grid=(padded // reduce_keys, B * K),
        out_shape=(jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)),
        num_warps=4,
        num_stages=1,
        interpret=problem.interpret,
    )(offset, stops, *partials)


def _chunk_queries(num_queries: int, key_tiles: int) -> int:
    """Queries per work item: a multiple of 256, so that no tile of packed rows straddles two chunks."""
    chunks = max(1, min(pl.cdiv(_WORK_ITEMS, key_tiles), pl.cdiv(num_queries, _LEAST_CHUNK)))
    return _LEAST_CHUNK * pl.cdiv(pl.cdiv(num_queries, chunks), _LEAST_CHUNK)


def _query_stops(starts: jax.Array | None, num_tiles: int, keys: int, problem: Problem) -> jax.Array | None:
    """For each key tile, int32 [B, tiles, 2]: queries before which the segment may reach its first and its last key.

    `starts` never decreases, so counting is searching: a query sees key i only if starts <= i d.
    """
    if starts is None:
        return None
    first = iota(num_tiles) * keys
    token = jnp.stack([first, first + keys - 1], axis=1) * problem.compress_stride
    return jnp.sum(starts[:, :, None, None] <= token[None, None], axis=1, dtype=jnp.int32)


def _query_range(
    key_tile: Any,
    offset: Any,
    stops_ref: Any,
    batch: Any,
    *,
    problem: Problem,
    num_keys: int,
    keys: int,
    num_queries: int,
) -> tuple[Any, Any, Any, Any]:
    """Queries [lo, hi) that see a key of the tile, and [full_lo, full_hi) that see every key of it."""
    first = key_tile * keys
    last = jnp.minimum(first + keys, num_keys) - 1
    stride, end = problem.compress_stride, problem.compress_block - 1
    lo = jnp.clip(first * stride + end - offset, 0, num_queries)
    full_lo = jnp.clip(last * stride + end - offset, 0, num_queries)
    if stops_ref is None:
        return lo, np.int32(num_queries), full_lo, np.int32(num_queries)
    return lo, stops_ref[batch, key_tile, 1], full_lo, stops_ref[batch, key_tile, 0]


def _key_gradient_kernel(
    offset_ref: Any,
    starts_ref: Any,
    stops_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    do_ref: Any,
    lse_log2_ref: Any,
    delta_ref: Any,
    gate_ref: Any,
    dk_ref: Any,
    dv_ref: Any,
    *,
    problem: Problem,
    tile: Tile,
    chunk: int,
    query_range: Any,
) -> None:
    (_, Tq, H, Dk), (_, Nc, K, Dv) = q_ref.shape, v_ref.shape
    group = H // K
    key_pieces, value_pieces = head_pieces(Dk, tile.widest), head_pieces(Dv, tile.widest)
    num_chunks = pl.cdiv(Tq, chunk)
    padded = pl.cdiv(Nc, tile.keys) * tile.keys
    pair = program_pair(K)
    key_tile, part = div(pl.program_id(0), num_chunks), rem(pl.program_id(0), num_chunks)
    sight = Visibility(problem, Nc, pair.batch, offset_ref[0], starts_ref)
    first, stop, full_lo, full_hi = query_range(key_tile, sight.offset, stops_ref, pair.batch)
    lo = jnp.maximum(first, part * chunk)
    hi = jnp.minimum(stop, part * chunk + chunk)
    key = key_tile * tile.keys + iota(tile.keys)
    seen = sight.seen(key, Tq)

    @pl.when(lo < hi)
    def _work() -> None:
        # Zeros instead of keys that no query sees, whose products may not be finite.
        k = load_rows(k_ref, (pair.batch, key, pair.kv_head), key_pieces, seen)
        v = load_rows(v_ref, (pair.batch, key, pair.kv_head), value_pieces, seen)

        def step(i: Any, carry: Any, edge: bool) -> Any:
            dk, dv = carry
            first_row = i * tile.rows
            rows = packed_rows(first_row, tile.rows, group, pair, H, K)
            valid = rows.query < stop if edge else None
            at, statistic_at = (pair.batch, rows.query, rows.head), (pair.index, first_row + iota(tile.rows))
            q = load_rows(q_ref, at, key_pieces, valid)
            lse_log2 = plgpu.load(lse_log2_ref.at[statistic_at], mask=valid, other=NEVER if edge else None)
            p = exp2(dot_pieces(k, q) * problem.scale_log2 - lse_log2[None, :], problem.interpret)
            if edge:
                p = jnp.where(sight.mask(key, rows.query, 1), p, 0.0)
            if gate_ref is not None:
                p *= plgpu.load(gate_ref.at[at], mask=valid, other=0.0 if edge else None)[None, :]
            do = load_rows(do_ref, at, value_pieces, valid)
            delta = plgpu.load(delta_ref.at[statistic_at], mask=valid, other=0.0 if edge else None)
            dv = accumulate(dv, p, do)
            return accumulate(dk, p * (dot_pieces(v, do) - delta[None, :]), q), dv

        begin, end = div(lo * group, tile.rows), cdiv(hi * group, tile.rows)
        full_begin = jnp.clip(cdiv(full_lo * group, tile.rows), begin, end)
        full_end = jnp.clip(div(jnp.minimum(hi, full_hi) * group, tile.rows), full_begin, end)
        ranges = [(begin, full_begin, True), (full_begin, full_end, False)]
        if starts_ref is not None or Tq * group % tile.rows:
            ranges.append((full_end, end, True))
        dk, dv = walk(ranges, step, (zeros(tile.keys, key_pieces), zeros(tile.keys, value_pieces)))
        entry = part * padded + key
        store_rows(dk_ref, (pair.index, entry), key_pieces, dk)
        store_rows(dv_ref, (pair.index, entry), value_pieces, dv)


def _reduce_kernel(
    offset_ref: Any,
    stops_ref: Any,
    dk_parts_ref: Any,
    dv_parts_ref: Any,
    dk_ref: Any,
    dv_ref: Any,
    *,
    problem: Problem,
    tile: Tile,
    chunk: int,
    query_range: Any,
    keys: int,
) -> None:
    """Adds the chunks that hold a visible query, first to last; the others were never written."""
    _, Nc, K, _ = dk_ref.shape
    padded = pl.cdiv(Nc, tile.keys) * tile.keys
    pair = program_pair(K)
    first_key = pl.program_id(0) * keys
    key = first_key + iota(keys)
    lo, hi, _, _ = query_range(div(first_key, tile.keys), offset_ref[0], stops_ref, pair.batch)
    begin = div(lo, chunk)
    end = jnp.where(lo < hi, cdiv(hi, chunk), begin)
    for parts_ref, out_ref, factor in ((dk_parts_ref, dk_ref, problem.scale), (dv_parts_ref, dv_ref, 1.0)):
        pieces = head_pieces(out_ref.shape[-1], _SUM_WIDTH)

        def add(part: Any, total: Any, parts_ref: Any = parts_ref, pieces: Any = pieces) -> Any:
            return tuple(map(jnp.add, total, load_rows(parts_ref, (pair.index, part * padded + key), pieces)))

        total = loop(begin, end, add, zeros(keys, pieces))
        store_rows(out_ref, (pair.batch, key, pair.kv_head), pieces, scaled(total, factor), key < Nc)
