"""Selected attention on the Pallas Mosaic GPU backend: the backward pass.

The gradient of the queries walks along the lists of the forward pass. The gradients of keys and values take one block
at a time and gather the queries that chose it. Nothing is added atomically: each work item writes its own float32
partial sums, and a kernel adds those of a block in order.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.contract import Gradients, Sizes, gradients_of_nothing
from pallas_kernels.mosaic.choice import choose_gradient_tile
from pallas_kernels.mosaic.intervals import Intervals
from pallas_kernels.mosaic.launch import (
    WARPS,
    Barriers,
    Matrix,
    Scratch,
    Vectors,
    check_version,
    each_warp,
    launch,
    num_programs,
)
from pallas_kernels.mosaic.packing import Packing, pad_keys
from pallas_kernels.mosaic.problem import check_supported
from pallas_kernels.mosaic.products import (
    OF_COLUMNS,
    ROWS,
    Products,
    accumulators,
    along_columns,
    column_index,
    i32,
    index,
    load_numbers,
    product,
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
from pallas_kernels.selected_attention import tiles
from pallas_kernels.selected_attention.mosaic import STEP, check_sizes, visible
from pallas_kernels.selected_attention.mosaic_items import Items, cut_into_items
from pallas_kernels.selected_attention.mosaic_union import SPLIT, union_lists
from pallas_kernels.tiles import Table

# Up to 256 for keys and values together, a consumer holds both gradients, (Dk + Dv) / 2 registers of each of its
# threads, beside 64 for a step's scores and their gradients. Above, two consumers take the same item and make a
# gradient each. Matrices in shared memory, of the 227 KiB that there are:
#
#   Dk, Dv    teams  registers  blocks held  queries and gradients
#   64, 64      2       128        32 KiB    2 x 16 KiB for each slot
#   128, 128    2       192        64 KiB    2 x 32 KiB for each slot
#   192, 128    1       160        40 KiB        40 KiB for each slot
#   256, 256    1       192        64 KiB        64 KiB for each slot
LARGEST_HEADS = 256
_SUM_WARPGROUPS = 4
_SUMMED = 4096  # numbers that a warpgroup adds at a time


def backward(
    q: Float[Array, "B Tq H Dk"],
    k: Float[Array, "B T K Dk"],
    v: Float[Array, "B T K Dv"],
    block_indices: Int[Array, "B K Tq n"],
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
    query_tile: RingTile | None = None,
    key_tile: PartialTile | None = None,
) -> Gradients:
    """(dq, dk, dv, delta) of gate * o and of lse; see the contract. Tiles override the tables.

    Raises:
      NotImplementedError: a version of JAX, dtype, head size, group size, scale, block size or number of blocks that
        the kernels do not support.
      ValueError: a tile that the kernel does not take.
    """
    check_version(interpret, CONSUMERS + 1 + WARPS)
    check_supported(q, k, v, scale=scale)
    check_sizes(q, k, v, block_indices, config)
    query_tile = choose_query_tile(query_tile, tiles.MOSAIC_QUERY_GRADIENT, q, k, v, gate is not None)
    key_tile = choose_key_tile(key_tile, tiles.MOSAIC_KEY_GRADIENT, q, k, v, gate is not None)
    if 0 in (q.shape[1], k.shape[1]):
        return gradients_of_nothing(q, k, v, dq)
    (B, Tq, H, _), K = q.shape, k.shape[2]
    packing = Packing(H // K)
    keys, (k_seen, v_seen) = visible(q, k, v, segment_starts, query_offset)
    statistics, delta = statistics_of(o, lse, do, dlse, gate, K, packing)
    queries = CONSUMERS * packing.queries
    lists = union_lists(block_indices, keys, config.select_block, queries, interpret)

    def grouped(x: jax.Array) -> jax.Array:
        return x.reshape(B, Tq, K, H // K, x.shape[3])

    arrays = (grouped(q), grouped(do), pad_keys(k_seen), pad_keys(v_seen))
    options: dict[str, Any] = dict(packing=packing, scale=scale, interpret=interpret)
    dq = query_gradient(
        *arrays,
        statistics,
        keys,
        lists,
        None if dq is None else grouped(dq),
        path_of=_path,
        pair_by_pair=True,
        tile=query_tile,
        name="selected_attention_query_gradient",
        **options,
    )
    items = cut_into_items(
        block_indices,
        keys,
        segments=segment_starts is not None,
        block=config.select_block,
        num_blocks=pl.cdiv(k.shape[1], ROWS),
        size=key_tile.queries or Tq,
        step=packing.queries,
        workers=num_programs(interpret) * _teams(q.shape[3], v.shape[3]),
        spare=2 * max(packing.queries, WARPS),  # as warps look ahead
    )
    partials = _key_gradients(*arrays, statistics, keys, items, tile=key_tile, **options)
    dk, dv = (x[:, : k.shape[1]] for x in _add_items(partials, items, K, q.dtype, interpret))
    return Gradients(dq.reshape(q.shape), dk, dv, delta)


def _path(refs: Any, batch: Any, pair: Any, number: Any) -> Path:
    """The union of the blocks that a tile's queries chose."""
    entries_ref, counts_ref = refs
    steps, edges = (counts_ref[pair, number, i32(j)] * i32(STEP) for j in range(2))

    def step(j: Any) -> tuple[Any, Any]:
        entry = entries_ref[pair, number, j]
        return lax.shift_right_logical(entry, i32(SPLIT)) * i32(ROWS), entry

    return Path(steps, ((i32(0), edges, True), (edges, steps, False)), step)


