"""The gradients of attention to an interval of the keys, of compressed and of window attention.

With p = exp(s - lse), delta = rowsum(do * o) - dlse and dp = do v^T, ds = p (dp - delta). Where the output is gate * o,
every term is gate times that. One kernel holds queries and walks along their keys. The other holds keys and walks along
the queries that see them, in runs whose float32 partial sums are added in a fixed order.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.contract import Gradients
from pallas_kernels.mosaic.choice import choose_gradient_tile
from pallas_kernels.mosaic.intervals import Intervals, by_length, cut_into_runs, queries_of_keys, row_bounds, steps
from pallas_kernels.mosaic.launch import Barriers, Matrix, Scratch, Vectors, launch, num_programs
from pallas_kernels.mosaic.packing import ALIGNMENT, Packing, pad_keys, pad_rows
from pallas_kernels.mosaic.products import (
    OF_COLUMNS,
    ROWS,
    Products,
    accumulators,
    along_columns,
    down_rows,
    i32,
    index,
    load_numbers,
    two_products,
)
from pallas_kernels.mosaic.query_gradient import (
    CONSUMERS,
    Path,
    Statistics,
    choose_query_tile,
    query_gradient,
    statistics_of,
)
from pallas_kernels.mosaic.ring import Ring, Schedule
from pallas_kernels.mosaic.softmax import LOG2_E
from pallas_kernels.mosaic.tiles import REGISTERS, PartialTile, RingTile
from pallas_kernels.tiles import Table

LARGEST_HEADS = 256  # of keys and values together: both gradients are in registers
_CUTS = 2048  # work items, at which every multiprocessor has enough of them to be as busy as the others


def check_heads(q: jax.Array, v: jax.Array) -> None:
    """Raises NotImplementedError for heads whose gradients do not fit in registers."""
    if q.shape[3] + v.shape[3] > LARGEST_HEADS:
        raise NotImplementedError(
            f"head_dim of q and of v = {q.shape[3]} and {v.shape[3]}: expected at most {LARGEST_HEADS} together"
        )


def _path(refs: Any, batch: Any, pair: Any, number: Any) -> Path:
    """All keys of a tile's interval, of which every query sees those in the middle."""
    first, n, inner, outer = (refs[0][batch, number, i32(j)] for j in range(4))
    first = first * i32(ALIGNMENT)  # so that the compiler knows where copies may start
    phases = ((i32(0), inner, True), (inner, outer, False), (outer, n, True))
    return Path(n, phases, lambda j: (first + j * i32(ROWS), None))


