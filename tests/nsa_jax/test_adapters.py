"""NSA as the attention_fn of Flax's own layers: causal attention where it is told to be, learnt gates, refusals."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import nsa_jax
import nsa_jax.nnx
from nsa_jax import NSAConfig, NSACore, NSAttentionFn
from nsa_jax.testing import assert_trees_close

B, T, E = 2, 21, 16
CONFIG = NSAConfig(4, 2, 8, 3, 1, 1, 10)
# A window over everything, and no other branch: what Flax's layer does with a causal mask.
WINDOW_ONLY = {"config": NSAConfig(4, 2, 8, 3, 1, 1, T), "constant_gates": (0.0, 0.0, 1.0)}
HEADS = {"num_heads": 4, "head_dim": 8}


def embeddings():
    return jax.random.normal(jax.random.key(0), (B, T, E))


def linen_layer(attention_fn=nn.dot_product_attention, **fields):
    return nn.MultiHeadDotProductAttention(num_heads=4, qkv_features=32, attention_fn=attention_fn, **fields)


def nnx_layer(attention_fn=nnx.dot_product_attention, num_kv_heads=2, **fields):
    fields = {"rngs": nnx.Rngs(3), "decode": False, "num_kv_heads": num_kv_heads, **fields}
    return nnx.MultiHeadAttention(4, E, 32, attention_fn=attention_fn, **fields)


def nnx_fn(num_kv_heads=2, **fields):
    core = nsa_jax.nnx.NSACore(32, rngs=nnx.Rngs(1), num_kv_heads=num_kv_heads, **HEADS, **fields)
    return nsa_jax.nnx.NSAttentionFn(core)


@pytest.mark.parametrize("mask", [None, np.tri(T, dtype=bool)[None, None]], ids=["no mask", "a causal mask"])
def test_a_window_over_everything_is_what_linens_layer_does_with_a_causal_mask(mask):
    x = embeddings()
    plain, sparse = linen_layer(), linen_layer(NSAttentionFn(NSACore(num_kv_heads=4, **HEADS, **WINDOW_ONLY)))
    variables = jax.jit(plain.init)(jax.random.key(1), x)
    expected = jax.jit(plain.apply)(variables, x, mask=np.tri(T, dtype=bool)[None, None])
    assert_trees_close(jax.jit(lambda v, x: sparse.apply(v, x, mask=mask))(variables, x), expected, 1e-5)


def test_a_window_over_everything_is_what_nnxs_layer_does_causally():
    """With groups of heads, too."""
    x, plain, sparse = embeddings(), nnx_layer(), nnx_layer(nnx_fn(**WINDOW_ONLY))
    nnx.update(sparse, nnx.state(plain))
    expected = nnx.jit(lambda m, x: m(x, is_causal=True))(plain, x)
    assert_trees_close(nnx.jit(lambda m, x: m(x))(sparse, x), expected, 1e-5)


def test_bound_segments_are_a_mask_of_blocks():
    x, ids = embeddings(), np.repeat([[0, 1]], [9, T - 9], axis=1).repeat(B, axis=0)
    plain = linen_layer()

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, ids):
            core = NSACore(num_kv_heads=4, **HEADS, **WINDOW_ONLY)
            return linen_layer(functools.partial(NSAttentionFn(core), segment_ids=ids), name="attention")(x)

    variables = jax.jit(plain.init)(jax.random.key(1), x)
    mask = np.tri(T, dtype=bool)[None, None] & (ids[:, None, :, None] == ids[:, None, None, :])
    expected = jax.jit(plain.apply)(variables, x, mask=mask)
    actual = jax.jit(Model().apply)({"params": {"attention": variables["params"]}}, x, ids)
    assert_trees_close(actual, expected, 1e-5)


def test_gates_are_learnt_from_queries_and_twins_agree():
    """Inside a model, too, where the module belongs to the model."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            core = NSACore(num_kv_heads=4, **HEADS, config=CONFIG, name="sparse")
            return linen_layer(NSAttentionFn(core), name="attention")(x)

    x = embeddings()
    alone, model = linen_layer(NSAttentionFn(NSACore(num_kv_heads=4, **HEADS, config=CONFIG))), Model()
    boxed = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    assert set(boxed) == {"attention", "sparse"}
    params = nn.unbox(jax.jit(alone.init)(jax.random.key(1), x))["params"]
    assert {name: p.shape for name, p in params["attention_fn"]["core"].items()} == {
        "gate_in_kernel": (32, 8),
        "gate_in_bias": (8,),
        "gate_out_kernel": (8, 4, 3),
        "gate_out_bias": (4, 3),
    }
    twin = nnx_layer(nnx_fn(num_kv_heads=4, config=CONFIG), num_kv_heads=4)
    for name in ("query", "key", "value", "out"):
        getattr(twin, name).kernel[...] = params[name]["kernel"]
    for name, value in params["attention_fn"]["core"].items():
        getattr(twin.attention_fn.core, name)[...] = value

    @jax.jit
    def run(params, x):
        inside = {"attention": {**params}, "sparse": params["attention_fn"]["core"]}
        inside["attention"].pop("attention_fn")
        y = alone.apply({"params": params}, x)
        gradient = jax.grad(lambda p: jnp.sin(alone.apply({"params": p}, x)).sum())(params)
        return y, gradient["attention_fn"]["core"], model.apply({"params": inside}, x)

    y, gradient, inside = run(params, x)
    assert_trees_close(inside, y, 1e-6)
    assert_trees_close(nnx.jit(lambda m, x: m(x))(twin, x), y, 1e-6)
    for name, value in gradient.items():
        assert (jnp.abs(value) > 0).mean() > 0.9, name


