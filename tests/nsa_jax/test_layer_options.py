"""Options that attention layers of other codebases have: biases, initialisers, scale, positions, precision, names."""

import functools
import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.nn import initializers
from programs import equations

import nsa_jax
import nsa_jax.nnx
from nsa_jax import NSAConfig, RopeScaling
from nsa_jax.foreign import INSTEAD, rope_scaling_here
from nsa_jax.rope import apply_rope
from nsa_jax.testing import assert_trees_close

CONFIG = NSAConfig(4, 2, 8, 3, 1, 1, 10)
HEADS = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "v_head_dim": 6}
B, T, E = 2, 25, 16
KINDS = {
    "nsa": functools.partial(nsa_jax.NSAttention, **HEADS, config=CONFIG, gate_hidden_dim=4),
    "nsa, the paper's layout": functools.partial(
        nsa_jax.NSAttention, **HEADS, config=CONFIG, gate_hidden_dim=4, compression="mlp", share_kv=False
    ),
    "full": functools.partial(nsa_jax.FullAttention, **HEADS),
    "window": functools.partial(nsa_jax.FullAttention, **HEADS, window=7),
}
EVERY = pytest.mark.parametrize("kind", KINDS)
# Positions over a cache of the paper's layout are in test_core.py.
MOST = pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.exhaustive if "paper" in kind else ()) for kind in KINDS]
)


@functools.cache
def problem(kind, **fields):
    """A layer, random parameters and an input."""
    layer = KINDS[kind](**fields)
    x = jax.random.normal(jax.random.key(0), (B, T, E))
    shapes = nn.unbox(jax.eval_shape(layer.init, jax.random.key(1), x))["params"]
    keys = jax.random.split(jax.random.key(2), len(shapes))
    params = {n: 0.3 * jax.random.normal(k, p.shape) for k, (n, p) in zip(keys, sorted(shapes.items()), strict=True)}
    return layer, params, x


def generate(layer, params, x, positions=None):
    """A prefill, its next chunk and steps of one token, after one another."""

    def part(begin, end):
        return {} if positions is None else {"positions": positions[:, begin:end]}

    variables = {"params": params}
    cache = layer.init_cache(batch_size=B, max_length=T)
    y, cache = layer.apply(variables, x[:, :11], cache, method="prefill", **part(0, 11))
    z, cache = layer.apply(variables, x[:, 11:20], cache, method="prefill", continuing=True, **part(11, 20))
    outputs = [y, z]
    for t in range(20, T):
        y, cache = layer.apply(variables, x[:, t : t + 1], cache, method="decode_step", **part(t, t + 1))
        outputs.append(y)
    return jnp.concatenate(outputs, axis=1)


@EVERY
def test_a_bias_is_one_more_input_that_is_always_1(kind):
    layer, params, x = problem(kind, use_bias=True)
    biases = {name for name in params if name.endswith("bias") and not name.startswith(("gate_", "phi_"))}
    kernels = {name for name in params if name.endswith("_kernel") and not name.startswith(("gate_", "phi_"))}
    assert biases == {name.replace("_kernel", "_bias") for name in kernels}
    wider = {name: value for name, value in params.items() if name not in biases}
    for name in kernels - {"o_kernel"}:
        wider[name] = jnp.concatenate([params[name], params[name.replace("kernel", "bias")][None]])
    wider["o_kernel"] = jnp.pad(params["o_kernel"], ((0, 0), (0, 0), (0, 1)))
    if "gate_in_kernel" in params:
        wider["gate_in_kernel"] = jnp.pad(params["gate_in_kernel"], ((0, 1), (0, 0)))

    @jax.jit
    def run(params, wider, x):
        ones = jnp.concatenate([x, jnp.ones((B, T, 1))], axis=-1)
        expected = KINDS[kind]().apply({"params": wider}, ones)[..., :E] + params["o_bias"][None, None]
        return layer.apply({"params": params}, x), expected

    assert_trees_close(*run(params, wider, x), 1e-5)
    twin = getattr(nsa_jax.nnx, type(layer).__name__)
    fields = {**KINDS[kind].keywords, "use_bias": True}
    theirs = nnx.eval_shape(lambda: twin(E, rngs=nnx.Rngs(0), **fields))
    assert {n: p.shape for n, p in vars(theirs).items() if isinstance(p, nnx.Param)} == {
        n: p.shape for n, p in params.items()
    }


@MOST
def test_a_scale_of_scores_is_one_of_queries_in_every_call(kind):
    layer, params, x = problem(kind)
    scale = 0.7

    @jax.jit
    def run(params, x):
        louder = {**params, "q_kernel": params["q_kernel"] * scale * 8**0.5}
        own = layer.clone(scale=scale)
        return layer.apply({"params": louder}, x), own.apply({"params": params}, x), generate(own, params, x)

    expected, whole, generated = run(params, x)
    assert_trees_close(whole, expected, 1e-5)
    assert_trees_close(generated, expected, 1e-5)


