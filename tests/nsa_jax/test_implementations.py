"""Every implementation against the reference through the public comparison helpers, forward and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nsa_jax
from nsa_jax import NSAConfig, xla
from nsa_jax.testing import assert_matches_reference, assert_trees_close, random_inputs, tolerance_of

CONFIG = NSAConfig(
    compress_block=4, compress_stride=2, select_block=8, num_selected=4, num_init=1, num_local=2, window=10
)
SHAPES = {
    "plain": {"T": 64, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8},
    "odd length, small values, segments": {
        "T": 61, "num_heads": 6, "num_kv_heads": 2, "head_dim": 8, "v_head_dim": 5, "B": 2, "num_segments": 3,
    },
    "one head a group": {"T": 33, "num_heads": 3, "num_kv_heads": 3, "head_dim": 4, "v_head_dim": 7},
    "shorter than a block": {"T": 3, "num_heads": 2, "num_kv_heads": 1, "head_dim": 4},
    "one token": {"T": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 4},
    "a slice of queries": {
        "T": 61, "num_heads": 4, "num_kv_heads": 1, "head_dim": 8, "query_offset": 19, "num_queries": 30,
        "num_segments": 2, "B": 2,
    },
}  # fmt: skip


# By the random problems that are compared with the brute force, and by the same shape in chunks.
SHOWN_ELSEWHERE = ("plain", "one head a group", "odd length, small values, segments", "a slice of queries")


@pytest.mark.parametrize(
    "shape", [pytest.param(x, marks=pytest.mark.exhaustive if x in SHOWN_ELSEWHERE else ()) for x in SHAPES]
)
def test_xla_matches_reference(shape):
    inputs = random_inputs(jax.random.key(1), CONFIG, **SHAPES[shape])
    # A softmax over one key is constant: its gradients are zero but for rounding, and have no relative error.
    assert_matches_reference(inputs, CONFIG, implementation="xla", gradients=inputs.q.shape[1] > 1)


def test_one_token_has_the_gradients_of_the_reference():
    inputs = random_inputs(jax.random.key(1), CONFIG, **SHAPES["one token"])

    def gradient(implementation):
        def loss(arguments):
            return nsa_jax.nsa_attention(*arguments, config=CONFIG, implementation=implementation).sum()

        return jax.jit(jax.grad(loss))((inputs.q, inputs.kv, inputs.gates))

    actual, expected = gradient("xla"), gradient("reference")
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert jnp.abs(expected[1].slc_v).max() > 0


@pytest.mark.parametrize(
    "shape", ["odd length, small values, segments", pytest.param("a slice of queries", marks=pytest.mark.exhaustive)]
)
def test_xla_matches_reference_in_many_chunks(shape, monkeypatch):
    monkeypatch.setattr(xla, "CHUNK_ELEMENTS", 600)
    assert_matches_reference(random_inputs(jax.random.key(1), CONFIG, **SHAPES[shape]), CONFIG, implementation="xla")


@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.exhaustive)])
def test_xla_matches_reference_in_16_bits(dtype):
    inputs = random_inputs(jax.random.key(2), CONFIG, dtype=dtype, **SHAPES["plain"])
    assert_matches_reference(inputs, CONFIG, implementation="xla")


@pytest.mark.exhaustive
def test_xla_matches_reference_in_float64():
    with jax.enable_x64(True):
        shape = SHAPES["odd length, small values, segments"]
        inputs = random_inputs(jax.random.key(3), CONFIG, dtype=jnp.float64, **shape)
        assert_matches_reference(inputs, CONFIG, implementation="xla")


def test_reference_in_16_bits_is_the_float32_result_rounded_once():
    """Outputs, lse and gradients of each branch, to the last bit."""
    inputs = random_inputs(jax.random.key(3), CONFIG, dtype=jnp.bfloat16, **SHAPES["plain"])
    options = {"config": CONFIG, "implementation": "reference"}

    @jax.jit
    def run(q, kv):
        o, pull = jax.vjp(lambda *a: nsa_jax.compressed_attention(*a, **options), q, kv.cmp_k, kv.cmp_v)
        results = [o, pull((q, jnp.where(o[1] > -jnp.inf, 1, jnp.zeros_like(o[1]))))]
        blocks = nsa_jax.select_blocks(q, kv.cmp_k, o[1], **options)
        selected = lambda *a: nsa_jax.selected_attention(*a, blocks, **options)  # noqa: E731
        window = lambda *a: nsa_jax.window_attention(*a, **options)  # noqa: E731
        for op, pair in ((selected, kv[2:4]), (window, kv[4:])):
            o, pull = jax.vjp(op, q, *pair)
            results += [o, pull(q)]
        return results

    narrow = run(inputs.q, inputs.kv)
    wide = run(*jax.tree.map(lambda x: x.astype(jnp.float32), (inputs.q, inputs.kv)))
    for a, b in zip(jax.tree.leaves(narrow), jax.tree.leaves(wide), strict=True):
        np.testing.assert_array_equal(a, b.astype(a.dtype))


def test_default_implementation_matches_reference():
    inputs = random_inputs(jax.random.key(4), CONFIG, **SHAPES["plain"])
    assert_matches_reference(inputs, CONFIG, implementation=None, gradients=False)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_gradients_match_finite_differences(implementation):
    config = NSAConfig(2, 1, 2, 2, 1, 1, 3)
    with jax.enable_x64(True):
        inputs = random_inputs(
            jax.random.key(5), config, T=7, num_heads=2, num_kv_heads=1, head_dim=2, v_head_dim=3, dtype=jnp.float64
        )
        cotangent = jax.random.normal(jax.random.key(6), (1, 7, 2, 3), jnp.float64)

        @jax.jit
        def loss(arguments):
            o = nsa_jax.nsa_attention(*arguments, config=config, implementation=implementation)
            return (o * cotangent).sum()

        arguments = (inputs.q, inputs.kv, inputs.gates)
        gradient = jax.jit(jax.grad(loss))(arguments)
        leaves, structure = jax.tree.flatten(arguments)
        step = 1e-6
        for number, leaf in enumerate(leaves):
            numeric = np.zeros(leaf.shape)
            for at in np.ndindex(leaf.shape):
                moved = [
                    loss(jax.tree.unflatten(structure, [*leaves[:number], leaf.at[at].add(h), *leaves[number + 1 :]]))
                    for h in (step, -step)
                ]
                numeric[at] = (moved[0] - moved[1]) / (2 * step)
            assert_trees_close(jax.tree.leaves(gradient)[number], jnp.asarray(numeric), 1e-7, f"input {number}")


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("branch", [1, 2])
def test_every_block_or_a_full_window_is_dense_attention(implementation, branch):
    T = 45
    config = NSAConfig(4, 2, 8, num_selected=6, window=T)
    inputs = random_inputs(jax.random.key(7), config, T=T, num_heads=4, num_kv_heads=2, head_dim=8, B=2, num_segments=2)
    gates = jnp.zeros(inputs.gates.shape).at[..., branch].set(1)
    actual = jax.jit(
        lambda *a: nsa_jax.nsa_attention(
            *a, config=config, segment_ids=inputs.segment_ids, implementation=implementation
        )
    )(inputs.q, inputs.kv, gates)
    k, v = inputs.kv[2 * branch], inputs.kv[2 * branch + 1]
    mask = (inputs.segment_ids[:, :, None] == inputs.segment_ids[:, None, :])[:, None]
    expected = jax.nn.dot_product_attention(inputs.q, k, v, mask=mask, is_causal=True)
    assert_trees_close(actual, expected, tolerance_of(jnp.float32))


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_permuting_the_batch_permutes_the_output(implementation):
    inputs = random_inputs(
        jax.random.key(8), CONFIG, T=40, num_heads=4, num_kv_heads=2, head_dim=8, B=4, num_segments=3
    )
    order = jnp.array([2, 0, 3, 1])

    @jax.jit
    def attend(q, kv, gates, segment_ids):
        return nsa_jax.nsa_attention(
            q, kv, gates, config=CONFIG, segment_ids=segment_ids, implementation=implementation
        )

    arguments = (inputs.q, inputs.kv, inputs.gates, inputs.segment_ids)
    permuted = attend(*jax.tree.map(lambda x: x[order], arguments))
    assert_trees_close(permuted, attend(*arguments)[order], 1e-6)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_query_never_sees_later_tokens_or_other_segments(implementation):
    T = 40
    inputs = random_inputs(jax.random.key(9), CONFIG, T=T, num_heads=2, num_kv_heads=1, head_dim=4)
    segment_ids = jnp.repeat(jnp.array([[1, 2]], jnp.int32), jnp.array([16, 24]), axis=1, total_repeat_length=T)

    @jax.jit
    def gradient_at(t):
        def f(kv):
            o = nsa_jax.nsa_attention(
                inputs.q, kv, inputs.gates, config=CONFIG, segment_ids=segment_ids, implementation=implementation
            )
            return o[0, t].sum()

        return jax.grad(f)(inputs.kv)

    for t, first in ((5, 0), (15, 0), (16, 16), (17, 16), (33, 16)):
        gradient = gradient_at(t)
        for name in ("slc_k", "slc_v", "win_k", "win_v"):
            reached = jnp.abs(getattr(gradient, name)[0]).sum((1, 2)) > 0
            # With one visible key a softmax is constant in it, so values, not keys, show what is seen.
            assert not reached[t + 1 :].any(), (name, t)
            assert not reached[:first].any(), (name, t)
            assert not name.endswith("v") or reached[t], (name, t)
        for name in ("cmp_k", "cmp_v"):
            reached = np.flatnonzero(jnp.abs(getattr(gradient, name)[0]).sum((1, 2)) > 0)
            assert all(i * 2 >= first and i * 2 + 3 <= t for i in reached), (name, t)


def test_queries_without_compressed_tokens_give_zero_and_finite_gradients():
    inputs = random_inputs(jax.random.key(10), CONFIG, T=20, num_heads=2, num_kv_heads=1, head_dim=4)
    for implementation in ("reference", "xla"):

        @jax.jit
        def attend(q, k, v, implementation=implementation):
            op = functools.partial(nsa_jax.compressed_attention, config=CONFIG, implementation=implementation)
            (o, lse), vjp = jax.vjp(op, q, k, v)
            return o, lse, vjp((jnp.ones_like(o), jnp.ones_like(lse)))

        o, lse, gradients = attend(inputs.q, inputs.kv.cmp_k, inputs.kv.cmp_v)
        assert (o[:, :3] == 0).all()
        assert (lse[:, :, :3] == -jnp.inf).all()
        assert jnp.isfinite(lse[:, :, 3:]).all()
        assert all(jnp.isfinite(g).all() for g in gradients)
        assert (gradients[0][:, :3] == 0).all()


def test_xla_memory_is_linear_in_length():
    """Temporary memory of forward and backward, as the compiler counts it, at 16k and 64k tokens."""
    config = NSAConfig()

    def temporary_bytes(T):
        inputs = jax.eval_shape(
            lambda: random_inputs(jax.random.key(0), config, T=T, num_heads=2, num_kv_heads=1, head_dim=32)
        )

        def loss(arguments):
            return nsa_jax.nsa_attention(*arguments, config=config, implementation="xla").sum()

        compiled = jax.jit(jax.grad(loss)).lower((inputs.q, inputs.kv, inputs.gates)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporary_bytes(16384), temporary_bytes(65536)
    assert long < 4.5 * short
    assert long < 4 * 2**30
