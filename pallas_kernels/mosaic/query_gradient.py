"""The gradient of the queries: a frame for every branch whose queries walk along their keys, a block of 64 at a time.

With p = exp(s - lse), delta = rowsum(do * o) - dlse and dp = do v^T, ds = p (dp - delta) and dq = scale ds k. Where the
output is gate * o, dq is gate times that. A tile of queries stays in shared memory while its keys pass by in a ring.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic.choice import choose_gradient_tile
from pallas_kernels.mosaic.intervals import Intervals, row_bounds
from pallas_kernels.mosaic.launch import Barriers, Matrix, Scratch, Vectors, launch, num_programs
from pallas_kernels.mosaic.packing import Packing
from pallas_kernels.mosaic.products import (
    ROWS,
    Products,
    accumulators,
    down_rows,
    i32,
    index,
    load_numbers,
    row_index,
    two_products,
)
from pallas_kernels.mosaic.ring import Ring, Schedule
from pallas_kernels.mosaic.softmax import LOG2_E, NEVER
from pallas_kernels.mosaic.tiles import REGISTERS, RingTile
from pallas_kernels.tiles import Table

CONSUMERS = 2


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What the backward kernels know of each packed row, float32 [B K, rows]."""

    lse_log2: jax.Array  # above every score where a row sees nothing
    delta: jax.Array
    gate: jax.Array | None

    def arrays(self) -> tuple[jax.Array, ...]:
        """Those that are there."""
        return (self.lse_log2, self.delta) if self.gate is None else (self.lse_log2, self.delta, self.gate)