def gradients(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    o: jax.Array,
    lse: jax.Array,
    do: jax.Array,
    keys: Intervals,
    *,
    scale: float,
    dlse: jax.Array | None,
    gate: jax.Array | None,
    dq: jax.Array | None,
    query_tile: RingTile | None,
    key_tile: PartialTile | None,
    tables: tuple[Table, Table],
    name: str,
    interpret: bool,
) -> Gradients:
    """Gradients of gate * o and of lse, for queries that see an interval of the keys each.

    `tables` have the tiles of the gradients of queries and of keys. The queries that see a key are cut into runs, each
    at least as long as a partial sum of the tile's.
    """
    (B, Tq, H, _), K = q.shape, k.shape[2]
    packing, gated = Packing(H // K), gate is not None
    query_tile = choose_query_tile(query_tile, tables[0], q, k, v, gated)
    key_tile = choose_key_tile(key_tile, tables[1], q, k, v, gated)
    statistics, delta = statistics_of(o, lse, do, dlse, gate, K, packing)

    def grouped(x: jax.Array) -> jax.Array:
        return pad_rows(x.reshape(B, Tq, K, H // K, x.shape[3]), packing.padded(Tq))

    arrays = (grouped(q), grouped(do), pad_keys(k), pad_keys(v))
    options: dict[str, Any] = dict(packing=packing, scale=scale, interpret=interpret)
    dq = query_gradient(
        *arrays,
        statistics,
        keys,
        (steps(keys, CONSUMERS * packing.queries, ROWS),),
        None if dq is None else grouped(dq),
        path_of=_path,
        pair_by_pair=False,
        tile=query_tile,
        name=name + "_query_gradient",
        **options,
    )
    options.update(tile=key_tile, name=name + "_key_gradient")
    dk, dv = _key_gradients(*arrays, statistics, keys, k.shape[1], **options)
    return Gradients(dq[:, :Tq].reshape(q.shape), dk.astype(k.dtype), dv.astype(v.dtype), delta)


def _key_gradients(
    q: jax.Array,
    do: jax.Array,
    k: jax.Array,
    v: jax.Array,
    statistics: Statistics,
    keys: Intervals,
    num_keys: int,
    *,
    packing: Packing,
    tile: PartialTile,
    scale: float,
    name: str,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """dk [B, num_keys, K, Dk] and dv in float32."""
    (B, _, K, _, Dk), Dv = q.shape, v.shape[3]
    num_queries, held = keys.begin.shape[1], CONSUMERS * ROWS
    num_tiles = pl.cdiv(num_keys, held)
    queries = queries_of_keys(keys, num_tiles * held)  # none of those past the last key
    runs = max(1, min(_CUTS // (B * K * num_tiles), num_queries // tile.queries)) if tile.queries else 1
    run = pl.cdiv(num_queries, runs * packing.queries) * packing.queries
    runs = pl.cdiv(num_queries, run)
    walk = cut_into_runs(steps(queries, held, packing.queries, packing.queries), packing.queries, run, runs)
    known = statistics.arrays()
    partials = launch(
        functools.partial(
            _key_gradient_kernel,
            packing=packing,
            schedule=Schedule(B * runs * num_tiles, 1, K, num_programs(interpret)),
            scale=scale,
            slots=tile.slots,
            gated=statistics.gate is not None,
        ),
        name=name,
        out_shape=tuple(
            jax.ShapeDtypeStruct((B * K, runs, num_tiles, CONSUMERS, ROWS, size), jnp.float32) for size in (Dk, Dv)
        ),
        scratch=_scratch(tile, packing, q.dtype, Dk, Dv, len(known)),
        warpgroups=CONSUMERS + 1,
        interpret=interpret,
    )(q, do, k, v, walk, by_length(walk), row_bounds(queries, num_tiles * held, None), *known)

    def total(x: jax.Array) -> jax.Array:
        # One after the other: the order of a library's sum is not known.
        x = functools.reduce(jnp.add, [x[:, r] for r in range(runs)])
        x = x.reshape(B, K, num_tiles * held, x.shape[-1])
        return jnp.swapaxes(x, 1, 2)[:, :num_keys]

    return total(partials[0]), total(partials[1])


def choose_key_tile(
    tile: PartialTile | None, table: Table, q: jax.Array, k: jax.Array, v: jax.Array, gated: bool
) -> PartialTile:
    """`key_tile`, or the table's; see `choose_gradient_tile`."""
    return choose_gradient_tile("key_tile", tile, table, q, k, v, gated, _scratch)


def _scratch(
    tile: PartialTile, packing: Packing, dtype: Any, key_dim: int, value_dim: int, num_known: int
) -> tuple[Scratch, ...]:
    held = CONSUMERS * ROWS
    return (
        Matrix((2, held, key_dim), dtype),
        Matrix((2, held, value_dim), dtype),
        Matrix((tile.slots, ROWS, key_dim), dtype),
        Matrix((tile.slots, ROWS, value_dim), dtype),
        Vectors((tile.slots, num_known, ROWS), jnp.float32),
        Barriers(2, 2),
        Barriers(2, CONSUMERS),
        Barriers(tile.slots, 2 * packing.copies + num_known),
        Barriers(tile.slots, CONSUMERS),
    )


def _key_gradient_kernel(
    products: Products,
    q_ref: Any,
    do_ref: Any,
    k_ref: Any,
    v_ref: Any,
    walk_ref: Any,
    order_ref: Any,
    bounds_ref: Any,
    *refs: Any,
    packing: Packing,
    schedule: Schedule,
    scale: float,
    slots: int,
    gated: bool,
) -> None:
    known_refs, refs = refs[: 2 + gated], refs[2 + gated :]
    dk_ref, dv_ref, k_shared, v_shared, q_shared, do_shared, known_shared, *barriers = refs
    held_full, held_free, full, free = barriers
    ring, held_ring = Ring(full, free, slots), Ring(held_full, held_free, 2)
    Dk, Dv = q_ref.shape[-1], v_ref.shape[-1]
    held = CONSUMERS * ROWS
    warpgroup = lax.axis_index("warpgroup")
    shape = (ROWS, ROWS)

    def place(i: Any) -> tuple[Any, Any, Any, Any]:
        """(batch entry, K/V head, run, tile of keys)."""
        _, head, number = schedule.item(i)
        _, num_tiles, runs, _ = walk_ref.shape
        cut = order_ref[number]
        of_batch, tile = lax.div(cut, i32(num_tiles)), lax.rem(cut, i32(num_tiles))
        return lax.div(of_batch, i32(runs)), head, lax.rem(of_batch, i32(runs)), tile

    def walk_of(i: Any) -> tuple[Any, ...]:
        batch, _, run, tile = place(i)
        first, *others = (walk_ref[batch, tile, run, i32(j)] for j in range(4))
        return first * i32(packing.queries), *others

    @pl.when(warpgroup < CONSUMERS)
    def _consume() -> None:
        plgpu.set_max_registers(REGISTERS[CONSUMERS][0], action="increase")

        def work(i: Any, done: Any) -> Any:
            batch, head, run, tile = place(i)
            first, n, inner, outer = walk_of(i)
            buffer = held_ring.wait_full(i)
            mine = pl.ds(warpgroup * i32(ROWS), ROWS)
            keys_here, values_here = k_shared.at[buffer, mine], v_shared.at[buffer, mine]
            first_key = tile * i32(held) + warpgroup * i32(ROWS)
            keys = pl.ds(first_key, ROWS)
            seen_from, seen_to = (
                bounds_ref[batch, i32(0), first_key],
                bounds_ref[batch, i32(1), first_key + i32(ROWS - 1)],
            )

            def query_at(j: Any) -> Any:
                return first + j * i32(packing.queries)

            def body(dk: Any, dv: Any) -> Any:
                def attend(j: Any, slot: Any, edge: bool) -> None:
                    queries_here, do_here = q_shared.at[slot], do_shared.at[slot]
                    lse_log2, delta, *gate = (
                        load_numbers(known_shared.at[slot, c], OF_COLUMNS) for c in range(2 + gated)
                    )

                    p, dp = two_products(
                        (keys_here, queries_here.transpose((1, 0))),
                        (values_here, do_here.transpose((1, 0))),
                        lambda s: jnp.exp2(s * (scale * LOG2_E) - along_columns(lse_log2, ROWS)),
                        shape,
                    )
                    if edge:
                        begin, end = (load_numbers(bounds_ref.at[batch, i32(c), keys]) for c in range(2))
                        query = packing.query_of(index(shape, 1)) + query_at(j)
                        p = jnp.where((query >= down_rows(begin, ROWS)) & (query < down_rows(end, ROWS)), p, 0.0)
                    if gated:
                        p = p * along_columns(gate[0], ROWS)
                    ds = p * (dp - along_columns(delta, ROWS))
                    products.issue(dv, p.astype(q_ref.dtype), do_here)
                    products.issue(dk, ds.astype(q_ref.dtype), queries_here)
                    plgpu.wgmma_wait(0)

                def step(j: Any, carry: Any, edge: bool) -> Any:
                    slot = ring.wait_full(done + j)
                    if edge:  # the other warpgroup's keys may be all that the queries see
                        seen = (query_at(j + i32(1)) > seen_from) & (query_at(j) < seen_to)
                        lax.cond(seen, lambda: attend(j, slot, True), lambda: None)
                    else:
                        attend(j, slot, False)
                    ring.free(done + j)
                    return carry

                for low, high, edge in ((i32(0), inner, True), (inner, outer, False), (outer, n, True)):
                    lax.fori_loop(low, high, functools.partial(step, edge=edge), i32(0))
                return dk[...], dv[...]

            dk, dv = accumulators(body, (ROWS, Dk), (ROWS, Dv))
            held_ring.free(i)
            pair = schedule.pair(batch, head)
            dk_ref[pair, run, tile, warpgroup] = dk * scale
            dv_ref[pair, run, tile, warpgroup] = dv
            return done + n

        lax.fori_loop(i32(0), schedule.count(), work, i32(0))

    @pl.when(warpgroup == CONSUMERS)
    def _produce() -> None:
        plgpu.set_max_registers(REGISTERS[CONSUMERS][1], action="decrease")

        def work(i: Any, done: Any) -> Any:
            batch, head, _, tile = place(i)
            first, n, _, _ = walk_of(i)
            buffer = held_ring.wait_free(i)
            at = pl.ds(tile * i32(held), held)
            plgpu.copy_gmem_to_smem(k_ref.at[batch, at, head], k_shared.at[buffer], held_full.at[buffer])
            plgpu.copy_gmem_to_smem(v_ref.at[batch, at, head], v_shared.at[buffer], held_full.at[buffer])

            def step(j: Any, _: Any) -> Any:
                query = first + j * i32(packing.queries)
                slot = ring.wait_free(done + j)
                packing.load(q_ref, q_shared.at[slot], full.at[slot], batch, query, head)
                packing.load(do_ref, do_shared.at[slot], full.at[slot], batch, query, head)
                for c, ref in enumerate(known_refs):
                    source = ref.at[schedule.pair(batch, head), pl.ds(query * i32(packing.group), ROWS)]
                    plgpu.copy_gmem_to_smem(source, known_shared.at[slot, c], full.at[slot])
                return i32(0)

            lax.fori_loop(i32(0), n, step, i32(0))
            return done + n

        done = lax.fori_loop(i32(0), schedule.count(), work, i32(0))
        ring.drain(done)
        held_ring.drain(schedule.count())
