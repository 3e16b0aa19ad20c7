"""What only the Triton kernels have: cuts of long sequences, tiles of several queries, block-major ways, grids."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nsa_jax import NSAConfig, num_compressed
from pallas_kernels.block_selection import triton as block_selection
from pallas_kernels.compressed_attention import triton_backward as compressed_backward
from pallas_kernels.selected_attention import block_union, inverse_index
from pallas_kernels.triton.heads import head_pieces
from pallas_kernels.triton.launch import launch
from pallas_kernels.triton.problem import problem_of
from pallas_kernels.triton.tiles import BlockTile, QueryTile, Tile
from tests.pallas_kernels import cases
from tests.pallas_kernels.cases import Case
from tests.pallas_kernels.test_ops import (
    HUGE,
    INTERPRETED,
    check_blocks_that_no_query_selected_are_not_read,
    check_branch,
    check_finite_keys_reach_only_who_sees_them,
    check_unseen_keys_change_nothing,
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
    (q, k, lse), expected = selection(SELECTION)
    uncut = functools.partial(block_selection.select_blocks, **SELECTION.options, interpret=True)
    np.testing.assert_array_equal(uncut(q, k, lse, None, 0, tile=Tile(64, 16, 4, 1)), expected)
    assert "scan" not in str(jax.make_jaxpr(uncut)(q, k, lse, None, 0))  # what fits into the scratch is one chunk
    first = 100  # so that both cuts, at 128 and 256, fall among the queries
    arrays = (q[:, first:], k, lse[:, :, first:])
    monkeypatch.setattr(block_selection, "_LEAST_BLOCKS_TO_CUT", 2)
    monkeypatch.setattr(block_selection, "_SCRATCH_BYTES", 4000)
    run = functools.partial(block_selection.select_blocks, **SELECTION.options, interpret=True)
    cut = jax.jit(lambda *arrays: run(*arrays, None, first))
    np.testing.assert_array_equal(cut(*arrays), expected[:, :, first:])
    program = str(jax.make_jaxpr(cut)(*arrays))
    assert program.count("block_selection_top_n") > 2  # for a quarter, a half and all blocks
    assert "scan" in program  # over chunks
    ranges = block_selection.query_ranges(400, k.shape[1], 8, first, problem_of(SELECTION.config, 1.0, True))
    assert [(part.begin + first, part.end + first) for part in ranges] == [(100, 128), (128, 256), (256, 500)]
    monkeypatch.setattr(block_selection, "_SCRATCH_BYTES", 1)  # never less than a tile of queries at a time
    monkeypatch.setattr(block_selection, "_TOP_N_ELEMENTS", 1)  # and than the blocks of one query
    assert jax.eval_shape(lambda *arrays: run(*arrays, None, 0), *arrays).shape == expected[:, :, first:].shape


def test_kernels_are_sized_by_where_the_queries_are_found_to_end(monkeypatch):
    (q, k, lse), expected = selection(SELECTION)
    monkeypatch.setattr(block_selection, "_LEAST_BLOCKS_TO_CUT", 2)
    run = functools.partial(block_selection.select_blocks, **SELECTION.options, interpret=True)
    compiled = jax.jit(run)
    for first in (0, 70, 130, 380):
        part = (q[:, first : first + 60], k, lse[:, :, first : first + 60], None, jnp.int32(first))
        np.testing.assert_array_equal(compiled(*part), expected[:, :, first : first + 60])
    assert str(jax.make_jaxpr(run)(*part)).count("block_selection_top_n") > 2  # for a quarter, a half and all blocks


def test_kernels_are_sized_for_all_that_the_last_query_sees():
    """Every alignment of the cut with l, d and s; one key too few hides the newest token from the last query."""
    for stride, chunks, blocks in itertools.product(range(1, 5), range(1, 4), range(3, 6)):
        config = NSAConfig(stride * chunks, stride, stride * blocks, window=1)
        problem = problem_of(config, 1.0, True)
        for T in range(1, 4 * config.select_block):
            num_keys, num_blocks = num_compressed(T, config), -(-T // config.select_block)
            for reach in range(1, T + 1):
                sized = block_selection._range(0, 1, reach, num_keys, num_blocks, problem)
                assert sized.num_keys == max(1, num_compressed(reach, config)), (config, T, reach)
                assert sized.num_blocks == -(-reach // config.select_block), (config, T, reach)


def test_tiles_of_several_queries_equal_the_reference(monkeypatch):
    monkeypatch.setattr(block_union, "_ADAPTIVE_FROM", 8)
    case = Case(70, 8, 1, 32, 32, NSAConfig(16, 8, 16, 3, 1, 1), query_offset=37, segments=(9, 61))
    chosen = np.asarray(cases.inputs(case).block_indices)[0, 0]
    assert np.mean(np.any(chosen[:-1:2] != chosen[1::2], axis=-1)) >= 0.5  # of two that share a tile
    tile = QueryTile(16, 2, 2, shared=QueryTile(32, 4, 2))
    query_tile = QueryTile(32, 4, 2)
    compiled, inputs, actual = check_branch(
        "triton", "selected_attention", case, jnp.float32, INTERPRETED, tile=tile, query_tile=query_tile
    )
    check_unseen_keys_change_nothing("selected_attention", case, compiled, inputs, actual, HUGE)
    check_finite_keys_reach_only_who_sees_them("selected_attention", case, compiled, inputs)
    check_blocks_that_no_query_selected_are_not_read(case, compiled, inputs)


def test_a_tile_reads_no_key_between_its_queries_that_none_of_them_sees(monkeypatch):
    """Three of four queries do not select their own block, so that mostly nobody sees their keys."""
    monkeypatch.setattr(block_union, "_ADAPTIVE_FROM", 8)
    random_blocks = cases._random_blocks

    def own_blocks_of_every_fourth(case, first, positions):
        blocks = random_blocks(case, first, positions)
        own = (positions // case.config.select_block)[:, None]
        return np.where((blocks == own) & (np.arange(len(positions)) % 4 > 0)[:, None], -1, blocks)

    monkeypatch.setattr(cases, "_random_blocks", own_blocks_of_every_fourth)
    case = Case(190, 8, 1, 32, 32, NSAConfig(16, 8, 16, 2, 0, 0), query_offset=150)
    tiles = {"tile": QueryTile(16, 2, 2, shared=QueryTile(32, 4, 2)), "query_tile": QueryTile(32, 4, 2)}
    compiled, inputs, actual = check_branch("triton", "selected_attention", case, jnp.float32, INTERPRETED, **tiles)
    check_unseen_keys_change_nothing("selected_attention", case, compiled, inputs, actual, HUGE)


@pytest.mark.parametrize("widest", [64, 128, 256])
def test_a_head_is_cut_into_few_pieces_with_little_padding(widest):
    for head_dim in range(16, 257):
        pieces = head_pieces(head_dim, widest)
        columns = [piece.start + i for piece in pieces for i in range(piece.used)]
        assert columns == list(range(head_dim))
        widths = [piece.width for piece in pieces]
        assert all(16 <= width <= widest and width.bit_count() == 1 for width in widths)
        assert widths == sorted(widths, reverse=True)
        assert len(set(widths)) <= 2
        assert widths.count(widths[-1]) == 1 or len(set(widths)) == 1
        assert len(pieces) <= -(-head_dim // widest) + 1  # one product more, where it saves padding
    assert [piece.width for piece in head_pieces(192)] == [128, 64]
    assert [(piece.width, piece.used) for piece in head_pieces(112)] == [(64, 64), (64, 48)]


@pytest.mark.parametrize(
    "case",
    [
        Case(150, 6, 2, 32, 24, NSAConfig(8, 4, 16, 3, 1, 1), query_offset=29, segments=(43,)),  # 36, 16 a tile
        Case(96, 2, 1, 16, 16, NSAConfig(8, 4, 16, 3, 1, 1), traced=False),  # whole tiles of rows see the first keys
    ],
    ids=["segments and offset", "full tiles"],
)
def test_compressed_tokens_of_several_tiles_equal_the_reference(case):
    tile = Tile(16, 16, 4, 1)
    tiles = {"tile": tile, "query_tile": tile, "key_tile": tile}
    compiled, inputs, actual = check_branch("triton", "compressed_attention", case, jnp.float32, INTERPRETED, **tiles)
    check_unseen_keys_change_nothing("compressed_attention", case, compiled, inputs, actual, HUGE)


def test_windows_of_several_tiles_equal_the_reference():
    case, tile = Case(96, 3, 1, 16, 16, NSAConfig(8, 4, 16, 3, 1, 1, 40), query_offset=29), Tile(16, 32, 4, 1)
    tiles = {"tile": tile, "query_tile": tile, "key_tile": tile}
    check_branch("triton", "window_attention", case, jnp.float32, INTERPRETED, **tiles)


@pytest.mark.parametrize("heads", [1, pytest.param(3, marks=pytest.mark.exhaustive)])
def test_block_major_passes_equal_the_reference(heads):
    """With one head a group, a step takes 16 queries: a block's own 24 end within one."""
    case = Case(70, 2 * heads, 2, 32, 40, NSAConfig(8, 8, 24, 3, 1, 1), query_offset=37, segments=(43,))
    tile = BlockTile(16, 32, 4, 2)
    check_branch("triton", "selected_attention", case, jnp.float32, INTERPRETED, tile=tile, key_tile=tile)


