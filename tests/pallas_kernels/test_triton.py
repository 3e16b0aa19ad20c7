"""What only the Triton kernels have: cuts of long sequences, tiles of several queries, block-major ways, grids."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nsa_jax import NSAConfig
from pallas_kernels.block_selection import triton as block_selection
from pallas_kernels.selected_attention import block_union
from pallas_kernels.selected_attention.inverse_index import invert
from pallas_kernels.triton.launch import launch
from pallas_kernels.triton.tiles import BlockTile, QueryTile, Tile
from tests.pallas_kernels import cases
from tests.pallas_kernels.cases import Case
from tests.pallas_kernels.test_ops import (
    HUGE,
    INTERPRETED,
    check_blocks_that_no_query_selected_are_not_read,
    check_branch,
    check_unseen_keys_change_nothing,
    close,
)

SELECTION = Case(500, 4, 2, 32, 32, NSAConfig(32, 16, 64, 4, 1, 1))


def selection(case: Case) -> tuple[Any, ...]:
    """(q, k, lse) and the blocks that are chosen uncut."""
    inputs = cases.inputs(case)
    expected = cases.expected_results("compressed_attention", case, inputs)
    select = jax.jit(functools.partial(block_selection.select_blocks, **case.options, interpret=True))
    arrays = (inputs.q, inputs.kv.cmp_k, expected.lse)
    return arrays, np.asarray(select(*arrays, None, jnp.int32(0)))


def test_cuts_and_chunks_change_nothing(monkeypatch):
    arrays, expected = selection(SELECTION)
    monkeypatch.setattr(block_selection, "_LEAST_BLOCKS_TO_CUT", 2)
    monkeypatch.setattr(block_selection, "_SCRATCH_BYTES", 4000)
    run = functools.partial(block_selection.select_blocks, **SELECTION.options, interpret=True)
    cut = jax.jit(lambda *arrays: run(*arrays, None, 0))
    np.testing.assert_array_equal(cut(*arrays), expected)
    program = str(jax.make_jaxpr(cut)(*arrays))
    assert program.count("block_selection_top_n") > 2  # for a quarter, a half and all blocks
    assert "scan" in program  # over chunks
    monkeypatch.setattr(block_selection, "_SCRATCH_BYTES", 1)  # never less than a tile of queries at a time
    monkeypatch.setattr(block_selection, "_TOP_N_ELEMENTS", 1)  # and than the blocks of one query
    assert jax.eval_shape(lambda *arrays: run(*arrays, None, 0), *arrays).shape == expected.shape


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
    case = Case(70, 8, 1, 32, 32, NSAConfig(16, 8, 16, 3, 1, 1), query_offset=37, segments=(43,))
    tile = QueryTile(16, 2, 2, shared=QueryTile(32, 4, 2))
    query_tile = QueryTile(32, 4, 2)
    compiled, inputs, actual = check_branch(
        "triton", "selected_attention", case, jnp.float32, INTERPRETED, tile=tile, query_tile=query_tile
    )
    check_unseen_keys_change_nothing("selected_attention", case, compiled, inputs, actual, HUGE)
    check_blocks_that_no_query_selected_are_not_read(case, compiled, inputs)


def test_compressed_tokens_of_several_tiles_equal_the_reference():
    case = Case(150, 6, 2, 32, 24, NSAConfig(8, 4, 16, 3, 1, 1), query_offset=29, segments=(43,))  # 36, 16 a tile
    tile = Tile(16, 16, 4, 1)
    tiles = {"tile": tile, "query_tile": tile, "key_tile": tile}
    compiled, inputs, actual = check_branch("triton", "compressed_attention", case, jnp.float32, INTERPRETED, **tiles)
    check_unseen_keys_change_nothing("compressed_attention", case, compiled, inputs, actual, HUGE)


def test_block_major_forward_equals_the_reference():
    case = Case(70, 6, 2, 32, 40, NSAConfig(8, 8, 24, 3, 1, 1), query_offset=37, segments=(43,))
    op, inputs = "selected_attention", cases.inputs(case)
    run = functools.partial(cases.function("triton", op), tile=BlockTile(16, 32, 4, 2), **case.options)
    o, lse = jax.jit(run)(*cases.arguments(op, inputs), inputs.starts, case.offset)
    expected = cases.expected_results(op, case, inputs)
    close("o", o, expected.o, INTERPRETED)
    close("lse", lse, expected.lse, INTERPRETED)


def test_every_op_takes_a_tile_of_ones_own():
    case = Case(64, 4, 2, 32, 32, NSAConfig(16, 8, 16, 4, 1, 1, 20), traced=False)
    inputs, tile = cases.shapes(case, jnp.float32), Tile(32, 16, 8, 2)

    def program(op, *arrays):
        call = functools.partial(cases.function("triton", op), **case.options, tile=tile)
        return str(jax.make_jaxpr(lambda *arrays: call(*arrays, None, 0))(*arrays))

    shapes = (inputs.q, *inputs.kv[:2])
    assert "num_warps=8" in program("compressed_attention", *shapes)
    assert "num_warps=8" in program("window_attention", *shapes[:1], *inputs.kv[4:])
    assert "num_warps=8" in program("select_blocks", *shapes[:2], inputs.dlse)


def test_inverse_index_lists_every_choice_once_in_order():
    case = Case(90, 2, 1, 32, 32, NSAConfig(16, 8, 16, 4, 1, 1), B=2)
    indices = cases.inputs(case).block_indices[:, 0]
    index = jax.tree.map(np.asarray, jax.jit(invert, static_argnums=(1, 2))(indices, 6, 32))
    for row, chosen in enumerate(np.asarray(indices)):
        for block in range(6):
            items = range(*index.block_items[row, block : block + 2])
            assert all(index.block[row, i] == block and 0 < index.length[row, i] <= 32 for i in items)
            spans = [
                index.choices[row, index.first[row, i] : index.first[row, i] + index.length[row, i]] for i in items
            ]
            np.testing.assert_array_equal(np.concatenate(spans), np.flatnonzero(chosen == block))
        used = index.block_items[row, -1]
        assert not index.length[row, used:].any()


def test_vmap_of_a_grid_too_long_for_cuda_is_refused():
    call = launch(
        lambda x_ref, o_ref: None,
        name="long",
        grid=(65536, 1),
        out_shape=jax.ShapeDtypeStruct((4,), jnp.float32),
        num_warps=4,
        num_stages=1,
        interpret=True,
    )
    x = jax.ShapeDtypeStruct((3, 4), jnp.float32)
    # No other backend could serve the call either, so that it is not a refusal to be passed over.
    with pytest.raises(ValueError, match="vmap of long with 65536 programs"):
        jax.eval_shape(jax.vmap(call), x)
