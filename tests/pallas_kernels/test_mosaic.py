"""What is particular to the Mosaic GPU kernels: when they are faster, their tiles, and how lists are cut."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nsa_jax import NSAConfig, window_attention
from pallas_kernels.compressed_attention import tiles as compressed_tiles
from pallas_kernels.mosaic import interval_backward, interval_forward
from pallas_kernels.mosaic.faster import FASTER, Call, Row, check_faster
from pallas_kernels.mosaic.query_gradient import choose_query_tile
from pallas_kernels.mosaic.tiles import IntervalTile, PartialTile, RingTile, ScoreTile, UnionTile
from pallas_kernels.selected_attention import mosaic_backward
from pallas_kernels.selected_attention import tiles as selected_tiles
from pallas_kernels.selected_attention.mosaic import LEAST_GROUP, check_sizes, visible
from pallas_kernels.selected_attention.mosaic_items import cut_into_items
from pallas_kernels.triton.tiles import Tile
from pallas_kernels.window_attention import tiles as window_tiles
from tests.pallas_kernels import cases
from tests.pallas_kernels.cases import Case, skip_without_mosaic
from tests.pallas_kernels.test_ops import check_branch, same_bits
from tests.pallas_kernels.test_refusals import call

SIZES = NSAConfig(16, 8, 16, 3, 1, 1)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"group": 16}, True),
        ({"queries": 9000}, True),
        ({"head_dims": (128, 192)}, False),
        ({"head_dims": (192,)}, False),
        ({"group": 2}, False),
        ({"group": 32}, False),
        ({"queries": 8191}, False),
        ({"itemsize": 4}, False),
    ],
    ids=str,
)
def test_a_row_is_for_its_head_sizes_its_groups_and_lengths_from_its_own_on(change, expected):
    row = Row((192, 128), (4, 16), 8192, "")
    assert row.matches(dataclasses.replace(Call((192, 128), 4, 8192, 2), **change)) == expected


@pytest.mark.parametrize(("name", "row"), [(name, row) for name, rows in FASTER.items() for row in rows], ids=str)
def test_calls_that_mosaic_is_faster_for_are_calls_that_it_takes(name, row):
    for group in row.groups:
        case = Case(row.queries, group, 1, row.head_dims[0], row.head_dims[-1], NSAConfig())
        with cases.abstract("NVIDIA H100"):
            call("mosaic", name, case)
        shapes = cases.shapes(case, jnp.bfloat16)
        check_faster(FASTER, name, shapes.q, shapes.kv.cmp_k, None if name == "select_blocks" else shapes.kv.cmp_v)


@pytest.mark.parametrize(("size", "step"), [(16, 4), (8, 8), (8, 1)])
@pytest.mark.parametrize(
    "case",
    [
        Case(150, 2, 1, 16, 16, SIZES, B=2),
        Case(170, 4, 2, 16, 16, SIZES, B=2, query_offset=45, segments=(9, 70, 77, 140)),
        Case(160, 2, 1, 16, 16, SIZES, query_offset=30, Tq=40, segments=(33,)),
    ],
    ids=["all queries", "segments and offset", "keys beyond the queries"],
)
def test_items_list_every_choice_once_and_tell_which_steps_see_whole_blocks(case, size, step):
    inputs = cases.inputs(case)
    keys, _ = visible(inputs.q, inputs.kv.slc_k, inputs.kv.slc_v, inputs.starts, case.query_offset)
    block, num_blocks = 16, -(-case.T // 16)
    options = {"segments": bool(case.segments), "block": block, "num_blocks": num_blocks, "workers": 6}
    items = jax.jit(lambda blocks: cut_into_items(blocks, keys, **options, size=size, step=step, spare=8))(
        inputs.block_indices
    )
    begin, end = (np.asarray(x) for x in keys)
    for pair, chosen in enumerate(np.asarray(inputs.block_indices).reshape(-1, case.num_queries, 3)):
        table, batch = np.asarray(items.table[pair]), pair // case.K
        assert sorted(table[:, 5]) == list(range(len(table)))
        used = table[table[:, 2] > 0]
        lengths = table[::-1, 2]  # as they are worked off, in rounds of six
        for at in range(0, len(table) - 6, 6):
            assert lengths[at : at + 6].min() >= lengths[at + 6 : at + 12].max()
        loads = [lengths[at : at + 6] for at in range(0, len(table) - len(table) % 12, 6)]
        assert np.ptp(np.sum(loads, axis=0)) <= size
        ends = {j: 0 for j in range(num_blocks)}  # entries that later items hold
        for j, first, length, inner, outer, place, *_ in sorted(used, key=lambda item: -item[1]):
            listed = np.asarray(items.queries[pair, first : first + length])
            all_listed = np.flatnonzero((chosen == j).any(axis=1))
            last = len(all_listed) - ends[j]
            np.testing.assert_array_equal(listed, all_listed[last - length : last])
            ends[j] += length
            assert items.block_items[pair, j] <= place < items.block_items[pair, j + 1]
            assert length == size or ends[j] == len(all_listed)
            for k in range(inner, outer):
                queries = listed[k * step : (k + 1) * step]
                assert len(queries) == step
                assert np.all(begin[batch, queries] <= j * block)
                assert np.all(end[batch, queries] >= (j + 1) * block)
        assert all(count == (chosen == j).sum() for j, count in ends.items())


def test_partial_sums_of_several_items_make_the_same_gradients():
    case = Case(
        150, 16, 1, 64, 64, NSAConfig(32, 16, 64, 2, 1, 1), B=2, traced=False, segments=(70,), backends=("mosaic",)
    )
    tolerance = cases.INTERPRETED_TOLERANCE["mosaic"]
    tiles = {"tile": UnionTile(1, 1), "query_tile": RingTile(1), "key_tile": PartialTile(1, 16)}
    compiled, inputs, actual = check_branch("mosaic", "selected_attention", case, jnp.bfloat16, tolerance, **tiles)
    same_bits(compiled(inputs), actual)


@pytest.mark.parametrize("op", ["compressed_attention", "window_attention"])
def test_intervals_are_attended_to_by_other_tiles(op):
    sizes = NSAConfig(4, 2, 64, 2, 1, 1, 170)
    case = Case(320, 8, 1, 64, 64, sizes, query_offset=270, Tq=50, traced=False, segments=(280,), backends=("mosaic",))
    tolerance = cases.INTERPRETED_TOLERANCE["mosaic"]
    tiles = {"tile": IntervalTile(2, 128, 1, 1), "query_tile": RingTile(1), "key_tile": PartialTile(1, 16)}
    check_branch("mosaic", op, case, jnp.bfloat16, tolerance, **tiles)


def test_blocks_are_selected_alike_with_fewer_slots():
    case = Case(90, 8, 1, 64, 64, NSAConfig(16, 8, 16, 4, 1, 1), traced=False, backends=("mosaic",))
    inputs = cases.inputs(case, jnp.bfloat16)
    select = functools.partial(cases.function("mosaic", "select_blocks"), **case.options)
    arrays = (inputs.q, inputs.kv.cmp_k, inputs.dlse, None, 0)
    np.testing.assert_array_equal(select(*arrays, tile=ScoreTile(2)), select(*arrays))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: IntervalTile(4, 64, 2, 1), "IntervalTile.warpgroups = 4: expected 2 or 3"),
        (lambda: IntervalTile(2, 96, 2, 1), "IntervalTile.keys = 96: expected 64 or 128"),
        (lambda: UnionTile(1, 3), "UnionTile.buffers = 3: expected 1 or 2"),
        (lambda: RingTile(0), "RingTile.slots = 0: expected at least 1"),
        (lambda: PartialTile(1, 0), "PartialTile.queries = 0: expected at least 1, or None"),
        (lambda: ScoreTile(1), "ScoreTile.slots = 1: expected at least 2, or None"),
    ],
)
def test_tiles_of_sizes_that_no_kernel_is_made_for_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("op", "tiles", "message"),
    [
        (
            "compressed_attention",
            {"tile": IntervalTile(3, 64, 5, 2)},
            "^tile = IntervalTile.* bytes of shared memory; expected at most 232448$",
        ),
        ("window_attention", {"tile": IntervalTile(3, 128, 1, 1)}, "^tile = .* 160 registers"),
        ("window_attention", {"tile": Tile(64, 64, 4, 2)}, "^tile = Tile.*: expected IntervalTile"),
        ("window_attention_backward", {"query_tile": RingTile(6)}, "^query_tile = RingTile.slots=6.* bytes of shared"),
        ("compressed_attention_backward", {"key_tile": PartialTile(3, 512)}, "^key_tile = .* bytes of shared memory"),
        ("selected_attention", {"tile": UnionTile(3, 2)}, "^tile = .* bytes of shared memory"),
        ("selected_attention_backward", {"query_tile": RingTile(6)}, "^query_tile = .* bytes of shared memory"),
        ("selected_attention_backward", {"key_tile": PartialTile(3, 512)}, "^key_tile = .* bytes of shared memory"),
        ("select_blocks", {"tile": ScoreTile(14)}, "^tile = .* bytes of shared memory"),
    ],
)
def test_tiles_that_do_not_fit_are_refused_by_name(op, tiles, message):
    case = Case(256, 16, 1, 128, 128, NSAConfig(16, 8, 64, 2, 1, 1, 100), traced=False)
    with cases.abstract("NVIDIA H100"), pytest.raises(ValueError, match=message):
        call("mosaic", op, case, tiles=tiles)


@pytest.mark.parametrize("group", [1, 8, 64])
@pytest.mark.parametrize(("Dk", "Dv"), [*itertools.product((64, 128, 192, 256), repeat=2)])
def test_tiles_of_the_tables_fit_all_heads_that_are_taken(Dk, Dv, group):
    case = Case(128, group, 1, Dk, Dv, NSAConfig(16, 8, 64, 2, 1, 1))
    inputs = cases.shapes(case, jnp.bfloat16)
    q, k, v = inputs.q, inputs.kv.slc_k, inputs.kv.slc_v
    for tables in (compressed_tiles, window_tiles):
        interval_forward.choose_forward_tile(None, tables.MOSAIC_FORWARD, q, k, v)
        if Dk + Dv <= interval_backward.LARGEST_HEADS:
            choose_query_tile(None, tables.MOSAIC_QUERY_GRADIENT, q, k, v, gated=True)
            interval_backward.choose_key_tile(None, tables.MOSAIC_KEY_GRADIENT, q, k, v, gated=True)
    if group >= LEAST_GROUP and sorted((Dk, Dv)) != [192, 256]:  # which do not fit with any tile
        check_sizes(q, k, v, inputs.block_indices, case.config)
        choose_query_tile(None, selected_tiles.MOSAIC_QUERY_GRADIENT, q, k, v, gated=True)
        mosaic_backward.choose_key_tile(None, selected_tiles.MOSAIC_KEY_GRADIENT, q, k, v, gated=True)


def test_layers_of_the_same_sizes_share_one_lowered_kernel():
    skip_without_mosaic(interpreted=False)
    case = Case(256, 16, 1, 64, 64, NSAConfig(16, 8, 64, 2, 1, 1, 100))
    shapes = cases.shapes(case, jnp.bfloat16)

    def layers(number):
        def run(q, k, v):
            for _ in range(number):
                q = window_attention(q, k, v, config=case.config, implementation="mosaic")
            return q

        with cases.abstract("NVIDIA H100"):
            traced = jax.jit(run).trace(shapes.q, shapes.kv.win_k, shapes.kv.win_v)
            return traced.lower(lowering_platforms=("cuda",)).as_text()

    one, two = layers(1), layers(2)
    assert one.count("@mosaic_gpu") == two.count("@mosaic_gpu") > 0
