import dataclasses
import functools

import flax.linen as nn
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

from nsa_jax import NSAConfig
from nsa_jax.rope import RopeScaling
from nsa_jax.testing import normwise_error
from train.config import ModelConfig, MoEConfig
from train.model.attention.kind import make_attention
from train.model.moe import moe_layer
from train.model.transformer import Transformer, logits, padded_vocabulary
from train.parallel.sharding import RULES

VOCABULARY = 50
T = 32
SMALL = ModelConfig(
    num_layers=2,
    embed_dim=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=24,
    nsa=NSAConfig(
        compress_block=4, compress_stride=2, select_block=4, num_selected=3, num_init=1, num_local=1, window=6
    ),
)
ATTENTIONS = pytest.mark.parametrize("attention", ["nsa", "full", "window"])


@functools.cache
def make(**changes):
    model = Transformer(dataclasses.replace(SMALL, **changes), VOCABULARY)
    boxed = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, T), jnp.int32))["params"]
    return model, nn.meta.unbox(boxed)


def tokens(batch: int, length: int = T):
    return jax.random.randint(jax.random.key(1), (batch, length), 0, VOCABULARY)


@pytest.mark.parametrize(
    "changes",
    [
        {"norm_eps": 0.1},
        {"tie_embeddings": False, "moe": MoEConfig(num_routed=4, expert_dim=8, first_dense=1)},
    ],
    ids=["dense, tied", "experts after a dense layer, untied"],
)
def test_logits_equal_those_of_numpy_around_attention_and_experts(changes):
    """Pre-normalised residual blocks, RMSNorm, SwiGLU, dense layers first, and the output layer."""
    model, params = make(attention="full", **changes)
    config, key = model.config, jax.random.key(4)
    params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(key, x.shape), params)  # scales are not 1
    ids = tokens(2, 8)
    actual = jax.jit(lambda params, ids: logits(params, model.apply({"params": params}, ids), config))(params, ids)

    def normalise(x, scale):
        return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + config.norm_eps) * scale

    def swiglu(x, kernels):
        gate = x @ kernels["gate_kernel"]
        return (gate / (1 + np.exp(-gate)) * (x @ kernels["up_kernel"])) @ kernels["down_kernel"]

    mix = jax.jit(functools.partial(moe_layer, config=config))
    attend = jax.jit(make_attention(config).apply)
    exact = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    x = exact["embedding"][np.asarray(ids)]
    experts = "dense_layers" in params
    layers = [("dense_layers", 0), ("layers", 0)] if experts else [("layers", 0), ("layers", 1)]
    for name, index in layers:
        layer = jax.tree.map(lambda x, index=index: x[index], exact[name])
        attention = {"params": jax.tree.map(jnp.float32, layer["attention"])}
        normalised = normalise(x, layer["attention_norm"]["scale"])
        x = x + np.asarray(attend(attention, jnp.float32(normalised)), np.float64)
        normalised = normalise(x, layer["mlp_norm"]["scale"])
        if experts and name == "layers":
            kernels = jax.tree.map(jnp.float32, layer["mlp"])
            x = x + np.asarray(mix(kernels, jnp.float32(normalised))[0], np.float64)
        else:
            x = x + swiglu(normalised, layer["mlp"])
    output = exact["embedding"].T if config.tie_embeddings else exact["output_kernel"]
    assert normwise_error(actual, normalise(x, exact["final_norm"]["scale"]) @ output) < 1e-5


@pytest.mark.exhaustive
def test_every_setting_of_the_model_changes_its_program():
    base = dataclasses.replace(SMALL, num_layers=1)
    changes = {
        "num_layers": 2,
        "embed_dim": 8,
        "num_heads": 2,
        "num_kv_heads": 1,
        "head_dim": 4,
        "v_head_dim": 4,
        "mlp_dim": 16,
        "moe": MoEConfig(num_routed=2),
        "attention": "window",
        "pattern": ("window",),
        "nsa": dataclasses.replace(SMALL.nsa, window=5),
        "compression": "linear",
        "share_kv": False,
        "qk_norm": True,
        "qkv_bias": True,
        "rope_theta": 100.0,
        "rope_scaling": RopeScaling("linear", 2.0, 8),
        "norm_eps": 1e-3,
        "tie_embeddings": False,
        "dtype": "bfloat16",
    }
    # Of speed, of initial parameters, for what is not the mean already, and of the loss in training.
    others = {"implementation", "remat", "embedding_init", "output_init", "tie_keys"}
    others |= {"selection_loss", "selection_loss_queries", "selection_loss_moves_queries"}
    assert set(changes) | others == {field.name for field in dataclasses.fields(ModelConfig)}

    def program(**change):
        config = dataclasses.replace(base, **change)
        model = Transformer(config, VOCABULARY)

        params = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), ids))["params"]
        forward = jax.jit(lambda params, ids: logits(params, model.apply({"params": params}, ids), config))
        return forward.lower(params, ids).as_text()

    ids = tokens(1, 8)
    expected = program()
    assert [name for name, value in changes.items() if program(**{name: value}) == expected] == []


