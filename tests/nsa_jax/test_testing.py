"""The comparison helpers notice what they should."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nsa_jax import BranchKV, NSAConfig, testing, xla
from nsa_jax.testing import (
    assert_matches_reference,
    assert_same_blocks,
    assert_trees_close,
    normwise_error,
    random_inputs,
    reference_selection,
)

CONFIG = NSAConfig(4, 2, 8, 4, 1, 2, 10)


def test_normwise_error_counts_nan_and_unequal_infinities_as_infinitely_wrong():
    a = jnp.array([3.0, 4.0, -jnp.inf])
    assert normwise_error(a, a) == 0
    assert normwise_error(a.at[0].set(3.5), a) == pytest.approx(0.1)
    for wrong in (jnp.nan, jnp.inf, -jnp.inf):
        assert normwise_error(a.at[0].set(wrong), a) == np.inf
    assert normwise_error(a.at[2].set(0), a) == np.inf


def test_normwise_error_is_relative_to_another_norm_where_the_expected_is_zero():
    a = jnp.array([0.3, 0.4])
    assert normwise_error(a, 0 * a, if_zero=5.0) == pytest.approx(0.1)
    assert normwise_error(a, 2 * a, if_zero=5.0) == pytest.approx(0.5)
    assert normwise_error(a, 0 * a) > 1e300


@pytest.mark.exhaustive
def test_assert_matches_reference_excuses_what_rounding_leaves_of_the_gradient_of_one_token():
    """A query that sees one key sends nothing back through the score."""
    config = dataclasses.replace(CONFIG, select_block=16)
    inputs = random_inputs(jax.random.key(0), config, T=1, num_heads=1, num_kv_heads=1, head_dim=16)
    assert_matches_reference(inputs, config, implementation="triton")


def test_assert_trees_close_names_the_error():
    with pytest.raises(AssertionError, match=r"the output: normwise error 0\.1 above 1e-05"):
        assert_trees_close({"x": jnp.array([1.1])}, {"x": jnp.array([1.0])}, what="the output")
    with pytest.raises(AssertionError):
        assert_trees_close(jnp.zeros(3), jnp.zeros(4))


def test_assert_same_blocks_excuses_only_what_rounding_cannot_tell_apart():
    importance = jnp.array([[[[9.0, 1.0, 1.0 + 1e-7, 0.0, 0.0]]]])
    expected = jnp.array([[[[0, 2]]]], jnp.int32)
    assert_same_blocks(expected, expected, importance)
    assert_same_blocks(expected.at[..., 1].set(1), expected, importance)
    for wrong in ([0, 3], [2, 0], [0, -1], [0, 0], [1, 2], [0, 5], [0, 6]):  # of blocks 0 to 4
        with pytest.raises(AssertionError, match="select_blocks at"):
            assert_same_blocks(jnp.array([[[wrong]]], jnp.int32), expected, importance)
    with pytest.raises(AssertionError, match="select_blocks at"):  # zero importance: the lower index must win
        assert_same_blocks(jnp.array([[[[0, 4]]]]), jnp.array([[[[0, 3]]]]), importance)


def test_the_reference_selects_by_scores_over_the_root_of_the_head_size_if_no_scale_is_given():
    inputs = random_inputs(jax.random.key(0), CONFIG, T=40, num_heads=2, num_kv_heads=1, head_dim=9)
    of_default = reference_selection(inputs, CONFIG)
    assert_trees_close(of_default, reference_selection(inputs, CONFIG, scale=1 / 3), 1e-6)
    # What it selects are the blocks of highest importance, after the first block and the two newest.
    _, blocks, importance = of_default
    free = np.asarray(importance)[0, 0, -1, 1 : 40 // CONFIG.select_block - 2]
    assert set(np.asarray(blocks)[0, 0, -1]) == {0, 1 + int(np.argmax(free)), 3, 4}


@pytest.mark.parametrize("op", ["compressed_attention", "selected_attention", "window_attention", "select_blocks"])
def test_assert_matches_reference_notices_a_wrong_op(op, monkeypatch):
    inputs = random_inputs(jax.random.key(0), CONFIG, T=40, num_heads=2, num_kv_heads=1, head_dim=4)
    right = getattr(xla, op)

    def wrong(q, *args, scale, **kwargs):
        return right(-q if op == "select_blocks" else q, *args, scale=scale * 1.001, **kwargs)

    monkeypatch.setattr(xla, op, wrong)
    # A wrong selection shows first in the whole attention, which is compared before the indices.
    with pytest.raises(AssertionError, match="nsa_attention" if op == "select_blocks" else op):
        assert_matches_reference(inputs, CONFIG, implementation="xla", gradients=False)


@pytest.mark.parametrize(
    ("op", "argument"),
    [
        pytest.param(op, i, marks=[pytest.mark.exhaustive] * (op != "compressed_attention"), id=f"{op}, {name}")
        for op in ("compressed_attention", "selected_attention", "window_attention")
        for i, name in enumerate("qkv")
    ],
)
def test_assert_matches_reference_notices_a_gradient_that_is_wrong_by_3e_4(op, argument, monkeypatch):
    inputs = random_inputs(jax.random.key(0), CONFIG, T=12, num_heads=2, num_kv_heads=1, head_dim=4)
    right = getattr(xla, op)

    def wrong(*arguments, **options):
        return right(*_with_wrong_gradient(arguments, argument), **options)

    monkeypatch.setattr(xla, op, wrong)
    with pytest.raises(AssertionError, match=f"gradient of {op}"):
        assert_matches_reference(inputs, CONFIG, implementation="xla")


@pytest.mark.exhaustive
@pytest.mark.parametrize("argument", range(8))
def test_assert_matches_reference_notices_a_gradient_of_the_whole_that_is_wrong_by_3e_4(argument, monkeypatch):
    inputs = random_inputs(jax.random.key(0), CONFIG, T=12, num_heads=2, num_kv_heads=1, head_dim=4)
    right = testing.nsa_attention

    def wrong(q, kv, gates, *, implementation, **options):
        if implementation == "xla":
            q, *kv, gates = _with_wrong_gradient((q, *kv, gates), argument)
        return right(q, BranchKV(*kv), gates, implementation=implementation, **options)

    monkeypatch.setattr(testing, "nsa_attention", wrong)
    with pytest.raises(AssertionError, match="gradient of nsa_attention"):
        assert_matches_reference(inputs, CONFIG, implementation="xla")


def _with_wrong_gradient(arguments, index):
    """The same values, but one of them has a gradient that is 3e-4 too large."""
    x = arguments[index]
    return *arguments[:index], x + 3e-4 * (x - jax.lax.stop_gradient(x)), *arguments[index + 1 :]
