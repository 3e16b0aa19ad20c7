"""Block selection on the Pallas Mosaic GPU backend: scores, their sums and the best blocks in one kernel.

Two warpgroups score 8 queries each from the same keys. Scores are transposed. The rows of a matrix are 64 blocks, of
which a strided copy brings the c-th compressed token each. Its columns are the heads of the 8 queries, head by head.
The sums over the heads and over a block's tokens are then plain additions of registers. Only the part of a block's last
token that belongs to the next block goes through shared memory. A third warpgroup takes the scores of the 16 queries,
all blocks of a query in one warp, and picks the highest one by one. A fourth one copies.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.block_selection import tiles
from pallas_kernels.compressed_attention.mosaic import visible
from pallas_kernels.contract import Sizes
from pallas_kernels.mosaic.choice import choose_tile
from pallas_kernels.mosaic.intervals import positions
from pallas_kernels.mosaic.launch import (
    COPIED_TO,
    SHARED_MEMORY,
    WARPS,
    Barriers,
    Matrix,
    Scratch,
    Vectors,
    check_version,
    each_warp,
    launch,
    num_programs,
    shared_memory,
)
from pallas_kernels.mosaic.packing import ALIGNMENT, pad_rows
from pallas_kernels.mosaic.problem import check_supported
from pallas_kernels.mosaic.products import (
    OF_COLUMNS,
    ROWS,
    Products,
    along_columns,
    filled,
    i32,
    index,
    load_matrix,
    load_numbers,
    product,
    store_matrix,
)
from pallas_kernels.mosaic.ring import Ring, Schedule
from pallas_kernels.mosaic.softmax import LEAST, LOG2_E, NEVER
from pallas_kernels.mosaic.tiles import ScoreTile
from pallas_kernels.tiles import key_of

QUERIES = 8  # of a scoring warpgroup
SCORING = 2  # warpgroups
BOUNDS = 4  # numbers of a query: those of 8 are 128 bytes, which is what a copy has to start at a multiple of
MOST_BLOCKS = 1088  # that the picking warpgroup holds in registers
MOST_SELECTED = 32  # that one lane each of a warp holds
LARGEST_GROUP = 32
MOST_COLUMNS = 128  # of a product, whose numbers are in registers
_MOST_SLOTS = 5
_REGISTERS = (152, 176, 32)  # of the scoring, the picking and the copying warpgroups
_NONE = 1 << 30  # above every index
# A matrix [blocks, queries] whose columns are in one warp each: 32 blocks by lanes, two queries a warp.
_BY_QUERY = plgpu.Layout.TILED(plgpu.Tiling(((32, 8), (32, 2), (1,))), warp_dims=(-4,), lane_dims=(-3,), vector_dim=-1)


def select_blocks(
    q: Float[Array, "B Tq H Dk"],
    k: Float[Array, "B Nc K Dk"],
    lse: Float[Array, "B H Tq"],
    segment_starts: Int[Array, "B Tq"] | None,
    query_offset: int | Int[Array, ""],
    *,
    config: Sizes,
    scale: float,
    interpret: bool = False,
    tile: ScoreTile | None = None,
) -> Int[Array, "B K Tq n"]:
    """Indices of the blocks that each query reads; see the contract. `tile` overrides the table.

    Raises:
      NotImplementedError: a version of JAX, dtype, head size, group size, scale, or sizes of blocks or number of blocks
        that the kernel does not support.
      ValueError: a `tile` that the kernel does not take.
    """
    check_version(interpret)
    check_supported(q, k, None, scale=scale)
    num_blocks = _check_sizes(q, k, query_offset, config)
    slots = _choose_slots(tile, q, k, num_blocks)
    (B, Tq, _, _), (_, Nc, K, _) = q.shape, k.shape
    if 0 in (Tq, Nc):
        first = jnp.zeros((B, K, Tq, 1), jnp.int32)
        return jnp.pad(first, ((0, 0), (0, 0), (0, 0), (0, config.num_selected - 1)), constant_values=-1)
    run = functools.partial(
        _select, num_blocks=num_blocks, slots=slots, config=config, scale=scale, interpret=interpret
    )
    return run(*lax.stop_gradient((q, k, lse)), segment_starts, query_offset)


def _check_sizes(q: jax.Array, k: jax.Array, query_offset: int | jax.Array, config: Sizes) -> int:
    """How many blocks there can be, after checks of the kernel's own."""
    group, d = q.shape[2] // k.shape[2], config.compress_stride
    if group > LARGEST_GROUP:
        raise NotImplementedError(f"query heads per K/V head = {group}: expected at most {LARGEST_GROUP}")
    if config.compress_block not in (d, 2 * d):
        raise NotImplementedError(
            f"compress_block = {config.compress_block}: expected compress_stride = {d} or twice as much"
        )
    if not config.select_in_window and config.window % config.select_block:
        raise NotImplementedError(
            f"window = {config.window}: expected a multiple of select_block = {config.select_block} without "
            "select_in_window"
        )
    if config.num_selected > MOST_SELECTED:
        raise NotImplementedError(f"num_selected = {config.num_selected}: expected at most {MOST_SELECTED}")
    # The longest sequence with Nc compressed tokens bounds the blocks there can be.
    length = k.shape[1] * d + config.compress_block - 1
    if isinstance(query_offset, int):
        length = min(length, query_offset + q.shape[1])
    num_blocks: int = pl.cdiv(length, config.select_block)
    if num_blocks > MOST_BLOCKS:
        raise NotImplementedError(f"num_blocks = {num_blocks}: expected at most {MOST_BLOCKS}")
    return num_blocks


