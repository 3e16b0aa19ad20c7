"""Measure and loss of the selection agree with loops over queries, and know a perfect and a blind selection."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nsa_jax import NSAConfig, select_blocks
from nsa_jax.selection import selection_loss, selection_recall
from nsa_jax.testing import random_inputs, reference_selection

CONFIG = NSAConfig(
    compress_block=8, compress_stride=4, select_block=8, num_selected=5, num_init=1, num_local=1, window=12
)
HEADS = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}


measured = jax.jit(selection_recall, static_argnums=1)


def by_loop(inputs, config, positions):
    """Chosen, random and best shares of each K/V head, query by query."""
    q, k = (np.asarray(x, np.float64) for x in (inputs.q, inputs.kv.slc_k))
    blocks = np.asarray(reference_selection(inputs, config)[1])
    segments = np.zeros(k.shape[:2]) if inputs.segment_ids is None else np.asarray(inputs.segment_ids)
    B, T, K, Dk = k.shape
    s, G = config.select_block, q.shape[2] // K
    sums = np.zeros((4, K))
    for b in range(B):
        for t in positions:
            start = int(np.flatnonzero(segments[b] == segments[b, t])[0])
            own, first = t // s, start // s
            forced = {j for j in range(first, own + 1) if j < first + config.num_init or j > own - config.num_local}
            free = [j for j in range(first, own + 1) if j not in forced]
            for h in range(K):
                mass = np.zeros(-(-T // s))
                for g in range(h * G, (h + 1) * G):
                    p = np.exp(k[b, start : t + 1, h] @ q[b, t, g] / np.sqrt(Dk))
                    p /= p.sum()
                    for key in range(start, t - config.window + 1):
                        if key // s in free:
                            mass[key // s] += p[key - start]
                chosen = [j for j in blocks[b, h, t] if j in free]
                sums[:, h] += (
                    mass[chosen].sum(),
                    mass.sum() * len(chosen) / max(len(free), 1),
                    np.sort(mass[free])[::-1][: len(chosen)].sum(),
                    mass.sum(),
                )
    return sums[:3] / sums[3]


@pytest.mark.parametrize("num_segments", [0, 3])
@pytest.mark.parametrize("T", [96, 101])
def test_shares_equal_those_counted_query_by_query(T, num_segments):
    inputs = random_inputs(jax.random.key(0), CONFIG, T=T, B=2, num_segments=num_segments, **HEADS)
    positions = [3, 20, 47, 64, 80, T - 1]
    recall = measured(inputs, CONFIG, jnp.array(positions, jnp.int32))
    expected = by_loop(inputs, CONFIG, positions)
    np.testing.assert_allclose(np.stack(recall[:3]), expected, rtol=1e-5)
    assert (recall.chosen <= recall.best).all()
    assert (recall.beyond < 1).all()


def test_scores_that_know_the_keys_choose_nearly_the_best_and_unrelated_scores_choose_at_random():
    config = NSAConfig(8, 8, 8, 6, 0, 1, 8)
    inputs = random_inputs(jax.random.key(1), config, T=1024, **HEADS)
    # Keys that are alike within a block, so that their mean says all about them.
    k = jnp.repeat(jax.random.normal(jax.random.key(2), (1, 128, 2, 8)), 8, axis=1)
    tied = inputs._replace(kv=inputs.kv._replace(slc_k=k, cmp_k=k[:, ::8]))
    positions = jnp.arange(512, 1024, 4, dtype=jnp.int32)
    skill = measured(tied, config, positions).skill
    assert (skill > 0.9).all(), skill  # heads of a group weigh the blocks a little differently
    blind = tied._replace(kv=tied.kv._replace(cmp_k=inputs.kv.cmp_k))
    assert (jnp.abs(measured(blind, config, positions).skill) < 0.1).all()


def test_the_blocks_measured_are_those_that_the_attention_reads():
    inputs = random_inputs(jax.random.key(3), CONFIG, T=96, **HEADS)
    lse, blocks, _ = reference_selection(inputs, CONFIG)
    select = jax.jit(functools.partial(select_blocks, config=CONFIG, implementation="xla"))
    assert (blocks == select(inputs.q, inputs.kv.cmp_k, lse)).all()


def test_what_another_choice_reads_is_measured_by_its_tokens_for_each_group_or_each_head():
    inputs = random_inputs(jax.random.key(0), CONFIG, T=96, B=2, num_segments=2, **HEADS)
    positions = jnp.array([20, 47, 64, 80, 95], jnp.int32)
    blocks = reference_selection(inputs, CONFIG)[1][:, :, positions]
    of_groups = (blocks[..., None] == jnp.arange(96)[None, None, None, None, :] // CONFIG.select_block).any(axis=3)
    own = measured(inputs, CONFIG, positions)
    for tokens in (of_groups, jnp.repeat(of_groups, 2, axis=1)):
        np.testing.assert_allclose(
            np.stack(measured(inputs, CONFIG, positions, tokens=tokens)), np.stack(own), rtol=1e-5
        )
    for heads, share in (([1, 1, 1, 1], [1, 1]), ([0, 0, 0, 0], [0, 0])):
        tokens = jnp.broadcast_to(jnp.array(heads, bool)[None, :, None, None], (2, 4, 5, 96))
        np.testing.assert_allclose(measured(inputs, CONFIG, positions, tokens=tokens).chosen, share, rtol=1e-5)
    parts = [
        measured(
            inputs, CONFIG, positions, tokens=jnp.broadcast_to(jnp.arange(4)[None, :, None, None] == h, (2, 4, 5, 96))
        )
        for h in range(4)
    ]
    # Each head has a part of the mass of its group, and none of the other's.
    np.testing.assert_allclose(sum(part.chosen for part in parts), [1, 1], rtol=1e-5)
    assert ((parts[0].chosen > 0) == jnp.array([True, False])).all()


def test_tokens_that_do_not_fit_are_refused_by_name():
    inputs = random_inputs(jax.random.key(0), CONFIG, T=96, **HEADS)
    for tokens in (jnp.zeros((1, 3, 2, 96), bool), jnp.zeros((1, 2, 2, 96))):
        with pytest.raises(ValueError, match=r"tokens: .*: expected bool \[B, K or H, S, T\] with T = 96"):
            selection_recall(inputs, CONFIG, jnp.array([50, 60], jnp.int32), tokens=tokens)


def test_a_sample_without_anything_beyond_the_window_has_no_share():
    inputs = random_inputs(jax.random.key(4), CONFIG, T=64, **HEADS)
    assert jnp.isnan(measured(inputs, CONFIG, jnp.array([0, 5], jnp.int32)).chosen).all()


def loss_by_loop(teacher, student, config, positions):
    """The divergence query by query: the attention of one layer's inputs from the importance in another's."""
    l, d, s = config.compress_block, config.compress_stride, config.select_block  # noqa: E741
    target_q, k, q, compressed = (
        np.asarray(x, np.float64) for x in (teacher.q, teacher.kv.slc_k, student.q, student.kv.cmp_k)
    )
    B, T, K, Dk = k.shape
    segments = np.zeros((B, T)) if teacher.segment_ids is None else np.asarray(teacher.segment_ids)
    G, terms = q.shape[2] // K, []
    for b, t, h in np.ndindex(B, T, K):
        if t not in positions:
            continue
        start = int(np.flatnonzero(segments[b] == segments[b, t])[0])
        own, first = t // s, start // s
        seen = [i for i in range(compressed.shape[1]) if start <= i * d and i * d + l - 1 <= t]
        mass, importance = np.zeros(own + 1), np.zeros(own + 1)
        for g in range(h * G, (h + 1) * G):
            p = np.exp(k[b, start : t + 1, h] @ target_q[b, t, g] / np.sqrt(Dk))
            for key in range(start, t - config.window + 1):
                mass[key // s] += p[key - start] / p.sum()
            p = np.exp(compressed[b, seen, h] @ q[b, t, g] / np.sqrt(Dk))
            for i, share in zip(seen, p / p.sum(), strict=True):
                for stride in range(i * d, i * d + l, d):
                    importance[stride // s] += share
        free = [
            j
            for j in range(first + config.num_init, own - config.num_local + 1)
            if j * s <= t - config.window and importance[j]
        ]
        m, p = mass[free] / mass[free].sum(), importance[free] / importance[free].sum()
        terms.append((m * np.log(m / p)).sum())
    return np.mean(terms)


@pytest.mark.parametrize(("T", "num_segments", "select_in_window"), [(96, 0, True), (101, 3, False)])
def test_the_loss_is_the_divergence_query_by_query_and_its_gradient_that_of_the_scores_alone(
    T, num_segments, select_in_window
):
    config = dataclasses.replace(CONFIG, select_in_window=select_in_window)
    inputs = random_inputs(jax.random.key(0), config, T=T, B=2, num_segments=num_segments, **HEADS)
    positions = [3, 20, 47, 64, 80, T - 1]

    @jax.jit
    def loss_and_gradient(q, kv):
        return jax.value_and_grad(
            lambda q, kv: selection_loss(inputs._replace(q=q, kv=kv), config, jnp.array(positions, jnp.int32)), (0, 1)
        )(q, kv)

    loss, (to_q, to_kv) = loss_and_gradient(inputs.q, inputs.kv)
    np.testing.assert_allclose(loss, loss_by_loop(inputs, inputs, config, positions), rtol=1e-5)
    assert {name for name, x in to_kv._asdict().items() if np.any(x != 0)} == {"cmp_k"}
    for name, gradient in (("q", to_q), ("cmp_k", to_kv.cmp_k)):
        direction = np.random.default_rng(0).standard_normal(gradient.shape)

        def moved(step, name=name, direction=direction):
            if name == "q":
                return inputs._replace(q=np.float64(inputs.q) + step * direction)
            return inputs._replace(kv=inputs.kv._replace(cmp_k=np.float64(inputs.kv.cmp_k) + step * direction))

        up, down = (loss_by_loop(inputs, moved(step), config, positions) for step in (1e-4, -1e-4))
        np.testing.assert_allclose((np.float64(gradient) * direction).sum(), (up - down) / 2e-4, rtol=1e-4)


def test_scores_that_are_the_attention_have_no_loss_and_less_than_all_attention_is_compared():
    config = NSAConfig(8, 8, 8, 6, 0, 1, 8)
    inputs = random_inputs(jax.random.key(1), config, T=256, **HEADS)
    k = jnp.repeat(jax.random.normal(jax.random.key(2), (1, 32, 2, 8)), 8, axis=1)
    tied = inputs._replace(kv=inputs.kv._replace(slc_k=k, cmp_k=k[:, ::8]))
    loss = jax.jit(selection_loss, static_argnums=1)
    ends = jnp.arange(7, 256, 8, dtype=jnp.int32)  # of blocks, where every block before the window is seen whole
    assert abs(loss(tied, config, ends)) < 1e-6 < 0.1 < loss(inputs, config, ends)
    assert loss(inputs, config, jnp.arange(8, dtype=jnp.int32)) == 0  # there is nothing before the window


def test_a_loss_without_a_selection_is_refused_by_name():
    inputs = random_inputs(jax.random.key(0), CONFIG, T=96, **HEADS)
    with pytest.raises(ValueError, match=r"config.num_selected = 0: expected at least 1"):
        selection_loss(inputs, dataclasses.replace(CONFIG, num_selected=0), jnp.array([50], jnp.int32))
