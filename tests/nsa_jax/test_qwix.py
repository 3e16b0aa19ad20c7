"""LoRA and int8 through qwix: every projection is found by its name, trained and quantised, in Linen and in NNX."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from flax import nnx

import nsa_jax
import nsa_jax.nnx
from nsa_jax import NSAConfig
from nsa_jax.testing import normwise_error

# It reads names of Flax that are deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:qwix")

HEADS = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
SPARSE = {"config": NSAConfig(4, 2, 8, 8, 1, 2, 10)}  # every block is read, so that rounding changes no choice
E, T = 16, 21
KINDS = {
    "nsa": ("NSAttention", {**SPARSE, "qk_norm": True, "use_bias": True}),
    "nsa, the paper's layout": ("NSAttention", {**SPARSE, "compression": "mlp", "share_kv": False}),
    "full": ("FullAttention", {}),
}


def every(*by_default):
    """All kinds of layers and dtypes, of which those that are not by default are exhaustive."""
    pairs = itertools.product(KINDS, (jnp.float32, jnp.bfloat16))
    return pytest.mark.parametrize(
        ("kind", "dtype"),
        [pytest.param(*pair, marks=[pytest.mark.exhaustive] * (pair not in by_default)) for pair in pairs],
        ids=lambda value: value if isinstance(value, str) else value.__name__,
    )


LORA = {"module_path": ".*", "op_names": ("dot_general",), "rank": 2, "alpha": 4.0}
INT8 = {"module_path": ".*", "op_names": ("dot_general",), "weight_qtype": jnp.int8}


def problem(kind, dtype):
    """A Linen layer, its NNX twin with the same parameters, these, an input, and the names of all projections."""
    name, fields = KINDS[kind]
    fields = {**HEADS, **fields, "dtype": dtype, "param_dtype": dtype}
    x = jax.random.normal(jax.random.key(0), (2, T, E), dtype)
    linen = getattr(nsa_jax, name)(**fields)
    params = nn.unbox(jax.jit(linen.init)(jax.random.key(1), x))["params"]
    twin = getattr(nsa_jax.nnx, name)(E, rngs=nnx.Rngs(0), **fields)
    for key, value in params.items():
        getattr(twin, key)[...] = value
    return linen, twin, params, x, {n for n in params if n.endswith("_kernel") and not n.startswith("phi_")}


def merged(params, lora):
    """Kernels with their adapters added, as docs/integrations.md says."""

    def kernel(name, value):
        if f"{name}_lora_a" not in lora:
            return value
        a, b = (lora[f"{name}_lora_{ab}"].astype(jnp.float32) for ab in "ab")
        return (value + LORA["alpha"] / LORA["rank"] * (a @ b).reshape(value.shape)).astype(value.dtype)

    return {name: kernel(name, value) for name, value in params.items()}


@every(("nsa", jnp.bfloat16), ("nsa, the paper's layout", jnp.float32))
def test_lora_adapts_every_projection_of_a_linen_layer_trains_nothing_else_and_merges(kind, dtype):
    linen, _, params, x, kernels = problem(kind, dtype)
    adapted = qwix.apply_lora_to_model(linen, qwix.LoraProvider(**LORA))
    theirs = nn.unbox(jax.jit(adapted.init)(jax.random.key(2), x))["params"]
    lora = {n: value for n, value in theirs.items() if "_lora_" in n}
    assert set(lora) == {f"{n}_lora_{ab}" for n in kernels for ab in "ab"}
    target = jax.random.normal(jax.random.key(3), x.shape, dtype)

    @jax.jit
    def step(lora):
        def loss(lora):
            return jnp.square((adapted.apply({"params": params | lora}, x) - target).astype(jnp.float32)).mean()

        value, gradient = jax.value_and_grad(loss)(lora)
        return value, gradient, jax.tree.map(lambda p, g: (p - 0.1 * g).astype(p.dtype), lora, gradient)

    first, gradient, lora = step(lora)
    plain = jnp.square((linen.apply({"params": params}, x) - target).astype(jnp.float32)).mean()
    assert first == pytest.approx(float(plain), rel=1e-2)  # it begins as the layer without it
    for name in kernels:
        assert jnp.abs(gradient[f"{name}_lora_b"]).max() > 0, name
    for _ in range(3):
        value, _, lora = step(lora)
    assert value < first
    y, plain = adapted.apply({"params": params | lora}, x), linen.apply({"params": params}, x)
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    assert normwise_error(linen.apply({"params": merged(params, lora)}, x), y) < tolerance
    assert normwise_error(plain, y) > 2 * tolerance


@every(("nsa", jnp.bfloat16))
def test_lora_adapts_every_projection_of_an_nnx_layer_trains_and_merges(kind, dtype):
    _, twin, params, x, kernels = problem(kind, dtype)
    adapted = qwix.apply_lora_to_model(twin, qwix.LoraProvider(**LORA), x, rngs=nnx.Rngs(1))
    assert {n for n, p in vars(adapted).items() if isinstance(p, nnx.LoRAParam)} == {
        f"{n}_lora_{ab}" for n in kernels for ab in "ab"
    }
    graph, lora, rest = nnx.split(adapted, nnx.LoRAParam, ...)

    @jax.jit
    def run(lora):
        def call(lora):
            return nnx.merge(graph, lora, rest)(x)

        return call(lora), *jax.value_and_grad(lambda lora: jnp.sin(call(lora).astype(jnp.float32)).mean())(lora)

    y, first, gradient = run(lora)
    assert y.dtype == dtype
    assert normwise_error(y, twin(x)) < (1e-5 if dtype == jnp.float32 else 2e-2)
    for name in kernels:
        assert jnp.abs(getattr(gradient, f"{name}_lora_b")[...]).max() > 0, name
    for _ in range(3):
        lora = jax.tree.map(lambda p, g: (p - g).astype(p.dtype), lora, run(lora)[2])
    y, last, _ = run(lora)
    assert last < first
    before, found = twin(x), {name: value[...] for name, value in nnx.to_pure_dict(lora).items()}
    for name, value in merged(params, found).items():
        getattr(twin, name)[...] = value
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    assert normwise_error(twin(x), y) < tolerance < normwise_error(before, y) / 2


@every(("nsa", jnp.bfloat16))
def test_int8_kernels_give_nearly_the_output_in_both_flavours_and_over_a_cache(kind, dtype):
    linen, twin, params, x, kernels = problem(kind, dtype)
    provider = qwix.PtqProvider([qwix.QuantizationRule(**INT8)])
    methods = ("__call__", "prefill", "decode_step")
    quantised = qwix.quantize_model(linen, provider, methods=methods)
    abstract = jax.eval_shape(quantised.init, jax.random.key(1), x)["params"]
    small = qwix.quantize_params(params, abstract)
    types = {n: jax.tree.leaves(value)[0].dtype for n, value in small.items()}
    assert {n for n, found in types.items() if found == jnp.int8} == kernels
    expected = linen.apply({"params": params}, x)

    @jax.jit
    def run(small):
        cache = linen.init_cache(batch_size=2, max_length=T)
        first, cache = quantised.apply({"params": small}, x[:, : T - 1], cache, method="prefill")
        last, _ = quantised.apply({"params": small}, x[:, T - 1 :], cache, method="decode_step")
        return quantised.apply({"params": small}, x), jnp.concatenate([first, last], axis=1)

    for y in run(small):
        assert y.dtype == dtype
        assert 1e-4 < normwise_error(y, expected) < 3e-2
    theirs = qwix.quantize_model(twin, provider, x)
    assert {n for n in kernels if jax.tree.leaves(getattr(theirs, n))[0].dtype == jnp.int8} == kernels
    np.testing.assert_allclose(nnx.jit(lambda m, x: m(x))(theirs, x), run(small)[0], atol=2e-2, rtol=2e-2)