def _padded(num_blocks: int) -> int:
    return -(-num_blocks // ROWS) * ROWS


def _choose_slots(tile: ScoreTile | None, q: jax.Array, k: jax.Array, num_blocks: int) -> int:
    """Slots of the ring of keys: the tile's, or as many as there is shared memory for."""
    group, head_dim = q.shape[2] // k.shape[2], q.shape[3]
    scratch_of = functools.partial(_scratch, blocks=_padded(num_blocks), group=group, head_dim=head_dim, dtype=q.dtype)
    key = key_of(q, k)
    chosen = choose_tile(
        "tile", tile, tiles.MOSAIC_SELECTION, key, lambda tile: () if tile.slots is None else scratch_of(tile.slots)
    )
    if chosen.slots is not None:
        return chosen.slots
    fitting = [n for n in range(2, _MOST_SLOTS + 1) if shared_memory(scratch_of(n)) <= SHARED_MEMORY]
    if not fitting:
        raise NotImplementedError(
            f"head_dim = {head_dim} with {group} query heads per K/V head and {num_blocks} blocks: expected less"
        )
    return max(fitting)


def _scratch(slots: int, blocks: int, group: int, head_dim: int, dtype: Any) -> tuple[Scratch, ...]:
    return (
        Matrix((SCORING, group * QUERIES, head_dim), dtype),
        Matrix((slots, ROWS, head_dim), dtype),
        Vectors((SCORING, max(COPIED_TO // 4, group * QUERIES)), jnp.float32),
        Vectors((SCORING, BOUNDS, QUERIES), jnp.int32),
        Vectors((SCORING, blocks + 1, QUERIES), jnp.float32),
        Vectors((2, SCORING, BOUNDS, QUERIES), jnp.int32),
        Vectors((SCORING, MOST_SELECTED, QUERIES), jnp.int32),
        Barriers(1, SCORING * (group + 2)),
        Barriers(1, SCORING),
        Barriers(slots, WARPS),
        Barriers(slots, SCORING),
        Barriers(SCORING),
        Barriers(SCORING),
        Barriers(2, SCORING),
    )


def _select(
    q: jax.Array,
    k: jax.Array,
    lse: jax.Array,
    segment_starts: jax.Array | None,
    query_offset: int | jax.Array,
    *,
    num_blocks: int,
    slots: int,
    config: Sizes,
    scale: float,
    interpret: bool,
) -> jax.Array:
    (B, Tq, H, Dk), K = q.shape, k.shape[2]
    group, per_block = H // K, config.select_block // config.compress_stride
    keys, (k, _) = visible(q, k, k, segment_starts, query_offset, config)
    queries = SCORING * QUERIES
    num_tiles = pl.cdiv(Tq, queries)
    padded = num_tiles * queries
    own = positions(q.shape, query_offset) // config.select_block
    first = jnp.zeros_like(own) if segment_starts is None else segment_starts // config.select_block
    # Of each query: the first key it sees and one past the last, its first and its last candidate.
    bounds = jnp.pad(
        jnp.stack([keys.begin, keys.end, first, own], axis=1), ((0, 0), (0, 0), (0, padded - Tq)), mode="edge"
    )
    begin, end = (bounds[:, j].reshape(B, num_tiles, queries) for j in range(2))
    chunk = ROWS * per_block
    chunks = jnp.stack([begin[:, :, 0] // chunk, -(-end[:, :, -1] // chunk)], axis=-1)
    bounds = bounds.reshape(B, BOUNDS, padded // QUERIES, QUERIES).swapaxes(1, 2)
    grouped = pad_rows(q.reshape(B, Tq, K, group, Dk), -(-Tq // ALIGNMENT) * ALIGNMENT)
    strided = pad_rows(k, -(-k.shape[1] // (ALIGNMENT * per_block)) * ALIGNMENT * per_block)
    strided = strided.reshape(B, -1, per_block, K, Dk)
    columns = jnp.pad(lse, ((0, 0), (0, 0), (0, padded - Tq))).reshape(B, K, group, padded // QUERIES, QUERIES)
    columns = columns.swapaxes(2, 3).reshape(B * K, padded * group)
    blocks = _padded(num_blocks)
    n = config.num_selected
    chosen = launch(
        functools.partial(
            _kernel,
            config=config,
            scale_log2=scale * LOG2_E,
            schedule=Schedule(num_tiles, B, K, num_programs(interpret)),
            blocks=blocks,
            slots=slots,
            group=group,
        ),
        name="block_selection",
        out_shape=(jax.ShapeDtypeStruct((B * K, padded // QUERIES, MOST_SELECTED, QUERIES), jnp.int32),),
        scratch=_scratch(slots, blocks, group, Dk, q.dtype),
        warpgroups=SCORING + 2,
        interpret=interpret,
    )(grouped, strided, columns, bounds, chunks)[0]
    chosen = chosen[:, :, :n].swapaxes(2, 3).reshape(B, K, padded, n)
    return chosen[:, :, :Tq]


def _kernel(
    products: Products,
    q_ref: Any,
    k_ref: Any,
    lse_ref: Any,
    bounds_ref: Any,
    chunks_ref: Any,
    chosen_ref: Any,
    q_shared: Any,
    k_shared: Any,
    lse_shared: Any,
    bounds_shared: Any,
    scores_shared: Any,
    candidates_shared: Any,
    chosen_shared: Any,
    q_full: Any,
    q_free: Any,
    k_full: Any,
    k_free: Any,
    scores_full: Any,
    scores_free: Any,
    candidates_full: Any,
    *,
    config: Sizes,
    scale_log2: float,
    schedule: Schedule,
    blocks: int,
    slots: int,
    group: int,
) -> None:
    warpgroup = lax.axis_index("warpgroup")
    ring = Ring(k_full, k_free, slots)
    per_block = config.select_block // config.compress_stride
    overlap = config.compress_block != config.compress_stride
    columns = group * QUERIES
    width = min(columns, MOST_COLUMNS)
    parts = [pl.ds(first, width) for first in range(0, columns, width)]

    def token(turn: Any) -> Any:
        """Of each block: its last one comes first, as its other half waits in shared memory for the rest."""
        return lax.rem(turn + i32(per_block - 1), i32(per_block))

    def chunks_of(i: Any) -> tuple[Any, Any]:
        batch, _, tile = schedule.item(i)
        begin, end = (chunks_ref[batch, tile, i32(j)] for j in range(2))
        return begin, jnp.maximum(end, begin)

    def copy(warp: Any) -> None:
        # Each warp has its part in every tile and in every slot, so that none falls behind a phase of a barrier.
        part = pl.ds(warp * i32(ROWS // WARPS), ROWS // WARPS)

        def by(turn: int, source: Any, shared: Any) -> None:
            run = functools.partial(plgpu.copy_gmem_to_smem, source, shared, q_full)
            pl.when(warp == i32(turn % WARPS))(run)

        def work(i: Any, done: Any) -> Any:
            batch, head, tile = schedule.item(i)
            begin, end = chunks_of(i)
            pl.when(i > 0)(lambda: plgpu.barrier_wait(q_free))
            for w in range(SCORING):
                eight = tile * i32(SCORING) + i32(w)
                rows = pl.ds(eight * i32(QUERIES), QUERIES)
                for g in range(group):
                    by(g, q_ref.at[batch, rows, head, i32(g)], q_shared.at[w, pl.ds(QUERIES * g, QUERIES)])
                statistics = lse_ref.at[schedule.pair(batch, head), pl.ds(eight * i32(columns), columns)]
                by(2 * w, statistics, lse_shared.at[w, pl.ds(0, columns)])
                by(2 * w + 1, bounds_ref.at[batch, eight], bounds_shared.at[w])

            def step(j: Any, _: Any) -> Any:
                chunk, c = begin + lax.div(j, i32(per_block)), token(lax.rem(j, i32(per_block)))
                slot = ring.wait_free(done + j)
                rows = pl.ds(chunk * i32(ROWS) + warp * i32(ROWS // WARPS), ROWS // WARPS)
                plgpu.copy_gmem_to_smem(k_ref.at[batch, rows, c, head], k_shared.at[slot, part], k_full.at[slot])
                return i32(0)

            copied = (end - begin) * i32(per_block)
            lax.fori_loop(i32(0), copied, step, i32(0))
            return done + copied

        done = lax.fori_loop(i32(0), schedule.count(), work, i32(0))
        ring.drain(done)
        pl.when(schedule.count() > 0)(lambda: plgpu.barrier_wait(q_free))

    @pl.when(warpgroup < SCORING)
    def _score() -> None:
        plgpu.set_max_registers(_REGISTERS[0], action="increase")

        def work(i: Any, done: Any) -> Any:
            begin, end = chunks_of(i)
            plgpu.barrier_wait(q_full)
            lse = [load_numbers(lse_shared.at[warpgroup, part], OF_COLUMNS) for part in parts]
            lse_log2 = [jnp.where(x > LEAST, x * LOG2_E, NEVER) for x in lse]
            first, stop = (load_numbers(bounds_shared.at[warpgroup, j], OF_COLUMNS) for j in range(2))
            pl.when(i > 0)(lambda: plgpu.barrier_wait(scores_free.at[warpgroup]))

            def importance(chunk: Any, turn: Any) -> Any:
                """Of one token of each of 64 blocks, summed over the heads: [64, 8]."""
                count = done + (chunk - begin) * i32(per_block) + turn
                slot = ring.wait_full(count)
                sums = []
                for part, normaliser in zip(parts, lse_log2, strict=True):
                    s = product(k_shared.at[slot], q_shared.at[warpgroup, part].transpose((1, 0)), (ROWS, width))
                    if part is parts[-1]:
                        ring.free(count)
                    p = jnp.exp2(s * scale_log2 - along_columns(normaliser, ROWS))
                    of_head = [p[:, QUERIES * g : QUERIES * (g + 1)] for g in range(width // QUERIES)]
                    while len(of_head) > 1:  # always the same tree
                        of_head = [x + y for x, y in zip(of_head[::2], of_head[1::2], strict=True)]
                    sums += of_head
                total = functools.reduce(jnp.add, sums)
                key = (index((ROWS, QUERIES), 0) + chunk * i32(ROWS)) * i32(per_block) + token(turn)
                seen = (key >= along_columns(first, ROWS)) & (key < along_columns(stop, ROWS))
                return jnp.where(seen, total, 0.0)

            def pool(chunk: Any, _: Any) -> Any:
                row = chunk * i32(ROWS)

                def at(offset: int) -> Any:
                    return _rows(scores_shared.at[warpgroup], row + i32(offset), ROWS)

                def add(turn: Any, total: Any) -> Any:
                    part = importance(chunk, turn)
                    if not overlap:
                        return total + part

                    # A token covers two strides. Those of a block's last token, which comes first, lie in the block
                    # and in the next one.
                    @pl.when(turn == 0)
                    def _next() -> None:
                        at(1)[...] = part
                        plgpu.commit_smem()

                    return total + jnp.where(turn == 0, 1.0, 2.0) * part

                total = lax.fori_loop(i32(0), i32(per_block), add, filled((ROWS, QUERIES), 0))
                if overlap:
                    from_before = load_matrix(at(0))
                    block = index((ROWS, QUERIES), 0) + row
                    total += jnp.where(block > begin * i32(ROWS), from_before, 0.0)
                    plgpu.commit_smem()
                at(0)[...] = total
                return i32(0)

            lax.fori_loop(begin, end, pool, i32(0))
            plgpu.commit_smem()
            plgpu.barrier_arrive(q_free)
            plgpu.barrier_arrive(scores_full.at[warpgroup])
            return done + (end - begin) * i32(per_block)

        lax.fori_loop(i32(0), schedule.count(), work, i32(0))
        pl.when(schedule.count() > 0)(lambda: plgpu.barrier_wait(scores_free.at[warpgroup]))

    @pl.when(warpgroup == SCORING)
    def _pick() -> None:
        plgpu.set_max_registers(_REGISTERS[1], action="increase")

        def eights(i: Any) -> list[Any]:
            return [schedule.item(i)[2] * i32(SCORING) + i32(w) for w in range(SCORING)]

        def load_candidates(i: Any) -> None:
            batch, buffer = schedule.item(i)[0], lax.rem(i, i32(2))
            for w, eight in enumerate(eights(i)):
                plgpu.copy_gmem_to_smem(
                    bounds_ref.at[batch, eight], candidates_shared.at[buffer, w], candidates_full.at[buffer]
                )

        pl.when(schedule.count() > 0)(lambda: load_candidates(i32(0)))

        def work(i: Any, _: Any) -> Any:
            batch, head, _ = schedule.item(i)
            begin, end = chunks_of(i)
            buffer = lax.rem(i, i32(2))
            pl.when(i + i32(1) < schedule.count())(lambda: load_candidates(i + i32(1)))
            plgpu.barrier_wait(candidates_full.at[buffer])
            scored = []
            for w in range(SCORING):
                first, own = (load_numbers(candidates_shared.at[buffer, w, j], _BY_QUERY.reduce(0)) for j in (2, 3))
                plgpu.barrier_wait(scores_full.at[w])
                x = load_matrix(_rows(scores_shared.at[w], 0, blocks), _BY_QUERY)
                plgpu.barrier_arrive(scores_free.at[w])
                scored.append((x, first, own))
            chosen = _best(scored, begin * i32(ROWS), end * i32(ROWS), config)
            plgpu.wait_smem_to_gmem(0)
            for w in range(SCORING):
                store_matrix(chosen_shared.at[w], chosen[w])
            plgpu.commit_smem()
            for w, eight in enumerate(eights(i)):
                plgpu.copy_smem_to_gmem(chosen_shared.at[w], chosen_ref.at[schedule.pair(batch, head), eight])
            return i32(0)

        lax.fori_loop(i32(0), schedule.count(), work, i32(0))
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == SCORING + 1)
    def _copy() -> None:
        plgpu.set_max_registers(_REGISTERS[2], action="decrease")
        each_warp(copy)


def _rows(scores: Any, first: Any, number: int) -> Any:
    """So many blocks' scores from the first on, [number, 8].

    The compiler would swizzle rows of 8 columns by their place in a slice, so that a slice which begins one row further
    finds other columns (JAX 0.11.2). It does not where it cannot tell which columns are meant: that they begin at 0.
    """
    first_column = lax.shift_right_logical(lax.axis_index("warpgroup"), i32(8))
    return scores.at[pl.ds(first, number), pl.ds(first_column, QUERIES)]


def _best(scored: list[tuple[Any, Any, Any]], begin: Any, end: Any, config: Sizes) -> tuple[Any, ...]:
    """The chosen blocks of queries by the eight, ascending, int32 [32, 8] each, and -1 where there are fewer.

    Of eight queries, scored are the importances [blocks, 8], which are defined for blocks begin .. end - 1, and the
    queries' first and last candidates [8]. The rounds of one eight run while the other's wait for another lane.
    """
    shape = scored[0][0].shape
    block = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=_BY_QUERY)
    place = plgpu.broadcasted_iota(jnp.int32, (MOST_SELECTED, QUERIES), 0, layout=_BY_QUERY)
    taken, never = -1.0, -2.0  # in place of an importance
    num_forced = config.num_init + config.num_local

    def of_query(y: Any, rows: int) -> Any:
        return lax.broadcast_in_dim(y, (rows, QUERIES), (1,))

    def start(x: Any, first: Any, own: Any) -> tuple[Any, Any]:
        """(importances of what is left to choose from, the forced blocks)."""
        x = jnp.where((block >= begin) & (block < end), x, 0.0)
        low, high = of_query(first, shape[0]), of_query(own, shape[0])
        forced = (block < low + i32(config.num_init)) | (block > high - i32(config.num_local))
        x = jnp.where(forced, taken, x)
        last = high if config.select_in_window else high - i32(config.window // config.select_block)
        x = jnp.where((block >= low) & (block <= last), x, never)
        # The forced blocks, each once: those at the start that are not among those at the end.
        low, high = of_query(first, MOST_SELECTED), of_query(own, MOST_SELECTED)
        at_start = low + place
        at_end = high - (place - i32(config.num_init))
        is_start = (place < i32(config.num_init)) & (at_start <= high - i32(config.num_local))
        is_end = (place >= i32(config.num_init)) & (place < i32(num_forced)) & (at_end >= low)
        return x, jnp.where(is_end, at_end, jnp.where(is_start, at_start, i32(_NONE)))

    def pick(i: Any, x: Any, found: Any) -> tuple[Any, Any]:
        best = x.max(axis=0)
        b = jnp.where(x == of_query(best, shape[0]), block, i32(_NONE)).min(axis=0)  # of equal ones, the first
        b = jnp.where(best >= 0.0, b, i32(_NONE))
        found = jnp.where(place == i + i32(num_forced), of_query(b, MOST_SELECTED), found)
        return jnp.where(block == of_query(b, shape[0]), taken, x), found

    def sort(i: Any, found: Any, least: Any, result: Any) -> tuple[Any, Any, Any]:
        above = jnp.where(found > of_query(least, MOST_SELECTED), found, i32(_NONE))
        least = above.min(axis=0)
        value = jnp.where(least < i32(_NONE), least, i32(-1))
        return found, least, jnp.where(place == i, of_query(value, MOST_SELECTED), result)

    def rounds(number: int, body: Any, state: Any) -> Any:
        return lax.fori_loop(i32(0), i32(number), lambda i, state: tuple(body(i, *each) for each in state), state)

    left = rounds(config.num_selected - num_forced, pick, tuple(start(*each) for each in scored))
    nothing = plgpu.layout_cast(jnp.full((MOST_SELECTED, QUERIES), -1, jnp.int32), _BY_QUERY)
    unsorted = tuple((found, first - i32(1), nothing) for (_, found), (_, first, _) in zip(left, scored, strict=True))
    return tuple(result for _, _, result in rounds(config.num_selected, sort, unsorted))