def causal(x):
    return nn.make_causal_mask(x[..., 0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": causal}, r"^mask: float32 \(2, 1, 21, 21\): expected None, or a causal mask that is known"),
        ({"mask": lambda x: np.ones((B, 1, T, T), bool)}, r"^mask: bool .*: expected None, or a causal mask"),
        ({"mask": lambda x: np.tri(T, T, -1, bool)}, r"^mask: bool \(21, 21\): expected None, or a causal mask"),
        ({"sow_weights": True}, "^module = .*: expected None: kernels never hold attention weights"),
        ({"fields": {"dropout_rate": 0.1, "deterministic": False}}, r"^dropout_rate = 0.1: expected 0"),
    ],
    ids=["traced mask", "mask of ones", "strict mask", "sown weights", "dropout"],
)
def test_what_nsa_does_not_do_is_refused_by_name(options, message):
    options = dict(options)
    x, fields, mask = embeddings(), options.pop("fields", {}), options.pop("mask", lambda x: None)
    linen = linen_layer(NSAttentionFn(NSACore(num_kv_heads=4, **HEADS, config=CONFIG)), **fields)
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda x: linen.init(rngs, x, mask=mask(x), **options), x)
    twin = nnx_layer(nnx_fn(config=CONFIG), **fields)
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda m, x: m(x, mask=mask(x), **options), twin, x)


def test_flaxs_own_decoding_and_other_heads_are_refused_by_name():
    core = NSACore(num_kv_heads=4, **HEADS, config=CONFIG)
    layer, x = linen_layer(NSAttentionFn(core), decode=True), embeddings()
    variables = jax.jit(layer.init)(jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"^mask: float32 \(2, 1, 1, 21\): .* NSACore decodes over a cache"):
        layer.apply(variables, x[:, :1], mutable=["cache"])
    q = jnp.ones((B, T, 4, 8))
    with pytest.raises(ValueError, match=r"^bias = .*: expected None: scores of NSA have no bias"):
        NSAttentionFn(core).init(jax.random.key(0), q, q, q, bias=jnp.zeros((B, 4, T, T)))
    with pytest.raises(ValueError, match=r"^query: float32 \(21, 4, 8\): expected 4 axes"):
        NSAttentionFn(core).init(jax.random.key(0), q[0], q[0], q[0])
    with pytest.raises(ValueError, match=r"^k: float32 \(2, 21, 2, 8\): expected .* \(2, 21, 4, 8\)"):
        NSAttentionFn(core).init(jax.random.key(0), q, q[:, :, :2], q[:, :, :2])


def test_a_core_that_is_not_this_flavours_or_has_another_width_is_refused():
    """The parameters of one of the other flavour would be constants of the model."""
    linen = NSACore(num_kv_heads=4, **HEADS, config=CONFIG)
    twin = nsa_jax.nnx.NSACore(16, rngs=nnx.Rngs(0), num_kv_heads=4, **HEADS, config=CONFIG)
    with pytest.raises(ValueError, match=r"^core = NSACore.*: expected an nsa_jax\.NSACore$"):
        NSAttentionFn(twin)
    with pytest.raises(ValueError, match=r"^core = NSACore.*: expected an nsa_jax\.nnx\.NSACore$"):
        nsa_jax.nnx.NSAttentionFn(linen)
    with pytest.raises(ValueError, match=r"^core\.embed_dim = 16: expected num_heads \* head_dim = 32$"):
        nsa_jax.nnx.NSAttentionFn(twin)


def test_an_attention_fn_decodes_with_the_gates_of_the_call():
    q, k, v = (jax.random.normal(jax.random.key(i), (B, T, 4, 8)) for i in range(3))
    twin = nnx_fn(num_kv_heads=4, config=CONFIG)
    fn = NSAttentionFn(NSACore(num_kv_heads=4, **HEADS, config=CONFIG))
    params = {name: getattr(twin.core, name)[...] for name, p in vars(twin.core).items() if isinstance(p, nnx.Param)}

    @jax.jit
    def run(params):
        def linen(method, *arguments):
            return fn.apply({"params": {"core": params}}, *arguments, method=method)

        def part(a, b):
            return (x[:, a:b] for x in (q, k, v))

        outputs = []
        for call in (linen, lambda method, *arguments: getattr(twin, method)(*arguments)):
            cache = fn.init_cache(batch_size=B, max_length=T)
            first, cache = call("prefill", *part(0, T - 1), cache)
            last, cache = call("decode_step", *part(T - 1, T), cache)
            outputs.append(jnp.concatenate([first, last], axis=1))
        return linen("__call__", q, k, v), *outputs

    expected, *outputs = run(params)
    for actual in outputs:
        assert_trees_close(actual, expected, 1e-5)
