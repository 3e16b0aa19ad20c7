"""Attention to an interval of the keys: the forward kernel of compressed and of window attention.

Two or three consumers share a ring of keys and values. Each takes the exponentials of a step, then issues the product
with the step's values and the next step's scores together, while the others take theirs: the new scores use the
registers of the old ones, so that nothing is moved.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.mosaic.choice import choose_tile
from pallas_kernels.mosaic.intervals import Intervals, row_bounds, steps
from pallas_kernels.mosaic.launch import Barriers, Matrix, Scratch, launch, num_programs
from pallas_kernels.mosaic.packing import ALIGNMENT, Packing, pad_keys, pad_rows
from pallas_kernels.mosaic.products import ROWS, Products, accumulators, down_rows, i32, index, load_numbers, product
from pallas_kernels.mosaic.ring import Ring, Schedule
from pallas_kernels.mosaic.softmax import LOG2_E, softmax_finish, softmax_start, softmax_step
from pallas_kernels.mosaic.tiles import REGISTERS, IntervalTile
from pallas_kernels.tiles import Table, key_of

KEYS = 2  # the bounds of a row: first key and one past the last


def attend(
    q: Float[Array, "B Tq H Dk"],
    k: Float[Array, "B N K Dk"],
    v: Float[Array, "B N K Dv"],
    keys: Intervals,
    *,
    tile: IntervalTile | None,
    table: Table,
    scale: float,
    name: str,
    interpret: bool,
) -> tuple[Float[Array, "B Tq H Dv"], Float[Array, "B H Tq"]]:
    """(o, lse) of queries that see an interval of the keys each, by `tile` or by the table's."""
    (B, Tq, H, Dk), (_, _, K, Dv) = q.shape, v.shape
    packing = Packing(H // K)
    tile = choose_forward_tile(tile, table, q, k, v)
    queries = tile.warpgroups * packing.queries
    num_tiles = pl.cdiv(Tq, queries)
    walk = steps(keys, queries, tile.keys)
    bounds = row_bounds(keys, num_tiles * queries, packing)
    dtype, consumers = q.dtype, tile.warpgroups
    grouped = pad_rows(q.reshape(B, Tq, K, H // K, Dk), packing.padded(Tq))
    o, lse = launch(
        functools.partial(
            _kernel,
            packing=packing,
            tile=tile,
            schedule=Schedule(num_tiles, B, K, num_programs(interpret)),
            scale=scale,
        ),
        name=name,
        out_shape=(
            jax.ShapeDtypeStruct((B, packing.padded(Tq), K, H // K, Dv), dtype),
            jax.ShapeDtypeStruct((B * K, num_tiles * consumers * ROWS), jnp.float32),
        ),
        scratch=_scratch(tile, packing, dtype, Dk, Dv),
        warpgroups=consumers + 1,
        interpret=interpret,
    )(grouped, pad_keys(k), pad_keys(v), walk, bounds)
    return o[:, :Tq].reshape(B, Tq, H, Dv), packing.unpack(lse, K, Tq)


def choose_forward_tile(
    tile: IntervalTile | None, table: Table, q: jax.Array, k: jax.Array, v: jax.Array
) -> IntervalTile:
    """`tile`, or the table's, for arrays as the contracts have them; see `choose_tile`.

    Raises:
      ValueError: values, scores and weights of the tile do not fit in registers either.
    """
    packing, value_dim = Packing(q.shape[2] // k.shape[2]), v.shape[3]

    def scratch_of(tile: IntervalTile) -> tuple[Scratch, ...]:
        return _scratch(tile, packing, q.dtype, q.shape[3], value_dim)

    tile = choose_tile("tile", tile, table, key_of(q, k, v), scratch_of)
    # Of the 32 bits of a register, a weight takes 16. A warpgroup's 128 threads share 64 rows.
    held, there = (value_dim + tile.keys) // 2 + tile.keys // 4, REGISTERS[tile.warpgroups][0]
    if held >= there:
        raise ValueError(
            f"tile = {tile}: {held} registers of a thread, with values of {value_dim}; expected fewer than {there}"
        )
    return tile


def _scratch(tile: IntervalTile, packing: Packing, dtype: Any, key_dim: int, value_dim: int) -> tuple[Scratch, ...]:
    consumers = tile.warpgroups
    return (
        Matrix((consumers, tile.buffers, ROWS, key_dim), dtype),
        Matrix((tile.slots, tile.keys, key_dim), dtype),
        Matrix((tile.slots, tile.keys, value_dim), dtype),
        Matrix((consumers, ROWS, value_dim) if value_dim != key_dim else (1, 8, 64), dtype),
        Barriers(consumers * tile.buffers, packing.copies),
        Barriers(tile.slots),
        Barriers(tile.slots),
        Barriers(tile.slots, consumers),
        Barriers(tile.slots, consumers),
    )


def _kernel(
    products: Products,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    walk_ref: Any,
    bounds_ref: Any,
    o_ref: Any,
    lse_ref: Any,
    q_shared: Any,
    k_shared: Any,
    v_shared: Any,
    o_shared: Any,
    q_full: Any,
    k_full: Any,
    v_full: Any,
    k_free: Any,
    v_free: Any,
    *,
    packing: Packing,
    tile: IntervalTile,
    schedule: Schedule,
    scale: float,
) -> None:
    Dk, Dv = q_ref.shape[-1], v_ref.shape[-1]
    consumers, queries = tile.warpgroups, tile.warpgroups * packing.queries
    consumer_registers, producer_registers = REGISTERS[consumers]
    warpgroup = lax.axis_index("warpgroup")
    keys_ring, values_ring = Ring(k_full, k_free, tile.slots), Ring(v_full, v_free, tile.slots)
    scale_log2 = scale * LOG2_E
    shape = (ROWS, tile.keys)

    def walk_of(i: Any) -> Any:
        batch, _, number = schedule.item(i)
        first, *others = (walk_ref[batch, number, i32(j)] for j in range(4))
        return first * i32(ALIGNMENT), *others  # so that the compiler knows where copies may start

    @pl.when(warpgroup < consumers)
    def _consume() -> None:
        plgpu.set_max_registers(consumer_registers, action="increase")

        def buffer_of(i: Any) -> tuple[Any, Any]:
            buffer = lax.rem(i, i32(tile.buffers))
            return buffer, q_full.at[warpgroup * i32(tile.buffers) + buffer]

        def load_queries(i: Any) -> None:
            batch, head, number = schedule.item(i)
            buffer, full = buffer_of(i)
            first = number * i32(queries) + warpgroup * i32(packing.queries)
            packing.load(q_ref, q_shared.at[warpgroup, buffer], full, batch, first, head)

        if tile.buffers == 2:
            pl.when(schedule.count() > 0)(lambda: load_queries(i32(0)))

        def work(i: Any, carry: Any) -> Any:
            done, (first, n, inner, outer) = carry
            batch, head, number = schedule.item(i)
            buffer, full = buffer_of(i)
            queries_here = q_shared.at[warpgroup, buffer]
            rows = pl.ds((number * i32(consumers) + warpgroup) * i32(ROWS), ROWS)
            following = walk_of(jnp.minimum(i + i32(1), schedule.count() - i32(1)))
            plgpu.wait_smem_to_gmem(0)  # the output before has left the buffer that is filled next
            if tile.buffers == 2:
                pl.when(i + i32(1) < schedule.count())(lambda: load_queries(i + i32(1)))
            else:
                load_queries(i)
            plgpu.barrier_wait(full)

            def masked(s: Any, step: Any) -> Any:
                # Read where they are used: the loop of steps without a mask has no registers to spare.
                begin, end = (load_numbers(bounds_ref.at[batch, i32(j), rows]) for j in range(KEYS))
                key = index(shape, 1) + (first + step * i32(tile.keys))
                seen = (key >= down_rows(begin, tile.keys)) & (key < down_rows(end, tile.keys))
                return jnp.where(seen, s, -jnp.inf)

            # Slots are waited for before accumulators are made: those that start as zeros cost nothing where no branch
            # lies between them and the product.
            def scores(step: Any) -> Any:
                slot = keys_ring.wait_full(done + step)
                s = product(queries_here, k_shared.at[slot].transpose((1, 0)), shape)
                keys_ring.free(done + step)
                return s

            def weigh(s: Any, state: Any, step: Any, edge: bool) -> Any:
                acc, m, total = state
                p, m, total, decay = softmax_step(masked(s, step) if edge else s, m, total, scale_log2, edge)
                return p.astype(v_shared.dtype), (acc * down_rows(decay, Dv), m, total)

            def add_values(p: Any, state: Any, slot: Any) -> Any:
                acc, m, total = state
                return products.add(acc, (p, v_shared.at[slot])), m, total

            def advance(step: Any, carry: Any, edge: bool) -> Any:
                s, state = carry
                p, state = weigh(s, state, step, edge)
                value_slot = values_ring.wait_full(done + step)
                key_slot = keys_ring.wait_full(done + step + i32(1))

                def body(accumulator: Any) -> Any:
                    plgpu.wgmma(accumulator, queries_here, k_shared.at[key_slot].transpose((1, 0)))
                    state_after = add_values(p, state, value_slot)
                    return accumulator[...], state_after

                carry = accumulators(body, shape)
                values_ring.free(done + step)
                keys_ring.free(done + step + i32(1))
                return carry

            def walk(state: Any) -> Any:
                last = n - i32(1)
                middle = jnp.minimum(outer, last)
                begin = jnp.minimum(inner, last)
                carry = scores(i32(0)), state
                for low, high, edge in ((i32(0), begin, True), (begin, middle, False), (middle, last, True)):
                    carry = lax.fori_loop(low, high, functools.partial(advance, edge=edge), carry)
                s, state = carry
                p, state = weigh(s, state, last, True)
                state = add_values(p, state, values_ring.wait_full(done + last))
                values_ring.free(done + last)
                return state

            state = lax.cond(n > 0, walk, lambda state: state, softmax_start(Dv))
            o, lse = softmax_finish(*state)
            out = queries_here if Dv == Dk else o_shared.at[warpgroup]
            out[...] = o.astype(o_ref.dtype)
            plgpu.commit_smem()
            packing.store(out, o_ref, batch, number * i32(queries) + warpgroup * i32(packing.queries), head)
            plgpu.commit_smem_to_gmem_group()
            lse_ref[schedule.pair(batch, head), rows] = lse
            return done + n, following

        lax.fori_loop(i32(0), schedule.count(), work, (i32(0), walk_of(i32(0))))
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == consumers)
    def _produce() -> None:
        plgpu.set_max_registers(producer_registers, action="decrease")

        def work(i: Any, done: Any) -> Any:
            batch, head, _ = schedule.item(i)
            first, n, _, _ = walk_of(i)

            def step(j: Any, _: Any) -> Any:
                at = pl.ds(first + j * i32(tile.keys), tile.keys)
                keys_ring.fill(done + j, k_ref.at[batch, at, head], k_shared)
                values_ring.fill(done + j, v_ref.at[batch, at, head], v_shared)
                return i32(0)

            lax.fori_loop(i32(0), n, step, i32(0))
            return done + n

        done = lax.fori_loop(i32(0), schedule.count(), work, i32(0))
        keys_ring.drain(done)
        values_ring.drain(done)