def relative_error(actual, expected):
    return np.linalg.norm(np.asarray(actual - expected)) / np.linalg.norm(np.asarray(expected))


@ATTENTIONS
def test_gradient_with_respect_to_later_embeddings_is_exactly_zero(attention):
    model, params = make(attention=attention)
    x = jax.random.normal(jax.random.key(2), (T, SMALL.embed_dim))
    mix = jax.random.normal(jax.random.key(3), (T, SMALL.embed_dim))

    @jax.jit
    def influence(x):
        def outputs(x):
            return jnp.sum(model.apply({"params": params}, x[None], method="decode")[0] * mix, axis=-1)

        return jnp.max(jnp.abs(jax.jacrev(outputs)(x)), axis=-1)  # [output position, input position]

    size = np.asarray(influence(x))
    later = np.triu(np.ones((T, T), bool), 1)
    assert np.all(size[later] == 0)
    # The test can fail: the present and the past do matter.
    assert np.all(np.diag(size) > 0)
    assert np.all(np.diag(size, -1) > 0)


@ATTENTIONS
def test_packed_document_gets_what_it_gets_alone(attention):
    model, params = make(attention=attention)
    apply = jax.jit(lambda tokens, segment_ids: model.apply({"params": params}, tokens, segment_ids=segment_ids))
    first, second = 11, 19  # the second document starts at 12, the next multiple of a selection block
    row = tokens(1)
    segment_ids = jnp.where(jnp.arange(T) < 12, 0, 1)[None]
    packed = apply(row, segment_ids)
    for begin, length in ((0, first), (12, second)):
        # Alone and padded to T, so that one program serves all: what follows a document cannot reach it.
        alone = jnp.zeros((1, T), jnp.int32).at[:, :length].set(row[:, begin : begin + length])
        expected = apply(alone, jnp.zeros((1, T), jnp.int32))[:, :length]
        assert relative_error(packed[:, begin : begin + length], expected) < 1e-5
    merged = apply(row, jnp.zeros((1, T), jnp.int32))
    assert relative_error(packed[:, 12:], merged[:, 12:]) > 1e-3


@ATTENTIONS
def test_permuting_the_batch_permutes_the_output(attention):
    model, params = make(attention=attention)
    apply = jax.jit(lambda tokens: model.apply({"params": params}, tokens))
    rows, order = tokens(3), np.array([2, 0, 1])
    assert relative_error(apply(rows[order]), apply(rows)[order]) < 1e-6


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_embeddings": False, "share_kv": False, "compression": "mlp", "remat": "full"}],
)
def test_gradients_reach_every_parameter_of_every_layer(changes):
    model, params = make(**changes)
    rows = tokens(2)

    @jax.jit
    def gradients(params):
        def loss(params):
            scores = logits(params, model.apply({"params": params}, rows), model.config)
            return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(scores), rows[..., None], axis=-1))

        return jax.grad(loss)(params)

    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients(params)):
        name = jax.tree_util.keystr(path)
        assert np.all(np.isfinite(gradient)), name
        for layer in gradient if path[0].key == "layers" else [gradient]:
            assert np.any(layer != 0), name


def test_remat_changes_memory_and_not_gradients():
    rows = tokens(2)
    gradients = {}
    for remat in ("none", "dots", "attention", "full"):
        model, params = make(remat=remat, attention="full")

        @jax.jit
        def gradient(params, model=model):
            return jax.grad(lambda params: jnp.sum(jnp.sin(model.apply({"params": params}, rows))))(params)

        gradients[remat] = jax.flatten_util.ravel_pytree(gradient(params))[0]
    for remat in ("dots", "attention", "full"):
        assert relative_error(gradients[remat], gradients["none"]) < 1e-5