def _teams(key_dim: int, value_dim: int) -> int:
    """Each consumer by itself, or, where one cannot hold both gradients, two that make one each."""
    return CONSUMERS if key_dim + value_dim <= LARGEST_HEADS else 1


def choose_key_tile(
    tile: PartialTile | None, table: Table, q: jax.Array, k: jax.Array, v: jax.Array, gated: bool
) -> PartialTile:
    """`key_tile`, or the table's; see `choose_gradient_tile`."""
    return choose_gradient_tile("key_tile", tile, table, q, k, v, gated, _scratch)


def _scratch(
    tile: PartialTile, packing: Packing, dtype: Any, key_dim: int, value_dim: int, num_known: int
) -> tuple[Scratch, ...]:
    teams = _teams(key_dim, value_dim)
    return (
        Matrix((teams, ROWS, key_dim), dtype),
        Matrix((teams, ROWS, value_dim), dtype),
        Matrix((teams * tile.slots, ROWS, key_dim), dtype),
        Matrix((teams * tile.slots, ROWS, value_dim), dtype),
        Vectors((teams * tile.slots, num_known, ROWS), jnp.float32),
        Barriers(teams, 2),
        Barriers(teams, CONSUMERS // teams),
        Barriers(teams * tile.slots, 2 * packing.queries + num_known),
        Barriers(teams * tile.slots, CONSUMERS // teams),
    )


def _key_gradients(
    q: jax.Array,
    do: jax.Array,
    k: jax.Array,
    v: jax.Array,
    statistics: Statistics,
    keys: Intervals,
    items: Items,
    *,
    tile: PartialTile,
    packing: Packing,
    scale: float,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """What each item adds to dk, float32 [B K, items, 64, Dk], and to dv. Items that are not used hold anything."""
    (B, _, K, G, Dk), Dv = q.shape, v.shape[3]
    num_items = items.table.shape[1]

    def listed(x: jax.Array) -> jax.Array:  # [B K, rows], in the order of the lists
        x = jnp.take_along_axis(x.reshape(B * K, -1, G), items.queries[:, :, None], axis=1)
        return x.reshape(B * K, -1)

    known = tuple(listed(x) for x in statistics.arrays())
    partials: tuple[jax.Array, jax.Array] = launch(
        functools.partial(
            _key_gradient_kernel,
            packing=packing,
            schedule=Schedule(num_items, B, K, num_programs(interpret), pair_by_pair=True),
            scale=scale,
            teams=_teams(Dk, Dv),
            slots=tile.slots,
            gated=statistics.gate is not None,
        ),
        name="selected_attention_key_gradient",
        out_shape=tuple(jax.ShapeDtypeStruct((B * K, num_items, ROWS, size), jnp.float32) for size in (Dk, Dv)),
        scratch=_scratch(tile, packing, q.dtype, Dk, Dv, len(known)),
        warpgroups=CONSUMERS + 1,
        interpret=interpret,
    )(q, do, k, v, items.table, items.queries, jnp.stack(keys, axis=1), *known)
    return partials


def _add_items(
    partials: tuple[jax.Array, jax.Array], items: Items, num_kv_heads: int, dtype: Any, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    """dk [B, blocks x 64, K, Dk] and dv: the sums over the items of each block."""
    pairs, num_items, rows, _ = partials[0].shape
    num_blocks, sizes = items.block_items.shape[1] - 1, [x.shape[3] for x in partials]
    sums = launch(
        functools.partial(_sum_kernel, programs=num_programs(interpret)),
        name="selected_attention_key_gradient_sum",
        out_shape=tuple(jax.ShapeDtypeStruct((pairs, num_blocks, rows * size), dtype) for size in sizes),
        scratch=(),
        warpgroups=_SUM_WARPGROUPS,
        interpret=interpret,
    )(items.block_items, *(x.reshape(pairs, num_items, -1) for x in partials))
    shape = (pairs // num_kv_heads, num_kv_heads, num_blocks * rows)
    dk, dv = (jnp.swapaxes(x.reshape(*shape, size), 1, 2) for x, size in zip(sums, sizes, strict=True))
    return dk, dv


def _key_gradient_kernel(
    products: Products,
    q_ref: Any,
    do_ref: Any,
    k_ref: Any,
    v_ref: Any,
    table_ref: Any,
    queries_ref: Any,
    bounds_ref: Any,
    *refs: Any,
    packing: Packing,
    schedule: Schedule,
    scale: float,
    teams: int,
    slots: int,
    gated: bool,
) -> None:
    known_refs, refs = refs[: 2 + gated], refs[2 + gated :]
    dk_ref, dv_ref, k_shared, v_shared, q_shared, do_shared, known_shared, *barriers = refs
    held_full, held_free, full, free = barriers
    Dk, Dv, Tq, queries = q_ref.shape[-1], v_ref.shape[-1], q_ref.shape[1], packing.queries
    warpgroup = lax.axis_index("warpgroup")
    shape = (ROWS, ROWS)

    def rings(team: Any) -> tuple[Ring, Ring]:
        """Of queries, and of the block that is held."""
        return Ring(full, free, slots, team * i32(slots)), Ring(held_full, held_free, 1, team)

    def work_off(team: Any, attend: Any) -> tuple[Any, Any]:
        """Calls attend(batch, head, item's fields, steps before, items before) for every item; returns the totals."""

        def work(turn: Any, carry: Any) -> Any:
            done, taken = carry
            batch, head, number = schedule.item(turn * i32(teams) + team)
            fields = [table_ref[schedule.pair(batch, head), number, i32(j)] for j in range(6)]
            steps = lax.div(fields[2] + i32(queries - 1), i32(queries))
            pl.when(steps > 0)(lambda: attend(batch, head, fields, steps, done, taken))
            return done + steps, taken + jnp.where(steps > 0, i32(1), i32(0))

        turns = lax.div(schedule.count() + (i32(teams - 1) - team), i32(teams))
        totals: tuple[Any, Any] = lax.fori_loop(i32(0), turns, work, (i32(0), i32(0)))
        return totals

    def consume(team: Any, makes_dk: bool, makes_dv: bool) -> None:
        ring, held = rings(team)

        def attend(batch: Any, head: Any, fields: Any, steps: Any, done: Any, taken: Any) -> None:
            pair = schedule.pair(batch, head)
            block, first, length, inner, outer, place = fields
            held.wait_full(taken)
            keys_here, values_here = k_shared.at[team], v_shared.at[team]

            def bounds_of(j: Any) -> list[list[Any]]:
                """Which keys of the block the queries of a step see: the first of each, and one past the last."""
                entries = [j * i32(queries) + i32(i) for i in range(queries)]
                listed = [queries_ref[pair, first + entry] for entry in entries]
                return [
                    [
                        jnp.where(entry < length, bounds_ref[batch, i32(side), query] - block * i32(ROWS), i32(0))
                        for entry, query in zip(entries, listed, strict=True)
                    ]
                    for side in range(2)
                ]

            def seen(bounds: list[list[Any]]) -> Any:
                key, column = index(shape, 0), packing.query_of(column_index())
                begin, end = column, column
                for i, (low, high) in enumerate(zip(*bounds, strict=True)):
                    begin, end = (jnp.where(column == i32(i), *x) for x in ((low, begin), (high, end)))
                return (key >= along_columns(begin, ROWS)) & (key < along_columns(end, ROWS))

            def body(*totals: Any) -> Any:
                def step(j: Any, carry: Any, edge: bool) -> Any:
                    bounds = bounds_of(j) if edge else []  # on their way during the products
                    slot = ring.wait_full(done + j)
                    queries_here, do_here = q_shared.at[slot], do_shared.at[slot]
                    lse_log2, delta, *gate = (
                        functools.partial(load_numbers, known_shared.at[slot, c], OF_COLUMNS) for c in range(2 + gated)
                    )

                    def weights(s: Any) -> Any:
                        return jnp.exp2(s * (scale * LOG2_E) - along_columns(lse_log2(), ROWS))

                    scores_of = (keys_here, queries_here.transpose((1, 0)))
                    if makes_dk:
                        p, dp = two_products(scores_of, (values_here, do_here.transpose((1, 0))), weights, shape)
                    else:
                        p = weights(product(*scores_of, shape))
                    if edge:
                        p = jnp.where(seen(bounds), p, 0.0)
                    if gated:
                        p = p * along_columns(gate[0](), ROWS)
                    if makes_dv:
                        products.issue(totals[-1], p.astype(q_ref.dtype), do_here)
                    if makes_dk:
                        ds = p * (dp - along_columns(delta(), ROWS))
                        products.issue(totals[0], ds.astype(q_ref.dtype), queries_here)
                    plgpu.wgmma_wait(0)
                    ring.free(done + j)
                    return carry

                for low, high, edge in ((i32(0), inner, True), (inner, outer, False), (outer, steps, True)):
                    lax.fori_loop(low, high, functools.partial(step, edge=edge), i32(0))
                return [total[...] for total in totals]

            shapes = [(ROWS, Dk)] * makes_dk + [(ROWS, Dv)] * makes_dv
            totals = accumulators(body, *shapes)
            held.free(taken)
            if makes_dk:
                dk_ref[pair, place] = totals[0] * scale
            if makes_dv:
                dv_ref[pair, place] = totals[-1]

        work_off(team, attend)

    # Of a team, those that have a query to copy in every step: others could fall behind a phase of a barrier.
    warps = min(WARPS // teams, queries)

    def produce(warp: Any) -> None:
        team, part = lax.div(warp, i32(WARPS // teams)), lax.rem(warp, i32(WARPS // teams))
        pl.when(part < i32(warps))(functools.partial(produce_part, team, part))

    def produce_part(team: Any, part: Any) -> None:
        ring, held = rings(team)
        turns = range(pl.cdiv(queries, warps))

        def attend(batch: Any, head: Any, fields: Any, steps: Any, done: Any, taken: Any) -> None:
            pair = schedule.pair(batch, head)
            block, first, length, *_ = fields
            held.wait_free(taken)
            for i, (ref, shared) in enumerate(((k_ref, k_shared), (v_ref, v_shared))):
                source = ref.at[batch, pl.ds(block * i32(ROWS), ROWS), head]
                copy = functools.partial(plgpu.copy_gmem_to_smem, source, shared.at[team], held_full.at[team])
                pl.when(part == i32(i % warps))(copy)

            def gathered(j: Any) -> tuple[Any, ...]:
                """The queries that this warp copies in a step, past the last one where the item has ended."""
                entries = [j * i32(queries) + i32(warps * turn) + part for turn in turns]
                return tuple(jnp.where(x < length, queries_ref[pair, first + x], i32(Tq)) for x in entries)

            def step(j: Any, ahead: Any) -> Any:
                slot = ring.wait_free(done + j)

                def copy(turn: int) -> None:
                    rows = pl.ds((i32(warps * turn) + part) * i32(packing.group), packing.group)
                    for ref, shared in ((q_ref, q_shared), (do_ref, do_shared)):
                        source = ref.at[batch, ahead[turn], head]
                        plgpu.copy_gmem_to_smem(source, shared.at[slot, rows], full.at[slot])

                for turn in turns:
                    pl.when(i32(warps * turn) + part < i32(queries))(functools.partial(copy, turn))
                rows = pl.ds((first + j * i32(queries)) * i32(packing.group), ROWS)
                for c, ref in enumerate(known_refs):
                    source, shared = ref.at[pair, rows], known_shared.at[slot, c]
                    copy_known = functools.partial(plgpu.copy_gmem_to_smem, source, shared, full.at[slot])
                    pl.when(part == i32(c % warps))(copy_known)
                return gathered(j + i32(1))  # so that the next step does not wait for them

            lax.fori_loop(i32(0), steps, step, gathered(i32(0)))

        done, taken = work_off(team, attend)
        ring.drain(done)
        held.drain(taken)

    @pl.when(warpgroup < CONSUMERS)
    def _consume() -> None:
        plgpu.set_max_registers(REGISTERS[CONSUMERS][0], action="increase")
        if teams == CONSUMERS:
            consume(warpgroup, True, True)
        else:
            pl.when(warpgroup == 0)(lambda: consume(i32(0), True, False))
            pl.when(warpgroup == 1)(lambda: consume(i32(0), False, True))

    @pl.when(warpgroup == CONSUMERS)
    def _produce() -> None:
        plgpu.set_max_registers(REGISTERS[CONSUMERS][1], action="decrease")
        each_warp(produce)


def _sum_kernel(
    products: Products,
    block_items_ref: Any,
    dk_items_ref: Any,
    dv_items_ref: Any,
    dk_ref: Any,
    dv_ref: Any,
    *,
    programs: int,
) -> None:
    """Adds the partial sums of a block, item by item."""
    pairs, num_blocks, _ = dk_ref.shape
    mine = lax.axis_index("program") * i32(_SUM_WARPGROUPS) + lax.axis_index("warpgroup")
    layout = plgpu.Layout.WG_STRIDED((_SUMMED,), vec_size=4)

    def work(j: Any, _: Any) -> Any:
        number = mine + j * i32(_SUM_WARPGROUPS * programs)
        pair, block = lax.div(number, i32(num_blocks)), lax.rem(number, i32(num_blocks))
        first, end = (block_items_ref[pair, block + i32(i)] for i in range(2))
        for items_ref, ref in ((dk_items_ref, dk_ref), (dv_items_ref, dv_ref)):
            for at in range(0, ref.shape[2], _SUMMED):
                part = pl.ds(at, _SUMMED)

                def add(item: Any, total: Any, items_ref: Any = items_ref, part: Any = part) -> Any:
                    return total + load_numbers(items_ref.at[pair, item, part], layout)

                total = plgpu.layout_cast(jnp.zeros((_SUMMED,), jnp.float32), layout)
                ref[pair, block, part] = lax.fori_loop(first, end, add, total).astype(ref.dtype)
        return i32(0)

    left = i32(pairs * num_blocks + _SUM_WARPGROUPS * programs - 1) - mine
    lax.fori_loop(i32(0), lax.div(left, i32(_SUM_WARPGROUPS * programs)), work, i32(0))