def statistics_of(
    o: jax.Array,
    lse: jax.Array,
    do: jax.Array,
    dlse: jax.Array | None,
    gate: jax.Array | None,
    num_kv_heads: int,
    packing: Packing,
) -> tuple[Statistics, jax.Array]:
    """The rows of whole tiles, and delta [B, H, Tq]."""
    delta = jnp.swapaxes(jnp.sum(o.astype(jnp.float32) * do.astype(jnp.float32), axis=-1), 1, 2)
    # With what follows fused into it, the sum takes 5 ms at 64k tokens and 64 heads of 128 on an H100 instead of 0.7.
    delta = lax.optimization_barrier(delta)
    if dlse is not None:
        delta = delta - dlse
    # Rows that see nothing take no part: whatever cotangent came with their lse of -inf is dropped here.
    seen = lse > -jnp.inf
    delta = jnp.where(seen, delta, 0.0)
    padded = -(-o.shape[1] // (CONSUMERS * packing.queries)) * CONSUMERS * packing.queries
    pack = functools.partial(packing.pack, num_kv_heads=num_kv_heads, padded=padded)
    statistics = Statistics(
        pack(jnp.where(seen, lse * LOG2_E, NEVER), value=NEVER),
        pack(delta, value=0.0),
        None if gate is None else pack(jnp.swapaxes(gate, 1, 2), value=0.0),
    )
    return statistics, delta


def choose_query_tile(
    tile: RingTile | None, table: Table, q: jax.Array, k: jax.Array, v: jax.Array, gated: bool
) -> RingTile:
    """`query_tile`, or the table's, for arrays as the contracts have them; see `choose_gradient_tile`."""
    return choose_gradient_tile("query_tile", tile, table, q, k, v, gated, _scratch)


def _scratch(
    tile: RingTile, packing: Packing, dtype: Any, key_dim: int, value_dim: int, num_known: int
) -> tuple[Scratch, ...]:
    return (
        Matrix((CONSUMERS, ROWS, key_dim), dtype),
        Matrix((CONSUMERS, ROWS, value_dim), dtype),
        Matrix((tile.slots, ROWS, key_dim), dtype),
        Matrix((tile.slots, ROWS, value_dim), dtype),
        Vectors((CONSUMERS, num_known, ROWS), jnp.float32),
        Barriers(CONSUMERS, 2 * packing.copies + num_known),
        Barriers(CONSUMERS, packing.copies),
        Barriers(tile.slots),
        Barriers(tile.slots),
        Barriers(tile.slots, CONSUMERS),
        Barriers(tile.slots, CONSUMERS),
    )


class Path(NamedTuple):
    """The steps of one tile of queries, 64 keys each."""

    steps: Any
    phases: tuple[tuple[Any, Any, bool], ...]  # (first step, one past the last, whether some see only some of the keys)
    step: Callable[[Any], tuple[Any, Any]]  # of its number: the first key, and which queries take part, bit by bit


def query_gradient(
    q: jax.Array,
    do: jax.Array,
    k: jax.Array,
    v: jax.Array,
    statistics: Statistics,
    keys: Intervals,
    walk: tuple[jax.Array, ...],
    before: jax.Array | None,
    *,
    path_of: Callable[..., Path],
    packing: Packing,
    scale: float,
    pair_by_pair: bool,
    tile: RingTile,
    name: str,
    interpret: bool,
) -> jax.Array:
    """dq [B, Tq, K, G, Dk] of queries that see at most `keys`, added to `before`.

    path_of(references to `walk`, batch entry, pair, tile) is the path of a tile.
    """
    (B, _, K, _, Dk), Dv = q.shape, v.shape[3]
    queries = CONSUMERS * packing.queries
    num_tiles = pl.cdiv(keys.begin.shape[1], queries)
    known = statistics.arrays()
    dq: jax.Array = launch(
        functools.partial(
            _kernel,
            packing=packing,
            schedule=Schedule(num_tiles, B, K, num_programs(interpret), pair_by_pair),
            path_of=path_of,
            num_walk=len(walk),
            scale=scale,
            slots=tile.slots,
            gated=statistics.gate is not None,
            added=before is not None,
        ),
        name=name,
        out_shape=(jax.ShapeDtypeStruct(q.shape, q.dtype),),
        scratch=_scratch(tile, packing, q.dtype, Dk, Dv, len(known)),
        warpgroups=CONSUMERS + 1,
        interpret=interpret,
    )(
        q,
        do,
        k,
        v,
        row_bounds(keys, num_tiles * queries, packing),
        *walk,
        *known,
        *(() if before is None else (before,)),
    )[0]
    return dq


def _kernel(
    products: Products,
    q_ref: Any,
    do_ref: Any,
    k_ref: Any,
    v_ref: Any,
    bounds_ref: Any,
    *refs: Any,
    packing: Packing,
    schedule: Schedule,
    path_of: Callable[..., Path],
    num_walk: int,
    scale: float,
    slots: int,
    gated: bool,
    added: bool,
) -> None:
    walk_refs, refs = refs[:num_walk], refs[num_walk:]
    known_refs, refs = refs[: 2 + gated], refs[2 + gated :]
    before_ref, refs = (refs[0], refs[1:]) if added else (None, refs)
    dq_ref, q_shared, do_shared, k_shared, v_shared, known_shared, *barriers = refs
    full, before_full, k_full, v_full, k_free, v_free = barriers
    keys_ring, values_ring = Ring(k_full, k_free, slots), Ring(v_full, v_free, slots)
    Dk, queries = q_ref.shape[-1], CONSUMERS * packing.queries
    warpgroup = lax.axis_index("warpgroup")
    shape = (ROWS, ROWS)

    def path(i: Any) -> Path:
        batch, head, number = schedule.item(i)
        return path_of(walk_refs, batch, schedule.pair(batch, head), number)

    @pl.when(warpgroup < CONSUMERS)
    def _consume() -> None:
        plgpu.set_max_registers(REGISTERS[CONSUMERS][0], action="increase")
        queries_here, do_here = q_shared.at[warpgroup], do_shared.at[warpgroup]

        def work(i: Any, done: Any) -> Any:
            batch, head, number = schedule.item(i)
            steps, phases, step_at = path(i)
            query = number * i32(queries) + warpgroup * i32(packing.queries)
            rows = pl.ds((number * i32(CONSUMERS) + warpgroup) * i32(ROWS), ROWS)
            here = full.at[warpgroup]
            plgpu.wait_smem_to_gmem(0)
            packing.load(q_ref, queries_here, here, batch, query, head)
            packing.load(do_ref, do_here, here, batch, query, head)
            for j, ref in enumerate(known_refs):
                source = ref.at[schedule.pair(batch, head), rows]
                plgpu.copy_gmem_to_smem(source, known_shared.at[warpgroup, j], here)
            plgpu.barrier_wait(here)
            lse_log2, delta, *gate = (load_numbers(known_shared.at[warpgroup, j]) for j in range(2 + gated))

            def body(dq: Any) -> Any:
                def step(j: Any, carry: Any, edge: bool) -> Any:
                    first, chosen = step_at(j)
                    slot = keys_ring.wait_full(done + j)
                    values_ring.wait_full(done + j)

                    def attend(members: Any) -> None:
                        reference = lse_log2
                        if members is not None:
                            row_query = packing.query_of(row_index())
                            reference = jnp.where(((members >> row_query) & i32(1)) == i32(1), lse_log2, NEVER)

                        p, dp = two_products(
                            (queries_here, k_shared.at[slot].transpose((1, 0))),
                            (do_here, v_shared.at[slot].transpose((1, 0))),
                            lambda s: jnp.exp2(s * (scale * LOG2_E) - down_rows(reference, ROWS)),
                            shape,
                        )
                        values_ring.free(done + j)
                        if edge:
                            # Read where they are used: the steps without a mask have no registers to spare.
                            begin, end = (load_numbers(bounds_ref.at[batch, i32(c), rows]) for c in range(2))
                            key = index(shape, 1) + first
                            p = jnp.where((key >= down_rows(begin, ROWS)) & (key < down_rows(end, ROWS)), p, 0.0)
                        ds = p * (dp - down_rows(delta, ROWS))
                        products.issue(dq, ds.astype(q_ref.dtype), k_shared.at[slot])
                        plgpu.wgmma_wait(0)
                        keys_ring.free(done + j)

                    def skip(_: Any) -> None:
                        values_ring.free(done + j)
                        keys_ring.free(done + j)

                    if chosen is None:
                        attend(None)
                    else:
                        bits = lax.shift_right_logical(chosen, warpgroup * i32(packing.queries))
                        members = bits & i32((1 << packing.queries) - 1)
                        lax.cond(members != 0, attend, skip, members)
                    return carry

                for low, high, edge in phases:
                    lax.fori_loop(low, high, functools.partial(step, edge=edge), i32(0))
                return dq[...]

            dq = accumulators(body, (ROWS, Dk)) * scale
            if gated:
                dq = dq * down_rows(gate[0], Dk)
            if added:
                plgpu.commit_smem()  # all have read the queries, whose place is taken
                packing.load(before_ref, queries_here, before_full.at[warpgroup], batch, query, head)
                plgpu.barrier_wait(before_full.at[warpgroup])
                dq = dq + queries_here[...].astype(jnp.float32)
                plgpu.commit_smem()
            queries_here[...] = dq.astype(dq_ref.dtype)
            plgpu.commit_smem()
            packing.store(queries_here, dq_ref, batch, query, head)
            plgpu.commit_smem_to_gmem_group()
            return done + steps

        lax.fori_loop(i32(0), schedule.count(), work, i32(0))
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == CONSUMERS)
    def _produce() -> None:
        plgpu.set_max_registers(REGISTERS[CONSUMERS][1], action="decrease")

        def work(i: Any, done: Any) -> Any:
            batch, head, _ = schedule.item(i)
            steps, _, step_at = path(i)

            def step(j: Any, _: Any) -> Any:
                at = pl.ds(step_at(j)[0], ROWS)
                keys_ring.fill(done + j, k_ref.at[batch, at, head], k_shared)
                values_ring.fill(done + j, v_ref.at[batch, at, head], v_shared)
                return i32(0)

            lax.fori_loop(i32(0), steps, step, i32(0))
            return done + steps

        done = lax.fori_loop(i32(0), schedule.count(), work, i32(0))
        keys_ring.drain(done)
        values_ring.drain(done)