@MOST
def test_positions_of_a_call_turn_queries_and_keys_and_nothing_else(kind):
    layer, params, x = problem(kind)
    far = jnp.stack([jnp.arange(T), 3000 + jnp.arange(T)])
    uneven = jnp.broadcast_to(jnp.arange(T)[None] ** 2, (B, T))

    @jax.jit
    def run(params, x):
        call = functools.partial(layer.apply, {"params": params}, x)
        return call(), call(positions=far), call(positions=uneven), generate(layer, params, x, far)

    plain, shifted, other, generated = run(params, x)
    assert_trees_close(shifted, plain, 1e-3)  # only distances count; large angles have few digits in float32
    assert_trees_close(generated, shifted, 1e-5)
    assert not np.allclose(other, plain, atol=1e-2)
    assert_trees_close(other[:, 0], plain[:, 0], 1e-6)  # the first token sees itself alone


@pytest.mark.parametrize("kind", ["nsa, the paper's layout", "full"])
def test_a_rotary_embedding_of_ones_own_takes_the_place_of_ours(kind):
    layer, params, x = problem(kind)
    own = functools.partial(apply_rope, theta=500.0)

    @jax.jit
    def run(params, x):
        layers = layer.clone(rope_theta=500.0), layer.clone(rotate=own), layer.clone(rotate=lambda x, _: x)
        return [one.apply({"params": params}, x) for one in (*layers, layer.clone(rope_theta=None))]

    ours, theirs, still, none = run(params, x)
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(still, none)
    assert not np.allclose(ours, none, atol=1e-3)


@pytest.mark.parametrize("kind", [pytest.param("nsa, the paper's layout", marks=pytest.mark.exhaustive), "full"])
def test_a_rotary_embedding_may_compute_in_float32_and_keeps_the_shape(kind):
    layer, params, x = problem(kind)
    wide = layer.clone(dtype=jnp.bfloat16, rotate=lambda x, p: apply_rope(x.astype(jnp.float32), p, theta=500.0))
    narrow = layer.clone(dtype=jnp.bfloat16, rotate=functools.partial(apply_rope, theta=500.0))

    @jax.jit
    def run(params, x):
        calls = [functools.partial(one.apply, {"params": params}) for one in (wide, narrow)]
        return *(call(x) for call in calls), generate(wide, params, x)

    actual, expected, generated = run(params, x)
    assert actual.dtype == jnp.bfloat16
    assert_trees_close(actual, expected, 2e-2)
    assert_trees_close(generated, actual, 2e-2)
    with pytest.raises(ValueError, match=r"^rotate: float32 \(.*8\) becomes float32 \(.*4\): expected the same shape"):
        jax.eval_shape(layer.clone(rotate=lambda x, _: x[..., :4]).apply, {"params": params}, x)


def test_kernels_begin_as_the_initialiser_says_of_matrices():
    seen = []

    def init(key, shape, dtype):
        seen.append((shape, dtype))
        return jnp.full(shape, 0.5, dtype)

    fields = {**HEADS, "config": CONFIG, "kernel_init": init, "output_init_scale": 0.25}
    x = jnp.zeros((1, 3, E))
    params = nn.unbox(jax.jit(nsa_jax.NSAttention(**fields).init)(jax.random.key(0), x))["params"]
    assert sorted(seen) == [*sorted(((E, n), jnp.float32) for n in (32, 16, 12)), ((24, E), jnp.float32)]
    for name, value in (("q_kernel", 0.5), ("k_kernel", 0.5), ("v_kernel", 0.5), ("o_kernel", 0.125)):
        np.testing.assert_array_equal(params[name], value)
    assert len(np.unique(params["gate_in_kernel"])) > 9
    twin = nsa_jax.nnx.FullAttention(E, rngs=nnx.Rngs(0), **HEADS, kernel_init=init)
    np.testing.assert_array_equal(twin.o_kernel[...], 0.5)


def test_without_an_initialiser_kernels_have_the_variance_of_their_inputs():
    """Bit for bit as ever: recorded runs begin with these."""
    key, x = jax.random.key(5), jnp.zeros((1, 3, E))
    params = nn.unbox(jax.jit(nsa_jax.FullAttention(**HEADS).init)(key, x))["params"]
    twin = nsa_jax.nnx.FullAttention(E, rngs=nnx.Rngs(5), **HEADS)
    stream = nnx.Rngs(5)
    first, second = stream.params(), stream.params()
    per_head = initializers.lecun_normal(in_axis=0, out_axis=(1, 2))
    np.testing.assert_array_equal(twin.q_kernel[...], per_head(first, (E, 4, 8), jnp.float32))
    join = initializers.lecun_normal(in_axis=(0, 1), out_axis=2)
    np.testing.assert_array_equal(twin.o_kernel[...], join(second, (4, 6, E), jnp.float32))
    assert np.std(params["q_kernel"]) == pytest.approx(E**-0.5, rel=0.1)
    assert np.std(params["o_kernel"]) == pytest.approx(24**-0.5, rel=0.1)


