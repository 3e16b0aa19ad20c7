"""What only the Triton kernels have: cuts of long sequences, tiles of several queries, block-major ways, grids."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from nsa_jax import NSAConfig
from pallas_kernels.block_selection import triton as block_selection
from pallas_kernels.selected_attention import block_union
from pallas_kernels.selected_attention import triton as query_major
from pallas_kernels.selected_attention import triton_backward as backward
from pallas_kernels.selected_attention.block_major import BlockMajorTile
from pallas_kernels.selected_attention.inverse_index import invert
from pallas_kernels.triton.problem import problem_of
from pallas_kernels.triton_call import triton_call
from tests.pallas_kernels import cases
from tests.pallas_kernels.cases import Case
from tests.pallas_kernels.test_ops import INTERPRETED, check_branch

SELECTION = Case(500, 4, 2, 32, 32, NSAConfig(32, 16, 64, 4, 1, 1))


def selection(case: Case) -> tuple[Any, ...]:
    """(q, k, lse) and the blocks that are chosen uncut."""
    inputs = cases.inputs(case)
    expected = cases.expected_results("compressed_attention", case, inputs)
    select = jax.jit(functools.partial(block_selection.select_blocks, **case.options, interpret=True))
    arrays = (inputs.q, inputs.kv.cmp_k, expected.lse)
    return arrays, np.asarray(select(*arrays, None, jnp.int32(0)))


def test_slabs_and_spans_change_nothing(monkeypatch):
    arrays, expected = selection(SELECTION)
    monkeypatch.setattr(block_selection, "_LEAST_BLOCKS_TO_CUT", 2)
    problem = problem_of(SELECTION.config, SELECTION.scale, True)
    spans = block_selection.query_spans(500, SELECTION.num_compressed, 8, 0, problem)
    assert len(spans) == 3
    actual = block_selection.choose(*arrays, None, jnp.zeros((1,), jnp.int32), problem, spans, scratch_bytes=40000)
    np.testing.assert_array_equal(actual, expected)


def test_kernels_are_sized_by_where_the_queries_are_found_to_end(monkeypatch):
    (q, k, lse), expected = selection(SELECTION)
    monkeypatch.setattr(block_selection, "_LEAST_BLOCKS_TO_CUT", 2)
    run = functools.partial(block_selection.select_blocks, **SELECTION.options, interpret=True)
    compiled = jax.jit(run)
    for first in (0, 70, 130, 380):
        part = (q[:, first : first + 60], k, lse[:, :, first : first + 60], None, jnp.int32(first))
        np.testing.assert_array_equal(compiled(*part), expected[:, :, first : first + 60])
    assert str(jax.make_jaxpr(run)(*part)).count("block_selection_top_n") > 2  # for a quarter, a half and all blocks


def test_tiles_of_several_queries_equal_the_reference(monkeypatch):
    monkeypatch.setattr(block_union, "_ADAPTIVE_FROM", 8)
    pairs = query_major.ForwardTile(2, 2, 2), query_major.ForwardTile(4, 4, 2)
    monkeypatch.setattr(query_major, "forward_tiles", lambda *_: pairs)
    monkeypatch.setattr(backward, "query_tiles", lambda *_: (backward.QueryTile(8, 4, 2), None))
    case = Case(70, 8, 1, 32, 32, NSAConfig(16, 8, 16, 3, 1, 1), query_offset=37, segments=(43,))
    check_branch("triton", "selected_attention", case, jnp.float32, INTERPRETED)


def test_block_major_forward_equals_the_reference(monkeypatch):
    monkeypatch.setattr(query_major, "block_major_tile", lambda *_: BlockMajorTile(16, 32, 4, 2))
    case = Case(70, 6, 2, 32, 40, NSAConfig(8, 8, 24, 3, 1, 1), query_offset=37, segments=(43,), given=True)
    check_branch("triton", "selected_attention", case, jnp.float32, INTERPRETED)


def test_inverse_index_lists_every_choice_once_in_order():
    case = Case(90, 2, 1, 32, 32, NSAConfig(16, 8, 16, 4, 1, 1), B=2)
    indices = cases.inputs(case).block_indices[:, 0]
    index = jax.tree.map(np.asarray, jax.jit(invert, static_argnums=(1, 2))(indices, 6, 32))
    for row, chosen in enumerate(np.asarray(indices)):
        for block in range(6):
            items = range(*index.block_items[row, block : block + 2])
            assert all(index.block[row, i] == block and 0 < index.length[row, i] <= 32 for i in items)
            spans = [index.places[row, index.first[row, i] : index.first[row, i] + index.length[row, i]] for i in items]
            np.testing.assert_array_equal(np.concatenate(spans), np.flatnonzero(chosen == block))
        used = index.block_items[row, -1]
        assert not index.length[row, used:].any()


def test_vmap_of_a_grid_too_long_for_cuda_is_refused():
    call = triton_call(
        lambda x_ref, o_ref: None,
        name="long",
        grid=(65536, 1),
        in_specs=pl.no_block_spec,
        out_specs=pl.no_block_spec,
        out_shape=jax.ShapeDtypeStruct((4,), jnp.float32),
        num_warps=4,
        num_stages=1,
        interpret=True,
    )
    x = jax.ShapeDtypeStruct((3, 4), jnp.float32)
    # No other backend could serve the call either, so that it is not a refusal to be passed over.
    with pytest.raises(ValueError, match="vmap of long with 65536 programs"):
        jax.eval_shape(jax.vmap(call), x)
