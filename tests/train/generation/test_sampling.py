"""How tokens are drawn from logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.generation.sampling import Draw, likely, sample


def above(value):
    """The next float32."""
    return float(np.nextafter(np.float32(value), np.float32(1)))


def draw(rows, **changes):
    values = Draw(temperature=1.0, top_k=99, top_p=1.0, repetition_penalty=1.0, seed=0, num_drawn=0)._asdict()
    return jax.tree.map(lambda value: jnp.full((rows,), value), Draw(**{**values, **changes}))


@settings(max_examples=20)
@given(st.integers(0, 999), st.integers(1, 12), st.floats(0.05, 1.0), st.floats(0.2, 3.0))
def test_top_k_and_top_p_keep_what_numpy_keeps(seed, k, p, temperature):
    scores = np.random.default_rng(seed).standard_normal((3, 12)).astype(np.float32)
    kept = np.asarray(likely(jnp.asarray(scores), draw(3, top_k=k, top_p=p, temperature=temperature))) > -np.inf
    for row, actual in zip(scores / np.float32(temperature), kept, strict=True):
        order = np.argsort(-row)[:k]
        weights = np.exp(row[order] - row[order[0]])
        before = np.cumsum(weights / weights.sum()) - weights / weights.sum()
        doubtful = order[np.abs(before - p) < 1e-5]
        expected = set(order[(before < p) | (np.arange(len(order)) == 0)])
        assert set(np.flatnonzero(actual)) ^ expected <= set(doubtful)


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        ({"top_p": 0.25}, [1]),
        ({"top_p": above(0.25)}, [1, 3]),
        ({"top_p": 0.5}, [1, 3]),
        ({"top_p": above(0.5)}, [1, 3, 4]),
        ({"top_p": 0.75}, [1, 3, 4]),
        ({"top_p": above(0.75)}, [1, 3, 4, 5]),
        ({"top_p": 1e-9}, [1]),
        ({"top_k": 1}, [1]),
        ({"top_k": 3}, [1, 3, 4]),
        ({"top_k": 2, "top_p": 0.5}, [1]),
        ({"top_k": 2, "top_p": above(0.5)}, [1, 3]),
    ],
)
def test_top_k_and_top_p_keep_no_token_too_many_at_their_boundary(change, kept):
    """Four equal logits have probabilities of exactly 1/4; the lower ids come first."""
    scores = jnp.array([[-jnp.inf, 2.0, -jnp.inf, 2.0, 2.0, 2.0]])
    assert np.flatnonzero(jax.jit(likely)(scores, draw(1, **change))[0] > -np.inf).tolist() == kept


def test_a_row_that_keeps_all_tokens_has_the_same_logits_beside_rows_that_do_not():
    """Many small probabilities, whose rounded sum reaches 1 before the last of them."""
    scores = jnp.asarray(np.random.default_rng(0).standard_normal((1, 20_000)), jnp.float32)
    everything = likely(scores, draw(1, top_k=None, top_p=None, temperature=0.7))
    assert "sort" not in jax.jit(likely).lower(scores, draw(1, top_k=None, top_p=None)).as_text()
    np.testing.assert_array_equal(likely(scores, draw(1, top_k=20_000, temperature=0.7)), everything)


@pytest.mark.parametrize("temperature", [0.7, 2.0])
def test_tokens_of_one_seed_are_distributed_over_positions_as_the_softmax_says(temperature):
    rows = 4000
    scores = np.array([2.0, 1.0, 0.0, -1.0, 1.5, -np.inf], np.float32)
    settings = draw(rows, temperature=temperature, seed=5)._replace(num_drawn=jnp.arange(rows))
    drawn = np.asarray(jax.jit(sample)(jnp.broadcast_to(scores, (rows, 6)), jnp.zeros((rows, 6), bool), settings))
    expected = np.exp(scores / temperature) / np.exp(scores / temperature).sum()
    counts, pairs = np.bincount(drawn, minlength=6), np.zeros((6, 6))
    np.add.at(pairs, (drawn[:-1], drawn[1:]), 1)
    # Five standard deviations of a binomial; neighbouring positions are independent of one another.
    assert (np.abs(counts - rows * expected) <= 5 * np.sqrt(rows * expected)).all()
    both = rows * expected[:, None] * expected
    assert (np.abs(pairs - both) <= 5 * np.sqrt(both) + 1e-9).all()


def test_a_repetition_penalty_is_taken_from_what_was_seen():
    scores = jnp.array([[2.0, 1.9, -1.0], [-1.0, -1.5, -9.0]])
    seen = jnp.array([[True, False, False], [True, False, False]])
    options = {"temperature": 0.0}
    assert sample(scores, seen, draw(2, **options)).tolist() == [0, 0]
    assert sample(scores, seen, draw(2, repetition_penalty=2.0, **options)).tolist() == [1, 1]