def test_attention_flag_changes_nothing_but_the_attention_layer():
    def shapes(attention):
        model = Transformer(dataclasses.replace(SMALL, attention=attention), VOCABULARY)
        params = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), tokens(1)))["params"]
        params["layers"].pop("attention")
        return jax.tree.map(lambda x: (x.shape, x.dtype), params)

    assert shapes("nsa") == shapes("full") == shapes("window")


@ATTENTIONS
def test_every_parameter_has_known_logical_axes(attention):
    config = dataclasses.replace(SMALL, attention=attention, tie_embeddings=False)
    boxed = jax.eval_shape(Transformer(config, VOCABULARY).init, jax.random.key(0), tokens(1))["params"]
    known = {name for name, _ in RULES}
    boxes = jax.tree_util.tree_leaves_with_path(boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
    for path, box in boxes:
        assert len(box.names) == box.value.ndim, path
        assert set(box.names) <= known, path
        assert (box.names[0] == "layers") == (path[0].key == "layers"), path


def test_bfloat16_computes_in_bfloat16_on_float32_parameters_and_gives_float32_logits():
    model = Transformer(dataclasses.replace(SMALL, dtype="bfloat16"), VOCABULARY)
    params = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), tokens(1)))["params"]
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    hidden = jax.eval_shape(lambda params: model.apply({"params": params}, tokens(2)), params)
    assert (hidden.shape, hidden.dtype) == ((2, T, SMALL.embed_dim), jnp.bfloat16)
    scores = jax.eval_shape(lambda params, hidden: logits(params, hidden, model.config), params, hidden)
    assert (scores.shape, scores.dtype) == ((2, T, padded_vocabulary(VOCABULARY)), jnp.float32)


def test_a_model_on_kernels_can_be_traced_without_remat():
    """Flax's scan over layers refuses a kernel that stays in a traced program although its result is not used."""
    nsa = NSAConfig(compress_block=16, compress_stride=8, select_block=16, num_selected=3, window=16)
    config = dataclasses.replace(SMALL, attention="nsa", implementation="triton", head_dim=32, nsa=nsa, remat="none")
    tokens = jax.ShapeDtypeStruct((1, 16), jnp.int32)
    assert jax.eval_shape(Transformer(config, 50).init, jax.random.key(0), tokens)


def test_gradients_of_embeddings_are_summed_in_float32():
    config = dataclasses.replace(SMALL, dtype="bfloat16")
    model, T = Transformer(config, VOCABULARY), 2048
    ids = jax.random.randint(jax.random.key(0), (1, T), 0, 3)
    params = nn.meta.unbox(jax.jit(model.init)(jax.random.key(1), tokens(1)))["params"]
    cotangent = jax.random.normal(jax.random.key(2), (1, T, config.embed_dim), jnp.bfloat16)

    def embedded(params):
        return jnp.vdot(model.apply({"params": params}, ids, method="embed").astype(jnp.float32), cotangent)

    gradient = jax.jit(jax.grad(embedded))(params)["embedding"]
    exact = jnp.zeros(gradient.shape).at[ids[0]].add(cotangent[0].astype(jnp.float32))
    assert normwise_error(gradient, exact) < 4e-3  # one rounding to bfloat16


def test_output_projections_start_smaller_by_the_root_of_how_many_there_are():
    plain, deep = (make(output_init=kind)[1]["layers"] for kind in ("plain", "depth"))
    factors = {
        path[-1].key: float(jnp.linalg.norm(b) / jnp.linalg.norm(a))
        for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(plain), jax.tree.leaves(deep), strict=True)
        if jnp.any(a)
    }
    smaller = {"o_kernel", "down_kernel"}
    assert {name: factors[name] for name in smaller} == pytest.approx(dict.fromkeys(smaller, 0.5), rel=1e-5)
    assert all(abs(factor - 1) < 1e-6 for name, factor in factors.items() if name not in smaller)


def test_the_embedding_starts_as_large_as_asked():
    embedding = make(embedding_init=0.5)[1]["embedding"]
    assert float(jnp.std(embedding)) == pytest.approx(0.5, rel=0.1)
