"""Selected attention on the Pallas Mosaic GPU backend: the forward pass.

A program takes the queries of two warpgroups and walks along the union of their blocks, two blocks a step. A warpgroup
skips the steps in which none of its queries selected a block.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.contract import Sizes, sees_nothing
from pallas_kernels.mosaic.choice import choose_tile
from pallas_kernels.mosaic.intervals import Intervals, positions, row_bounds, seen_alone
from pallas_kernels.mosaic.launch import Barriers, Matrix, Scratch, Vectors, check_version, launch, num_programs
from pallas_kernels.mosaic.packing import Packing, pad_keys
from pallas_kernels.mosaic.problem import check_supported
from pallas_kernels.mosaic.products import ROWS, Products, accumulators, down_rows, i32, index, load_numbers, row_index
from pallas_kernels.mosaic.ring import Ring, Schedule
from pallas_kernels.mosaic.softmax import LEAST, LOG2_E, NEVER, softmax_finish, softmax_start, softmax_sums
from pallas_kernels.mosaic.tiles import REGISTERS, UnionTile
from pallas_kernels.selected_attention import tiles
from pallas_kernels.selected_attention.mosaic_union import (
    MOST_BLOCKS,
    MOST_ENTRIES,
    SPLIT,
    Lists,
    entries_of,
    union_lists,
)
from pallas_kernels.tiles import key_of

CONSUMERS = 2
LEAST_GROUP = 8  # members of a block are 16 bits
STEP = 2  # blocks


def forward(
    q: Float[Array, "B Tq H Dk"],
    k: Float[Array, "B T K Dk"],
    v: Float[Array, "B T K Dv"],
    block_indices: Int[Array, "B K Tq n"],
    segment_starts: Int[Array, "B Tq"] | None,
    query_offset: int | Int[Array, ""],
    *,
    config: Sizes,
    scale: float,
    interpret: bool = False,
    tile: UnionTile | None = None,
) -> tuple[Float[Array, "B Tq H Dv"], Float[Array, "B H Tq"]]:
    """(o, lse); see the contract. `tile` overrides the table, for tests and tuning.

    Raises:
      NotImplementedError: a version of JAX, dtype, head size, group size, scale, block size or number of blocks that
        the kernels do not support.
      ValueError: a `tile` that the kernel does not take.
    """
    check_version(interpret)
    check_supported(q, k, v, scale=scale)
    tile = check_sizes(q, k, v, block_indices, config, tile)
    if q.shape[1] == 0:
        return sees_nothing(q, v)
    keys, (k, v) = visible(q, k, v, segment_starts, query_offset)
    queries = CONSUMERS * Packing(q.shape[2] // k.shape[2]).queries
    lists = union_lists(block_indices, keys, config.select_block, queries, interpret)
    return _attend(q, k, v, keys, lists, scale=scale, tile=tile, interpret=interpret)


def check_sizes(
    q: jax.Array, k: jax.Array, v: jax.Array, block_indices: jax.Array, config: Sizes, tile: UnionTile | None = None
) -> UnionTile:
    """The forward pass's tile, after checks of these kernels' own."""
    group = q.shape[2] // k.shape[2]
    if group < LEAST_GROUP:
        raise NotImplementedError(f"query heads per K/V head = {group}: expected at least {LEAST_GROUP}")
    if config.select_block != ROWS:
        raise NotImplementedError(f"select_block = {config.select_block}: expected {ROWS}")
    n, queries = block_indices.shape[3], CONSUMERS * Packing(group).queries
    if entries_of(n, queries) > MOST_ENTRIES:
        raise NotImplementedError(f"block_indices.shape[3] = {n}: expected at most {MOST_ENTRIES // queries}")
    if k.shape[1] > MOST_BLOCKS * ROWS:
        raise NotImplementedError(f"k.shape = {k.shape}: expected at most {MOST_BLOCKS * ROWS} keys")

    def scratch_of(tile: UnionTile) -> tuple[Scratch, ...]:
        return _scratch(tile, Packing(group), q.dtype, q.shape[3], v.shape[3])

    return choose_tile("tile", tile, tiles.MOSAIC_FORWARD, key_of(q, k, v), scratch_of)


def _scratch(tile: UnionTile, packing: Packing, dtype: Any, key_dim: int, value_dim: int) -> tuple[Scratch, ...]:
    return (
        Matrix((CONSUMERS, tile.buffers, ROWS, key_dim), dtype),
        Matrix((tile.slots, STEP * ROWS, key_dim), dtype),
        Matrix((tile.slots, STEP * ROWS, value_dim), dtype),
        Matrix((CONSUMERS, ROWS, value_dim) if value_dim != key_dim else (1, 8, 64), dtype),
        Vectors((CONSUMERS, tile.buffers, 2, ROWS), jnp.int32),
        Vectors((CONSUMERS, ROWS), jnp.float32),
        Barriers(CONSUMERS * tile.buffers, packing.copies + 2),
        Barriers(tile.slots, STEP),
        Barriers(tile.slots, STEP),
        Barriers(tile.slots, CONSUMERS),
        Barriers(tile.slots, CONSUMERS),
    )


def visible(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_starts: jax.Array | None, query_offset: int | jax.Array
) -> tuple[Intervals, tuple[jax.Array, jax.Array]]:
    """The positions that each query may see; keys and values, with zeros for those that none may see."""
    T = k.shape[1]
    end = jnp.minimum(positions(q.shape, query_offset) + 1, T)
    keys = Intervals(jnp.zeros_like(end) if segment_starts is None else jnp.minimum(segment_starts, end), end)
    return keys, seen_alone(k, v, keys, query_offset, q.shape[1] >= T)


def _attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    keys: Intervals,
    lists: Lists,
    *,
    scale: float,
    tile: UnionTile,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    (B, Tq, H, Dk), (_, _, K, Dv) = q.shape, v.shape
    packing = Packing(H // K)
    queries = CONSUMERS * packing.queries
    num_tiles = pl.cdiv(Tq, queries)
    dtype = q.dtype
    o, lse = launch(
        functools.partial(
            _kernel,
            packing=packing,
            schedule=Schedule(num_tiles, B, K, num_programs(interpret), pair_by_pair=True),
            scale=scale,
            buffers=tile.buffers,
            slots=tile.slots,
        ),
        name="selected_attention_forward",
        out_shape=(
            jax.ShapeDtypeStruct((B, Tq, K, H // K, Dv), dtype),
            jax.ShapeDtypeStruct((B * K, num_tiles * CONSUMERS * ROWS), jnp.float32),
        ),
        scratch=_scratch(tile, packing, dtype, Dk, Dv),
        warpgroups=CONSUMERS + 1,
        interpret=interpret,
    )(
        q.reshape(B, Tq, K, H // K, Dk),
        pad_keys(k),
        pad_keys(v),
        *lists,
        row_bounds(keys, num_tiles * queries, packing),
    )
    return o.reshape(B, Tq, H, Dv), packing.unpack(lse, K, Tq)


def _kernel(
    products: Products,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    entries_ref: Any,
    counts_ref: Any,
    bounds_ref: Any,
    o_ref: Any,
    lse_ref: Any,
    q_shared: Any,
    k_shared: Any,
    v_shared: Any,
    o_shared: Any,
    bounds_shared: Any,
    lse_shared: Any,
    q_full: Any,
    k_full: Any,
    v_full: Any,
    k_free: Any,
    v_free: Any,
    *,
    packing: Packing,
    schedule: Schedule,
    scale: float,
    buffers: int,
    slots: int,
) -> None:
    Dk, Dv = q_ref.shape[-1], v_ref.shape[-1]
    queries = CONSUMERS * packing.queries
    consumer_registers, producer_registers = REGISTERS[CONSUMERS]
    warpgroup = lax.axis_index("warpgroup")
    keys_ring, values_ring = Ring(k_full, k_free, slots), Ring(v_full, v_free, slots)
    scale_log2 = scale * LOG2_E
    shape = (ROWS, ROWS)

    def counts_of(i: Any) -> tuple[Any, Any]:
        batch, head, number = schedule.item(i)
        steps, edges = (counts_ref[schedule.pair(batch, head), number, i32(j)] for j in range(2))
        return steps, edges

    @pl.when(warpgroup < CONSUMERS)
    def _consume() -> None:
        plgpu.set_max_registers(consumer_registers, action="increase")
        row_query = row_index() // i32(packing.group)

        def buffer_of(i: Any) -> tuple[Any, Any]:
            buffer = lax.rem(i, i32(buffers))
            return buffer, q_full.at[warpgroup * i32(buffers) + buffer]

        def load_queries(i: Any) -> None:
            batch, head, number = schedule.item(i)
            buffer, full = buffer_of(i)
            first = number * i32(queries) + warpgroup * i32(packing.queries)
            packing.load(q_ref, q_shared.at[warpgroup, buffer], full, batch, first, head)
            rows = pl.ds((number * i32(CONSUMERS) + warpgroup) * i32(ROWS), ROWS)
            for j in range(2):
                plgpu.copy_gmem_to_smem(
                    bounds_ref.at[batch, i32(j), rows], bounds_shared.at[warpgroup, buffer, j], full
                )

        if buffers == 2:
            pl.when(schedule.count() > 0)(lambda: load_queries(i32(0)))

        def work(i: Any, done: Any) -> Any:
            batch, head, number = schedule.item(i)
            buffer, full = buffer_of(i)
            queries_here = q_shared.at[warpgroup, buffer]
            steps, edges = counts_of(i)
            plgpu.wait_smem_to_gmem(0)  # the output before has left the buffer that is filled next
            if buffers == 2:
                pl.when(i + i32(1) < schedule.count())(lambda: load_queries(i + i32(1)))
            else:
                load_queries(i)
            plgpu.barrier_wait(full)
            begin, end = (load_numbers(bounds_shared.at[warpgroup, buffer, j]) for j in range(2))

            def step(j: Any, state: Any, edge: bool) -> Any:
                pair = schedule.pair(batch, head)
                entries = [entries_ref[pair, number, j * i32(STEP) + i32(b)] for b in range(STEP)]
                shift, mask = warpgroup * i32(packing.queries), i32((1 << packing.queries) - 1)
                members = [lax.shift_right_logical(entry, shift) & mask for entry in entries]
                slot = keys_ring.wait_full(done + j)

                def attend(acc: Any, m: Any, total: Any) -> Any:
                    def product(*scores: Any) -> Any:
                        for b, accumulator in enumerate(scores):
                            block = k_shared.at[slot, pl.ds(b * ROWS, ROWS)]
                            plgpu.wgmma(accumulator, queries_here, block.transpose((1, 0)))
                        return [accumulator[...] for accumulator in scores]

                    scores = accumulators(product, *[shape] * STEP)
                    keys_ring.free(done + j)
                    chosen = [((x >> row_query) & i32(1)) == i32(1) for x in members]
                    if edge:
                        first = [lax.shift_right_logical(entry, i32(SPLIT)) * i32(ROWS) for entry in entries]
                        key = index(shape, 1)
                        scores = [
                            jnp.where(
                                (key >= down_rows(begin - at, ROWS)) & (key < down_rows(end - at, ROWS)), s, -jnp.inf
                            )
                            for s, at in zip(scores, first, strict=True)
                        ]
                    m_new = m
                    for s, member in zip(scores, chosen, strict=True):
                        m_new = jnp.where(member, jnp.maximum(m_new, s.max(axis=1) * scale_log2), m_new)
                    decay = jnp.exp2(m - m_new)
                    total = total * down_rows(decay, total.shape[1])
                    weights = []
                    for s, member in zip(scores, chosen, strict=True):
                        reference = jnp.where(member & (m_new > LEAST) if edge else member, m_new, NEVER)
                        p = jnp.exp2(s * scale_log2 - down_rows(reference, ROWS))
                        total = total + softmax_sums(p)
                        weights.append(p.astype(v_shared.dtype))
                    acc = acc * down_rows(decay, Dv)
                    values_ring.wait_full(done + j)
                    values = [v_shared.at[slot, pl.ds(b * ROWS, ROWS)] for b in range(STEP)]
                    acc = products.add(acc, *zip(weights, values, strict=True))
                    values_ring.free(done + j)
                    return acc, m_new, total

                def skip(acc: Any, m: Any, total: Any) -> Any:
                    keys_ring.free(done + j)
                    values_ring.wait_full(done + j)
                    values_ring.free(done + j)
                    return acc, m, total

                return lax.cond(functools.reduce(jnp.bitwise_or, members) != 0, attend, skip, *state)

            state = softmax_start(Dv)
            state = lax.fori_loop(i32(0), edges, functools.partial(step, edge=True), state)
            state = lax.fori_loop(edges, steps, functools.partial(step, edge=False), state)
            o, lse = softmax_finish(*state)
            out = queries_here if Dv == Dk else o_shared.at[warpgroup]
            out[...] = o.astype(o_ref.dtype)
            lse_shared[warpgroup] = lse
            plgpu.commit_smem()
            packing.store(out, o_ref, batch, number * i32(queries) + warpgroup * i32(packing.queries), head)
            rows = pl.ds((number * i32(CONSUMERS) + warpgroup) * i32(ROWS), ROWS)
            statistics = lse_ref.at[schedule.pair(batch, head), rows]
            plgpu.copy_smem_to_gmem(lse_shared.at[warpgroup], statistics, commit_group=False)
            plgpu.commit_smem_to_gmem_group()
            return done + steps

        lax.fori_loop(i32(0), schedule.count(), work, i32(0))
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == CONSUMERS)
    def _produce() -> None:
        plgpu.set_max_registers(producer_registers, action="decrease")

        def work(i: Any, done: Any) -> Any:
            batch, head, number = schedule.item(i)
            steps, _ = counts_of(i)
            pair = schedule.pair(batch, head)

            def step(j: Any, _: Any) -> Any:
                entries = [entries_ref[pair, number, j * i32(STEP) + i32(b)] for b in range(STEP)]
                blocks = [pl.ds(lax.shift_right_logical(entry, i32(SPLIT)) * i32(ROWS), ROWS) for entry in entries]
                for ring, ref, shared in ((keys_ring, k_ref, k_shared), (values_ring, v_ref, v_shared)):
                    slot = ring.wait_free(done + j)
                    for b, at in enumerate(blocks):
                        half = shared.at[slot, pl.ds(b * ROWS, ROWS)]
                        plgpu.copy_gmem_to_smem(ref.at[batch, at, head], half, ring.full_barriers.at[slot])
                return i32(0)

            lax.fori_loop(i32(0), steps, step, i32(0))
            return done + steps

        done = lax.fori_loop(i32(0), schedule.count(), work, i32(0))
        keys_ring.drain(done)
        values_ring.drain(done)
