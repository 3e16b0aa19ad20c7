"""What is particular to the Mosaic GPU kernels: when they are faster, and how selected attention's lists are cut."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nsa_jax import NSAConfig, window_attention
from pallas_kernels.mosaic.faster import FASTER, Call, Row, check_faster
from pallas_kernels.selected_attention import mosaic_backward
from pallas_kernels.selected_attention.mosaic import visible
from pallas_kernels.selected_attention.mosaic_items import cut_into_items
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


def test_partial_sums_of_several_items_make_the_same_gradients(monkeypatch):
    monkeypatch.setattr(mosaic_backward, "ITEM", 16)
    case = Case(
        150, 16, 1, 64, 64, NSAConfig(32, 16, 64, 2, 1, 1), B=2, traced=False, segments=(70,), backends=("mosaic",)
    )
    tolerance = cases.INTERPRETED_TOLERANCE["mosaic"]
    compiled, inputs, actual = check_branch("mosaic", "selected_attention", case, jnp.bfloat16, tolerance)
    same_bits(compiled(inputs), actual)


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