def test_key_gradients_are_summed_over_all_chunks_of_queries(monkeypatch):
    monkeypatch.setattr(compressed_backward, "_LEAST_CHUNK", 32)
    case = Case(149, 2, 2, 16, 16, NSAConfig(16, 8, 16), segments=(70,))
    check_branch("triton", "compressed_attention", case, jnp.float32, INTERPRETED)
    assert compressed_backward._chunk_queries(case.T, 2) == 32


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


def test_keys_before_the_first_query_get_the_gradients_of_the_queries_that_there_are():
    case = Case(70, 2, 1, 16, 16, NSAConfig(16, 8, 16, 3, 1, 1, 20), query_offset=37, traced=False)
    check_branch("triton", "window_attention", case, jnp.float32, INTERPRETED)


@pytest.mark.parametrize(
    ("most_keys", "item_size"), [(2**31, 32), (0, 30)], ids=["one key", "two keys, items that divide the choices"]
)
def test_inverse_index_lists_every_choice_once_in_order(most_keys, item_size, monkeypatch):
    monkeypatch.setattr(inverse_index, "_MOST_KEYS", most_keys)
    case = Case(90, 2, 1, 32, 32, NSAConfig(16, 8, 16, 4, 1, 1), B=2)
    indices = cases.inputs(case).block_indices[:, 0]
    index = jax.tree.map(np.asarray, jax.jit(lambda indices: inverse_index.invert(indices, 6, item_size))(indices))
    for row, chosen in enumerate(np.asarray(indices)):
        for block in range(6):
            items = range(*index.block_items[row, block : block + 2])
            assert all(index.block[row, i] == block and 0 < index.length[row, i] <= item_size for i in items)
            spans = [
                index.choices[row, index.first[row, i] : index.first[row, i] + index.length[row, i]] for i in items
            ]
            np.testing.assert_array_equal(np.concatenate(spans), np.flatnonzero(chosen == block))
            ends = [(span[0] // 4, span[-1] // 4) for span in spans]
            assert ends == [(index.first_query[row, i], index.last_query[row, i]) for i in items]
        used = index.block_items[row, -1]
        assert not index.length[row, used:].any()


def launched(kernel, grid):
    """A kernel whose result is four numbers."""
    options = {"out_shape": jax.ShapeDtypeStruct((4,), jnp.float32), "num_warps": 4, "num_stages": 1}
    return launch(kernel, name="long", grid=grid, interpret=True, **options)


def test_vmap_of_a_grid_too_long_for_cuda_is_refused():
    x = jax.ShapeDtypeStruct((3, 4), jnp.float32)
    vmapped = [jax.vmap(launched(lambda x_ref, o_ref: None, (programs, 1))) for programs in (65535, 65536)]
    assert jax.eval_shape(vmapped[0], x).shape == (3, 4)
    # No other backend could serve the call either, so that it is not a refusal to be passed over.
    with pytest.raises(ValueError, match="vmap of long with 65536 programs"):
        jax.eval_shape(vmapped[1], x)


@pytest.mark.parametrize("axes", [(0, 0), (0, None), (None, 0)])
def test_vmap_runs_a_kernel_on_each_row_with_what_all_rows_share(axes):
    def difference(x_ref, y_ref, o_ref):
        o_ref[...] = x_ref[...] - 2 * y_ref[...]

    rows, shared = np.arange(12, dtype=np.float32).reshape(3, 4), np.arange(4, dtype=np.float32)
    x, y = (shared if axis is None else rows + i for i, axis in enumerate(axes))
    actual = jax.jit(jax.vmap(launched(difference, (1,)), in_axes=axes))(x, y)
    np.testing.assert_array_equal(actual, x - 2 * y)
