"""How tokens are drawn from logits."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from train.generation.sampling import Draw, likely, sample


def draw(rows, **changes):
    values = Draw(temperature=1.0, top_k=99, top_p=1.0, repetition_penalty=1.0, seed=0, num_drawn=0)._asdict()
    return Draw(**{name: jnp.full((rows,), value) for name, value in {**values, **changes}.items()})


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


def test_a_repetition_penalty_is_taken_from_what_was_seen():
    scores = jnp.array([[2.0, 1.9, -1.0], [-1.0, -1.5, -9.0]])
    seen = jnp.array([[True, False, False], [True, False, False]])
    options = {"temperature": 0.0}
    assert sample(scores, seen, draw(2, **options)).tolist() == [0, 0]
    assert sample(scores, seen, draw(2, repetition_penalty=2.0, **options)).tolist() == [1, 1]
