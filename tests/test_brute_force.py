"""The brute force itself, on cases small enough to work out by hand."""

import math

import brute_force
import numpy as np
import pytest

from nsa_jax.config import NSAConfig


def ones(*shape):
    return np.ones(shape)


def test_overlap_weights_of_the_paper_sizes():
    config = NSAConfig(compress_block=32, compress_stride=16, select_block=64)
    for j in range(4):
        weights = {i: brute_force.shared_chunks(i, j, config) for i in range(24)}
        inside = {4 * j - 1: 1, 4 * j: 2, 4 * j + 1: 2, 4 * j + 2: 2, 4 * j + 3: 1}
        assert weights == {i: inside.get(i, 0) for i in range(24)}


def test_equal_keys_average_the_visible_compressed_values():
    config = NSAConfig(compress_block=2, compress_stride=1, select_block=2, num_selected=3)
    v = np.array([1.0, 3.0, 8.0]).reshape(1, 3, 1, 1)
    o, lse = brute_force.compressed_attention(ones(1, 4, 1, 1), np.zeros((1, 3, 1, 1)), v, config=config)
    np.testing.assert_allclose(o.ravel(), [0.0, 1.0, 2.0, 4.0], rtol=1e-15)
    np.testing.assert_allclose(lse.ravel(), [-math.inf, 0.0, math.log(2), math.log(3)], rtol=1e-15)


def test_softmax_of_two_keys_by_hand():
    config = NSAConfig(window=2)
    q = np.full((1, 3, 1, 4), 0.5)
    k = np.zeros((1, 3, 1, 4))
    k[0, 1] = math.log(3) / 2  # score: 4 * 0.5 * log(3) / 2, scaled by 4 ** -0.5, is log(3) / 2
    v = np.array([10.0, 20.0, 30.0]).reshape(1, 3, 1, 1)
    weight = math.sqrt(3) / (1 + math.sqrt(3))
    expected = [10.0, 10.0 + 10.0 * weight, 30.0 - 10.0 * weight]
    np.testing.assert_allclose(brute_force.window_attention(q, k, v, config=config).ravel(), expected, rtol=1e-15)


def test_importance_of_uniform_probabilities_counts_chunks():
    config = NSAConfig(compress_block=2, compress_stride=1, select_block=2, num_selected=3)
    scores = brute_force.importance(np.zeros((1, 5, 2, 1)), np.zeros((1, 4, 1, 1)), np.zeros((1, 2, 5)), config=config)
    # Two heads, so every compressed token counts twice: tokens 0 and 1 for block 0 weigh 2 and 1, and so on.
    np.testing.assert_array_equal(scores[0, 0], [[0, 0, 0], [4, 0, 0], [6, 2, 0], [6, 6, 0], [6, 8, 2]])


def test_selection_takes_forced_then_best_then_lower():
    config = NSAConfig(
        compress_block=1, compress_stride=1, select_block=1, num_selected=4, num_init=1, num_local=1, window=1
    )
    T = 7
    k = np.array([0.0, 1.0, 2.0, 2.0, 3.0, 2.0, 0.0]).reshape(1, T, 1, 1)
    options = dict(config=config, scale=1.0)
    indices, margin = brute_force.select_blocks_and_margin(ones(1, T, 1, 1), k, np.zeros((1, 1, T)), **options)
    expected = [
        [0, -1, -1, -1], [0, 1, -1, -1], [0, 1, 2, -1], [0, 1, 2, 3], [0, 2, 3, 4], [0, 2, 4, 5], [0, 2, 4, 6],
    ]  # fmt: skip
    np.testing.assert_array_equal(indices[0, 0], expected)
    inf = math.inf
    np.testing.assert_allclose(margin[0, 0], [inf, inf, inf, inf, 1 - math.exp(-1), 0, 0], rtol=1e-15)


def test_segments_hide_what_precedes_and_what_straddles():
    config = NSAConfig(
        compress_block=2, compress_stride=1, select_block=2, num_selected=2, num_init=1, num_local=1, window=3
    )
    segment_ids = np.array([[5, 5, 5, 7, 7, 7]])
    options = dict(config=config, segment_ids=segment_ids)
    q = np.zeros((1, 6, 1, 1))
    v = np.array([1.0, 2.0, 4.0, 8.0, 16.0]).reshape(1, 5, 1, 1)
    o, lse = brute_force.compressed_attention(q, np.zeros_like(v), v, **options)
    np.testing.assert_allclose(o.ravel(), [0, 1, 1.5, 0, 8, 12], rtol=1e-15)
    indices = brute_force.select_blocks(q, np.zeros_like(v), lse, **options)
    # Block 1 holds the last token of the first segment and the first of the second.
    np.testing.assert_array_equal(indices[0, 0], [[0, -1], [0, -1], [0, 1], [1, -1], [1, 2], [1, 2]])
    v = np.array([1.0, 2.0, 4.0, 8.0, 16.0, 32.0]).reshape(1, 6, 1, 1)
    selected = brute_force.selected_attention(q, np.zeros_like(v), v, indices, **options)
    window = brute_force.window_attention(q, np.zeros_like(v), v, **options)
    np.testing.assert_allclose(selected.ravel(), [1, 1.5, 7 / 3, 8, 12, 56 / 3], rtol=1e-15)
    np.testing.assert_allclose(window.ravel(), selected.ravel(), rtol=1e-15)


def test_selected_attention_without_a_block_is_zero():
    config = NSAConfig(compress_block=2, compress_stride=1, select_block=2, num_selected=3)
    none = np.full((1, 1, 4, 3), -1)
    o = brute_force.selected_attention(ones(1, 4, 2, 1), ones(1, 4, 1, 1), ones(1, 4, 1, 3), none, config=config)
    np.testing.assert_array_equal(o, np.zeros((1, 4, 2, 3)))


@pytest.mark.parametrize("segment_ids", [None, np.array([[0, 0, 0, 1, 1, 1, 1]])])
def test_a_slice_of_the_queries_gives_the_same_rows(segment_ids):
    config = NSAConfig(
        compress_block=2, compress_stride=1, select_block=2, num_selected=2, num_init=0, num_local=1, window=3
    )
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(1, 7, 2, 3)), rng.normal(size=(1, 7, 1, 3)), rng.normal(size=(1, 7, 1, 2))
    options = dict(config=config, segment_ids=segment_ids)
    o, lse = brute_force.compressed_attention(q, k[:, :6], v[:, :6], **options)
    indices = brute_force.select_blocks(q, k[:, :6], lse, **options)
    options["query_offset"] = 3
    part, part_lse = brute_force.compressed_attention(q[:, 3:6], k[:, :6], v[:, :6], **options)
    np.testing.assert_array_equal(part, o[:, 3:6])
    part_indices = brute_force.select_blocks(q[:, 3:6], k[:, :6], part_lse, **options)
    np.testing.assert_array_equal(part_indices, indices[:, :, 3:6])


def test_compression_flattens_each_window_token_by_token():
    config = NSAConfig(compress_block=2, compress_stride=1, select_block=2, num_selected=3)
    x = np.arange(6.0).reshape(1, 3, 1, 2)
    position_embedding = np.array([[0.0, 0.0], [100.0, 100.0]])
    seen = []

    def phi(flat):
        seen.append(flat.tolist())
        return flat[:2]

    compressed = brute_force.compress(x, position_embedding, phi, config=config)
    assert seen == [[0, 1, 102, 103], [2, 3, 104, 105]]
    np.testing.assert_array_equal(compressed, [[[[0, 1]], [[2, 3]]]])