@pytest.mark.parametrize("kind", ["nsa, the paper's layout", "full"])
def test_every_product_with_a_parameter_has_the_precision_asked_for(kind):
    layer, params, x = problem(kind)

    def precisions(**fields):
        program = jax.make_jaxpr(lambda p, x: layer.clone(**fields).apply({"params": p}, x))(params, x)
        products = [e for e in equations(program) if e.primitive.name == "dot_general"]
        return [e.params["precision"] for e in products if e.params["precision"] is not None]

    plain, high = precisions(), precisions(precision="highest")
    of_phi = 2 if "phi_k_in_kernel" in params else 0  # its learnt positions have one more
    products = sum(name.endswith("_kernel") for name in params) + of_phi
    assert len(high) - len(plain) == products
    assert (jax.lax.Precision.HIGHEST,) * 2 in high


CLASSES = (nsa_jax.NSACore, nsa_jax.NSAttention, nsa_jax.FullAttention)


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_fields_of_other_libraries_are_answered_with_what_to_use(kind):
    twin = getattr(nsa_jax.nnx, kind.__name__)
    for name, instead in INSTEAD.items():
        if name in kind.__dataclass_fields__:
            continue
        message = f"{name} = 3: expected {instead}"
        for make in (kind, functools.partial(twin, E, rngs=nnx.Rngs(0))):
            with pytest.raises(ValueError, match="^" + name) as caught:
                make(**HEADS, **{name: 3})
            assert str(caught.value) == message
    for make in (kind, functools.partial(twin, E, rngs=nnx.Rngs(0))):
        with pytest.raises(TypeError, match="num_hedas"):
            make(**HEADS, num_hedas=3)


def test_fields_of_flaxs_own_layers_are_known():
    """Except those of a module, and dtypes and norms of projections, which have no counterpart."""
    linen = set(nn.MultiHeadDotProductAttention.__dataclass_fields__) - {"parent", "name"}
    twin = set(inspect.signature(nnx.MultiHeadAttention.__init__).parameters) - {"self", "rngs", "keep_rngs"}
    for name in linen | twin:
        other = name.endswith(("_promote_dtype", "_einsum_cls", "bias_metadata", "scale_metadata"))
        assert other or name in INSTEAD or name in nsa_jax.NSAttention.__dataclass_fields__, name


def test_what_is_named_instead_exists():
    fields = set(nsa_jax.NSAttention.__dataclass_fields__)
    for name in ("head_dim", "num_heads", "num_kv_heads", "scale", "qk_norm", "use_bias", "implementation", "rotate"):
        assert name in fields
        assert any(name in instead for instead in INSTEAD.values())
    of_layers = fields - set(nsa_jax.NSACore.__dataclass_fields__)
    assert not (set(INSTEAD) - {"window"} - of_layers) & fields
    assert nsa_jax.FullAttention(**HEADS, window=3).window == 3
    with pytest.raises(ValueError, match=r"window = 3: expected config=NSAConfig"):
        nsa_jax.NSAttention(**HEADS, window=3)
    with pytest.raises(ValueError, match=r"kernel_init = 'xavier': expected an initialiser"):
        nsa_jax.FullAttention(**HEADS, kernel_init="xavier").init_cache(batch_size=1, max_length=2)


LLAMA_3_1 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.5,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (LLAMA_3_1, RopeScaling("llama3", 8.0, 8192, beta_fast=4.0, beta_slow=1.5)),
        ({"type": "linear", "factor": 2.0}, RopeScaling("linear", 2.0)),
    ],
    ids=["llama3", "linear"],
)
def test_a_rope_scaling_of_transformers_is_answered_with_ours(theirs, ours):
    assert eval(rope_scaling_here(theirs), {"nsa_jax": nsa_jax}) == ours
    with pytest.raises(ValueError, match=r"^rope_scaling = \{.*\}: expected ") as caught:
        nsa_jax.FullAttention(**HEADS, rope_scaling=theirs).init_cache(batch_size=1, max_length=2)
    assert str(caught.value).endswith(f": expected {rope_scaling_here(theirs)}")


def test_a_rope_scaling_without_a_kind_here_is_answered_with_rotate():
    for kind in ("yarn", "dynamic", "longrope", 3):
        assert rope_scaling_here({"rope_type": kind, "factor": 2.0}).startswith("rotate, ")
    assert rope_scaling_here({}) == rope_scaling_here({"rope_type": "default"})
    assert rope_scaling_here({"rope_type": "linear", "rope_theta": 5e5}).endswith(
        "factor=...), and rope_theta=500000.0"
    )
    with pytest.raises(ValueError, match=r"rope_scaling = 2\.0: expected an nsa_jax\.RopeScaling$"):
        nsa_jax.nnx.NSAttention(E, rngs=nnx.Rngs(0), **HEADS, rope_scaling=2.0)
