"""Backward of compressed attention: dq query-major, dk and dv key-major, all partial sums in a fixed order.

With p = exp(s - lse), delta = rowsum(do * o) and the cotangent dlse, ds = p (dp - delta + dlse) where dp = do v^T.
Where the output is gate * o, every term is gate times that, and delta is the gate's own gradient.
The dq kernel also leaves lse (base 2) and delta - dlse in packed row order, which the dk/dv kernel reads as it walks.
"""

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
from pallas_kernels.contract import Gradients, Sizes
from pallas_kernels.tiles import exp2
from pallas_kernels.triton.problem import Problem, check_supported, offset_array, problem_of
from pallas_kernels.triton_call import triton_call

# A key tile's queries are cut into chunks until there is about this much work to spread: enough programs to fill any
# GPU several times over, few enough that the float32 partial sums stay far below the size of q.
_WORK_ITEMS = 4096
_LEAST_CHUNK = 256


def query_gradient(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    starts: jax.Array | None,
    offset: jax.Array,
    o: jax.Array,
    lse: jax.Array,
    do: jax.Array,
    dlse: jax.Array | None,
    problem: Problem,
    tile: Tile | None = None,
    gate: jax.Array | None = None,
    dq_before: jax.Array | None = None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """dq [B, Tq, H, Dk], and (lse in base 2, delta - dlse), float32 [B, K, Tq G] in packed row order.

    `gate` is float32 [B, Tq, H]; None: 1. `dlse` None: 0. `dq_before` is added to dq.
    """
    B, Tq, H, Dk = q.shape
    _, Nc, K, Dv = v.shape
    G = H // K
    tile = tile or tiling.query_gradient_tile(max(Dk, Dv), q.dtype)
    num_tiles = pl.cdiv(Tq * G, tile.rows)
    statistic = pl.BlockSpec((None, None, G, Tq), lambda i, y: (lax.div(y, K), lax.rem(y, K), 0, 0))
    term = pl.BlockSpec((None, None, Tq * G), lambda i, y: (lax.div(y, K), lax.rem(y, K), 0))
    dq, lse2, delta = triton_call(
        functools.partial(_query_gradient_kernel, problem=problem, tile=tile, num_tiles=num_tiles),
        name="compressed_attention_query_gradient",
        grid=(num_tiles, B * K),
        in_specs=[
            pl.BlockSpec((1,), lambda i, y: (0,)),
            None if starts is None else pl.BlockSpec((None, Tq), lambda i, y: (lax.div(y, K), 0)),
            *tiling.specs_qkv(Tq, G, K, Nc, Dk, Dv),
            tiling.query_spec(Tq, K, G, Dv),
            statistic,
            tiling.query_spec(Tq, K, G, Dv),
            None if dlse is None else statistic,
            None if gate is None else tiling.gate_spec(Tq, K, G),
            None if dq_before is None else tiling.query_spec(Tq, K, G, Dk),
        ],
        out_specs=[tiling.query_spec(Tq, K, G, Dk), term, term],
        out_shape=[
            jax.ShapeDtypeStruct((B, Tq, K, G, Dk), q.dtype),
            jax.ShapeDtypeStruct((B, K, Tq * G), jnp.float32),
            jax.ShapeDtypeStruct((B, K, Tq * G), jnp.float32),
        ],
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        interpret=problem.interpret,
    )(
        offset,
        starts,
        q.reshape(B, Tq, K, G, Dk),
        k,
        v,
        o.reshape(B, Tq, K, G, Dv),
        lse.reshape(B, K, G, Tq),
        do.reshape(B, Tq, K, G, Dv),
        None if dlse is None else dlse.reshape(B, K, G, Tq),
        None if gate is None else gate.reshape(B, Tq, K, G),
        None if dq_before is None else dq_before.reshape(B, Tq, K, G, Dk),
    )
    return dq.reshape(B, Tq, H, Dk), (lse2, delta)


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
    lse2_ref: Any,
    delta_ref: Any,
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

    first_row = (num_tiles - 1 - pl.program_id(0)) * tile.rows
    query, head = tiling.packed_rows(first_row, tile.rows, group)
    valid = query < num_queries
    offset = offset_ref[0]
    q = tiling.load_rows(q_ref, query, head, valid, key_pieces)
    do = tiling.load_rows(do_ref, query, head, valid, value_pieces)
    o = tiling.load_rows(o_ref, query, head, valid, value_pieces)
    lse = plgpu.load(lse_ref.at[head, query], mask=valid, other=-jnp.inf)
    products = [jnp.sum(a.astype(jnp.float32) * b.astype(jnp.float32), axis=1) for a, b in zip(o, do, strict=True)]
    # Rows that see nothing take no part: whatever cotangent came with their lse of -inf is dropped here.
    seen = lse > -jnp.inf
    lse2 = jnp.where(seen, lse * tiling.LOG2E, 0.0)
    delta = functools.reduce(jnp.add, products)
    if dlse_ref is not None:
        delta -= plgpu.load(dlse_ref.at[head, query], mask=valid, other=0.0)
    delta = jnp.where(seen, delta, 0.0)
    row = first_row + lax.broadcasted_iota(jnp.int32, (tile.rows,), 0)
    plgpu.store(lse2_ref.at[pl.ds(first_row, tile.rows)], lse2, mask=row < num_queries * group)
    plgpu.store(delta_ref.at[pl.ds(first_row, tile.rows)], delta, mask=row < num_queries * group)

    def body(masked: bool) -> Any:
        def step(j: Any, dq: Any) -> Any:
            first_key = j * tile.keys
            limit = num_keys if masked else None
            k = tiling.load_keys(k_ref, first_key, tile.keys, limit, key_pieces)
            p = exp2(tiling.dot_pieces(q, k) * scale - lse2[:, None], problem.interpret)
            if masked:
                key = first_key + lax.broadcasted_iota(jnp.int32, (tile.keys,), 0)
                p = jnp.where(tiling.visible(key, query, offset, starts_ref, problem, num_keys, 0), p, 0.0)
            v = tiling.load_keys(v_ref, first_key, tile.keys, limit, value_pieces)
            ds = (p * (tiling.dot_pieces(do, v) - delta[:, None])).astype(k_ref.dtype)
            return tuple(a + tiling.dot(ds, piece, (1, 0)) for a, piece in zip(dq, k, strict=True))

        return step

    first_query = tiling.positive_div(first_row, group)
    last_query = jnp.minimum(tiling.positive_div(first_row + tile.rows - 1, group), num_queries - 1)
    ranges = tiling.key_ranges(first_query, last_query, offset, starts_ref, problem, num_keys, tile.keys)
    dq = tuple(jnp.zeros((tile.rows, width), jnp.float32) for _, width, _ in key_pieces)
    dq = tiling.walk(ranges, body, dq)
    factor: Any = problem.scale
    if gate_ref is not None:
        factor = (factor * plgpu.load(gate_ref.at[query, head], mask=valid, other=0.0))[:, None]
    dq = tuple(a * factor for a in dq)
    if dq_before_ref is not None:
        before = tiling.load_rows(dq_before_ref, query, head, valid, key_pieces)
        dq = tuple(a + b.astype(jnp.float32) for a, b in zip(dq, before, strict=True))
    tiling.store_rows(dq_ref, query, head, valid, key_pieces, dq)


def key_gradients(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    starts: jax.Array | None,
    offset: jax.Array,
    do: jax.Array,
    row_terms: tuple[jax.Array, jax.Array],
    problem: Problem,
    tile: Tile | None = None,
    work_items: int = _WORK_ITEMS,
    gate: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """dk [B, Nc, K, Dk] and dv [B, Nc, K, Dv] from the row terms that `query_gradient` left."""
    B, Tq, H, Dk = q.shape
    _, Nc, K, Dv = v.shape
    G = H // K
    tile = tile or tiling.key_gradient_tile(max(Dk, Dv), q.dtype)
    num_tiles = pl.cdiv(Nc, tile.keys)
    chunk = _chunk_queries(Tq, num_tiles * B * K, work_items)
    num_chunks = pl.cdiv(Tq, chunk)
    padded = num_tiles * tile.keys
    stops = _query_stops(starts, num_tiles, tile.keys, problem, Tq)
    stop_spec = None if stops is None else pl.BlockSpec((None, num_tiles, 2), lambda i, y: (lax.div(y, K), 0, 0))

    def partial_spec(size: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, num_chunks * padded, size), lambda i, y: (y, 0, 0))

    term = pl.BlockSpec((None, None, Tq * G), lambda i, y: (lax.div(y, K), lax.rem(y, K), 0))
    spans = functools.partial(_query_span, problem=problem, num_keys=Nc, keys=tile.keys, num_queries=Tq)
    partials = triton_call(
        functools.partial(_key_gradient_kernel, problem=problem, tile=tile, chunk=chunk, spans=spans),
        name="compressed_attention_key_gradient",
        grid=(num_tiles * num_chunks, B * K),
        in_specs=[
            pl.BlockSpec((1,), lambda i, y: (0,)),
            None if starts is None else pl.BlockSpec((None, Tq), lambda i, y: (lax.div(y, K), 0)),
            stop_spec,
            *tiling.specs_qkv(Tq, G, K, Nc, Dk, Dv),
            tiling.query_spec(Tq, K, G, Dv),
            term,
            term,
            None if gate is None else tiling.gate_spec(Tq, K, G),
        ],
        out_specs=[partial_spec(Dk), partial_spec(Dv)],
        out_shape=[jax.ShapeDtypeStruct((B * K, num_chunks * padded, size), jnp.float32) for size in (Dk, Dv)],
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        interpret=problem.interpret,
    )(
        offset,
        starts,
        stops,
        q.reshape(B, Tq, K, G, Dk),
        k,
        v,
        do.reshape(B, Tq, K, G, Dv),
        *row_terms,
        None if gate is None else gate.reshape(B, Tq, K, G),
    )

    reduce_keys = min(tile.keys, 32)
    dk, dv = triton_call(
        functools.partial(_reduce_kernel, problem=problem, tile=tile, chunk=chunk, spans=spans, keys=reduce_keys),
        name="compressed_attention_key_gradient_sum",
        grid=(padded // reduce_keys, B * K),
        in_specs=[pl.BlockSpec((1,), lambda i, y: (0,)), stop_spec, partial_spec(Dk), partial_spec(Dv)],
        out_specs=[tiling.key_spec(Nc, K, Dk), tiling.key_spec(Nc, K, Dv)],
        out_shape=[jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)],
        num_warps=4,
        num_stages=1,
        interpret=problem.interpret,
    )(offset, stops, *partials)
    return dk, dv


def _chunk_queries(num_queries: int, key_tiles: int, work_items: int) -> int:
    """Queries per work item: a multiple of 256, so that no tile of packed rows straddles two chunks."""
    chunks = max(1, min(pl.cdiv(work_items, key_tiles), pl.cdiv(num_queries, _LEAST_CHUNK)))
    return _LEAST_CHUNK * pl.cdiv(pl.cdiv(num_queries, chunks), _LEAST_CHUNK)


def _query_stops(
    starts: jax.Array | None, num_tiles: int, keys: int, problem: Problem, num_queries: int
) -> jax.Array | None:
    """For each key tile, int32 [B, tiles, 2]: queries before which the segment may reach its first and its last key.

    `starts` never decreases, so counting is finding the place: a query sees key i only if starts <= i d.
    """
    if starts is None:
        return None
    first = jnp.arange(num_tiles, dtype=jnp.int32) * keys
    token = jnp.stack([first, first + keys - 1], axis=1) * problem.compress_stride
    return jnp.sum(starts[:, :, None, None] <= token[None, None], axis=1, dtype=jnp.int32)


def _query_span(
    key_tile: Any,
    offset: Any,
    stops_ref: Any,
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
        return lo, jnp.int32(num_queries), full_lo, jnp.int32(num_queries)
    return lo, stops_ref[key_tile, 1], full_lo, stops_ref[key_tile, 0]


def _key_gradient_kernel(
    offset_ref: Any,
    starts_ref: Any,
    stops_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    do_ref: Any,
    lse2_ref: Any,
    delta_ref: Any,
    gate_ref: Any,
    dk_ref: Any,
    dv_ref: Any,
    *,
    problem: Problem,
    tile: Tile,
    chunk: int,
    spans: Any,
) -> None:
    num_queries, group, key_size = q_ref.shape
    num_keys, value_size = v_ref.shape
    key_pieces = tiling.head_pieces(key_size, q_ref.dtype)
    value_pieces = tiling.head_pieces(value_size, v_ref.dtype)
    scale = problem.scale * tiling.LOG2E
    num_rows = num_queries * group
    num_chunks = pl.cdiv(num_queries, chunk)
    padded = pl.cdiv(num_keys, tile.keys) * tile.keys

    key_tile = lax.div(pl.program_id(0), jnp.int32(num_chunks))
    part = lax.rem(pl.program_id(0), jnp.int32(num_chunks))
    offset = offset_ref[0]
    lo, hi, full_lo, full_hi = spans(key_tile, offset, stops_ref)
    lo = jnp.maximum(lo, part * chunk)
    hi = jnp.minimum(hi, part * chunk + chunk)
    first_key = key_tile * tile.keys
    key = first_key + lax.broadcasted_iota(jnp.int32, (tile.keys,), 0)

    @pl.when(lo < hi)
    def _() -> None:
        k = tuple(tiling.load_keys(k_ref, first_key, tile.keys, num_keys, key_pieces))
        v = tuple(tiling.load_keys(v_ref, first_key, tile.keys, num_keys, value_pieces))

        def body(masked: bool) -> Any:
            def step(i: Any, carry: Any) -> Any:
                dk, dv = carry
                first_row = i * tile.rows
                query, head = tiling.packed_rows(first_row, tile.rows, group)
                valid = query < num_queries if masked else None
                q = tiling.load_rows(q_ref, query, head, valid, key_pieces)
                rows = pl.ds(first_row, tile.rows)
                other = 0.0 if masked else None
                lse2 = plgpu.load(lse2_ref.at[rows], mask=valid, other=other)
                p = exp2(tiling.dot_pieces(k, q) * scale - lse2[None, :], problem.interpret)
                if masked:
                    seen = tiling.visible(key, query, offset, starts_ref, problem, num_keys, 1)
                    inside = lax.broadcast_in_dim(query < num_queries, p.shape, (1,))
                    p = jnp.where(seen & inside, p, 0.0)
                if gate_ref is not None:
                    p *= plgpu.load(gate_ref.at[query, head], mask=valid, other=other)[None, :]
                do = tiling.load_rows(do_ref, query, head, valid, value_pieces)
                delta = plgpu.load(delta_ref.at[rows], mask=valid, other=other)
                cast = p.astype(do_ref.dtype)
                dv = tuple(a + tiling.dot(cast, piece, (1, 0)) for a, piece in zip(dv, do, strict=True))
                ds = (p * (tiling.dot_pieces(v, do) - delta[None, :])).astype(q_ref.dtype)
                dk = tuple(a + tiling.dot(ds, piece, (1, 0)) for a, piece in zip(dk, q, strict=True))
                return dk, dv

            return step

        dk = tuple(jnp.zeros((tile.keys, width), jnp.float32) for _, width, _ in key_pieces)
        dv = tuple(jnp.zeros((tile.keys, width), jnp.float32) for _, width, _ in value_pieces)
        begin = tiling.positive_div(lo * group, tile.rows)
        end = tiling.positive_cdiv(hi * group, tile.rows)
        full_begin = jnp.clip(tiling.positive_cdiv(full_lo * group, tile.rows), begin, end)
        full_end = jnp.clip(tiling.positive_div(jnp.minimum(hi, full_hi) * group, tile.rows), full_begin, end)
        ranges = [(begin, full_begin, True), (full_begin, full_end, False)]
        if starts_ref is not None or num_rows % tile.rows:
            ranges.append((full_end, end, True))
        dk, dv = tiling.walk(ranges, body, (dk, dv))
        place = part * padded + first_key
        tiling.store_keys(dk_ref, place, None, key_pieces, dk)
        tiling.store_keys(dv_ref, place, None, value_pieces, dv)


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
    spans: Any,
    keys: int,
) -> None:
    """Adds the chunks that hold a visible query, first to last; the others were never written."""
    num_keys = dk_ref.shape[0]
    padded = pl.cdiv(num_keys, tile.keys) * tile.keys
    first_key = pl.program_id(0) * keys
    key_tile = tiling.positive_div(first_key, tile.keys)
    lo, hi, _, _ = spans(key_tile, offset_ref[0], stops_ref)
    begin = tiling.positive_div(lo, chunk)
    end = jnp.where(lo < hi, tiling.positive_cdiv(hi, chunk), begin)
    for parts_ref, out_ref, factor in ((dk_parts_ref, dk_ref, problem.scale), (dv_parts_ref, dv_ref, 1.0)):
        pieces = tiling.head_pieces(out_ref.shape[1], jnp.float32)

        def add(part: Any, total: Any, parts_ref: Any = parts_ref, pieces: Any = pieces) -> Any:
            loaded = tiling.load_keys(parts_ref, part * padded + first_key, keys, None, pieces)
            return tuple(a + b for a, b in zip(total, loaded, strict=True))

        zeros = tuple(jnp.zeros((keys, width), jnp.float32) for _, width, _ in pieces)
        total = lax.fori_loop(begin, end, add, zeros)
        tiling.store_keys(out_ref, first_key, num_keys, pieces, [t * factor for t in total])


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
        delta = jnp.zeros((B, H, Tq), jnp.float32)
        return Gradients(jnp.zeros_like(q) if dq is None else dq, jnp.zeros_like(k), jnp.zeros_like(v), delta)
    problem, starts, offset = problem_of(config, scale, interpret), segment_starts, offset_array(query_offset)
    dq, row_terms = query_gradient(q, k, v, starts, offset, o, lse, do, dlse, problem, query_tile, gate, dq)
    dk, dv = key_gradients(q, k, v, starts, offset, do, row_terms, problem, key_tile, gate=gate)
    delta = row_terms[1].reshape(B, K, Tq, H // K).swapaxes(2, 3).reshape(B, H, Tq)
    return Gradients(dq, dk, dv, delta)
