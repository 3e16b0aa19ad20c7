"""Scaled rotary embedding: the YaRN paper's equations, their limits, and every path through the layers."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import nsa_jax
import nsa_jax.nnx
from nsa_jax import NSAConfig, RopeScaling
from nsa_jax.layer import NSALayerConfig, compressed_tokens, project_branches
from nsa_jax.rope import apply_rope, rope_frequencies
from nsa_jax.testing import assert_trees_close

CONFIG = NSAConfig(4, 2, 8, 4, 1, 2, 10)
HEADS = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
# 40 tokens trained on: of the frequencies 1, 0.1, 0.01, 0.001 some are kept, some divided, one is in between.
YARN = RopeScaling("yarn", factor=4, original_length=40, beta_fast=4, beta_slow=0.1)
LLAMA3 = RopeScaling("llama3", factor=8, original_length=40, beta_fast=4)
SCALINGS = [RopeScaling("linear", 4), RopeScaling("ntk", 4), YARN, RopeScaling("yarn", 8, 2048), LLAMA3]
E, T = 16, 45


def by_the_equations(x, positions, theta, scaling):
    """The rotation of every pair as a complex number, from equations 5, 10 to 16 and 17 to 22 of arXiv 2309.00071."""
    D, s, L = x.shape[-1], scaling.factor, scaling.original_length
    out = np.empty(x.shape)
    for d in range(D // 2):
        frequency, magnitude = theta ** (-2 * d / D), 1.0
        if scaling.kind == "linear":
            frequency /= s
        elif scaling.kind == "ntk":
            frequency = (theta * s ** (D / (D - 2))) ** (-2 * d / D)
        elif scaling.kind in ("yarn", "llama3"):
            wavelength = 2 * math.pi / frequency
            r, alpha, beta = L / wavelength, scaling.beta_slow, scaling.beta_fast
            gamma = 0.0 if r < alpha else 1.0 if r > beta else (r - alpha) / (beta - alpha)
            frequency = (1 - gamma) * frequency / s + gamma * frequency
            magnitude = 0.1 * math.log(s) + 1 if scaling.kind == "yarn" else 1.0
        for b, t, h in np.ndindex(x.shape[:3]):
            pair = complex(x[b, t, h, d], x[b, t, h, d + D // 2])
            pair *= magnitude * complex(math.cos(positions[b, t] * frequency), math.sin(positions[b, t] * frequency))
            out[b, t, h, d], out[b, t, h, d + D // 2] = pair.real, pair.imag
    return out


@pytest.mark.parametrize("scaling", [RopeScaling(), *SCALINGS], ids=str)
def test_rotation_equals_the_papers_equations(scaling):
    rng = np.random.default_rng(0)
    x, positions = rng.standard_normal((2, 7, 3, 12)), rng.integers(0, 9000, (2, 7))
    expected = by_the_equations(x, positions, 10_000.0, scaling)
    with jax.enable_x64(True):
        assert_trees_close(apply_rope(jnp.asarray(x), jnp.asarray(positions), 10_000.0, scaling), expected, 1e-12)


@pytest.mark.parametrize("kind", ["linear", "ntk", "yarn", "llama3"])
def test_factor_1_is_the_plain_embedding(kind):
    scaling = RopeScaling(kind, 1.0, 64)
    plain = rope_frequencies(16, 500.0, RopeScaling())
    np.testing.assert_allclose(rope_frequencies(16, 500.0, scaling), plain, rtol=1e-15)
    np.testing.assert_allclose(plain, 500.0 ** (-np.arange(8) / 8), rtol=1e-15)
    assert scaling.magnitude == 1


def test_high_frequencies_stay_and_low_ones_are_divided_by_the_factor():
    plain = rope_frequencies(64, 10_000.0, RopeScaling())
    for scaling in (RopeScaling("ntk", 8), RopeScaling("yarn", 8, 2048)):
        ratio = plain / rope_frequencies(64, 10_000.0, scaling)
        assert ratio[0] == 1
        assert ratio[-1] == pytest.approx(8, rel=1e-12)
        assert (np.diff(ratio) >= 0).all()
    turns = 2048 * plain / (2 * np.pi)  # of the last scaling, yarn
    np.testing.assert_array_equal(ratio[turns > 32], 1)
    np.testing.assert_allclose(ratio[turns < 1], 8, rtol=1e-12)
    assert ((ratio > 1) & (ratio < 8) == (turns > 1) & (turns < 32)).all()
    np.testing.assert_allclose(plain / rope_frequencies(64, 10_000.0, RopeScaling("linear", 8)), 8, rtol=1e-12)


def test_yarn_multiplies_the_logits_of_every_branch_by_the_square_of_its_magnitude():
    # At position 0 nothing turns, so that scaling leaves a layer's queries and keys alone but for their magnitude.
    nowhere = jnp.zeros((1, T), jnp.int32)
    x = jax.random.normal(jax.random.key(0), (1, T, E))
    sizes = {"config": CONFIG, "compression": "mean", **HEADS}
    weights = nn.unbox(jax.jit(nsa_jax.NSAttention(**sizes).init)(jax.random.key(1), x))["params"]

    @jax.jit
    def logits():
        def with_scaling(scaling):
            config = NSALayerConfig(**sizes, rope_scaling=scaling)
            q, kv = project_branches(weights, x, nowhere, config)
            cmp_k, _ = compressed_tokens(weights, kv.cmp_k, kv.cmp_v, nowhere, config)
            return [jnp.einsum("btkd,bskd->bkts", q[:, :, ::2], k) for k in (cmp_k, kv.slc_k, kv.win_k)]

        return with_scaling(RopeScaling()), with_scaling(YARN)

    plain, scaled = logits()
    assert_trees_close(scaled, [x * (0.1 * math.log(4) + 1) ** 2 for x in plain], 1e-6)


def test_a_layer_with_scaling_is_another_function():
    layer = nsa_jax.FullAttention(**HEADS, rope_scaling=YARN)
    x = jax.random.normal(jax.random.key(0), (1, 9, E))
    scaled, variables = jax.jit(layer.init_with_output)(jax.random.key(1), x)
    plain = jax.jit(layer.clone(rope_scaling=RopeScaling()).apply)(variables, x)
    assert not np.allclose(scaled, plain, atol=1e-3)


def modules(kind):
    linen, twin = {"nsa": (nsa_jax.NSAttention, nsa_jax.nnx.NSAttention)}.get(
        kind, (nsa_jax.FullAttention, nsa_jax.nnx.FullAttention)
    )
    fields = HEADS | ({"config": CONFIG} if kind == "nsa" else {})
    return linen(**fields, rope_scaling=YARN), twin(E, rngs=nnx.Rngs(0), rope_scaling=YARN, **fields)


@pytest.mark.parametrize("kind", ["nsa", "full"])
def test_both_flavours_scale_alike_and_decoding_equals_the_whole_forward_pass(kind):
    linen, twin = modules(kind)
    x = jax.random.normal(jax.random.key(2), (2, T, E))
    variables = nn.unbox(jax.jit(linen.init)(jax.random.key(3), x))
    expected = jax.jit(linen.apply)(variables, x)
    for name, value in variables["params"].items():
        getattr(twin, name)[...] = value
    assert_trees_close(nnx.jit(lambda m: m(x))(twin), expected, 1e-6)

    @jax.jit
    def generate(variables, cache):
        first, cache = linen.apply(variables, x[:, :21], cache, method="prefill")

        def step(cache, token):
            y, cache = linen.apply(variables, token[:, None], cache, method="decode_step")
            return cache, y[:, 0]

        _, rest = jax.lax.scan(step, cache, jnp.moveaxis(x[:, 21:], 1, 0))
        return jnp.concatenate([first, jnp.moveaxis(rest, 0, 1)], axis=1)

    assert_trees_close(generate(variables, linen.init_cache(batch_size=2, max_length=T)), expected, 1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "dynamic"}, r"RopeScaling.kind = 'dynamic': expected one of none, linear, ntk, yarn"),
        ({"kind": "linear", "factor": 0.5}, r"RopeScaling.factor = 0.5: expected a number of at least 1"),
        ({"kind": "linear", "factor": math.nan}, r"RopeScaling.factor = nan"),
        ({"factor": 4.0}, r"RopeScaling.factor = 4.0: expected 1 with kind = none"),
        ({"kind": "yarn", "factor": 4.0}, r"RopeScaling.original_length = None: expected the tokens trained on"),
        ({"kind": "yarn", "original_length": 0}, r"RopeScaling.original_length = 0: expected an integer of at least 1"),
        ({"beta_slow": 0.0}, r"RopeScaling.beta_slow = 0.0: expected above 0 and below beta_fast = 32.0"),
        ({"beta_slow": 32.0}, r"RopeScaling.beta_slow = 32.0: expected above 0 and below beta_fast = 32.0"),
        ({"beta_slow": 40.0}, r"RopeScaling.beta_slow = 40.0: expected above 0 and below beta_fast = 32.0"),
    ],
)
def test_impossible_scalings_are_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        RopeScaling(**fields)


def test_head_sizes_that_do_not_fit_are_refused_by_name():
    with pytest.raises(ValueError, match=r"head_dim = 3: rotary position embedding needs an even head size"):
        rope_frequencies(3, 100.0, RopeScaling())
    with pytest.raises(ValueError, match=r"head_dim = 2: RopeScaling.kind = ntk needs a head size of at least 4"):
        rope_frequencies(2, 100.0, RopeScaling("ntk", 2))
