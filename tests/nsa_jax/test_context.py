"""Tokens split over simulated devices: values and gradients are those of one device, and what is sent is as said."""

import dataclasses
import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from programs import sums

import nsa_jax
from nsa_jax import NSAConfig, compress, nsa_attention, window_attention
from nsa_jax.context import from_zigzag, received_bytes, to_zigzag, zigzag_order
from nsa_jax.dense import causal_attention
from nsa_jax.sharding import sharded
from nsa_jax.testing import assert_trees_close, random_inputs
from train.parallel.communication import collectives

CONFIG = NSAConfig(
    compress_block=16, compress_stride=8, select_block=16, num_selected=3, num_init=1, num_local=1, window=24
)
D = 32
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
AXES = {"batch_axes": "data", "head_axes": "tensor", "context_axes": "context"}


def make_mesh(kind, sizes):
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(kind,) * len(sizes))


def split(tree, mesh):
    """Arrays [B, T, heads, ..] and [B, T] with every axis of the mesh in its place."""
    names = [name if name in mesh.shape else None for name in ("data", "context", "tensor", None)]
    return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*names[: x.ndim]))), tree)


@functools.cache
def problem(T, num_segments):
    """q, raw keys and values (compressed ones not yet made), gates, phi, segment ids and a cotangent."""
    inputs = random_inputs(
        jax.random.key(T), CONFIG, B=2, T=T, num_heads=4, num_kv_heads=2, head_dim=D, num_segments=num_segments
    )
    keys = jax.random.split(jax.random.key(1), 4)
    raw_k, raw_v, cotangent = (jax.random.normal(key, inputs.kv.slc_k.shape) for key in keys[:3])
    phi = {
        "position": jax.random.normal(keys[3], (16, D)),
        "in_kernel": jax.random.normal(keys[3], (16, D, 24)) / 16,
        "in_bias": jnp.ones(24),
        "out_kernel": jax.random.normal(keys[3], (24, D)) / 5,
        "out_bias": jnp.ones(D),
    }
    kv = inputs.kv._replace(cmp_k=raw_k, cmp_v=raw_v)
    cotangent = jnp.repeat(cotangent, 2, axis=2)
    return jax.device_get(((inputs.q, kv, inputs.gates), phi, inputs.segment_ids, cotangent))


def attend(implementation="xla", **axes):
    """Output and gradients of phi and attention together."""

    def run(arrays, phi, segment_ids, cotangent):
        def forward(arrays, phi):
            q, kv, gates = arrays
            phi_of = functools.partial(sharded(compress, **axes), parameters=phi, config=CONFIG, method="mlp")
            kv = kv._replace(cmp_k=phi_of(kv.cmp_k), cmp_v=phi_of(kv.cmp_v))
            options = {"config": CONFIG, "segment_ids": segment_ids, "implementation": implementation}
            return sharded(nsa_attention, **axes)(q, kv, gates, **options)

        o, vjp = jax.vjp(forward, arrays, phi)
        return o, *vjp(cotangent)

    return run


@functools.cache
def expected(T, num_segments):
    return jax.jit(attend("reference"))(*problem(T, num_segments))


def run_split(sizes, T, num_segments, kind=AUTO, implementation="xla"):
    """The compiled program, output and gradients in the order of positions, on a mesh."""
    arrays, phi, segment_ids, cotangent = problem(T, num_segments)
    mesh = make_mesh(kind, sizes)
    with jax.set_mesh(mesh):
        there = functools.partial(to_zigzag, devices=sizes["context"])
        arguments = split(jax.tree.map(there, (arrays, segment_ids, cotangent)), mesh)
        arguments = (arguments[0], phi, *arguments[1:])
        compiled = jax.jit(attend(implementation, **AXES)).lower(*arguments).compile()
        o, grads, phi_grads = jax.device_get(compiled(*arguments))
        again = jax.device_get(compiled(*arguments))
    chex.assert_trees_all_equal((o, grads, phi_grads), again)
    back = functools.partial(from_zigzag, devices=sizes["context"])
    return compiled.as_text(), (*jax.tree.map(back, (o, grads)), phi_grads)


@pytest.mark.parametrize(
    ("sizes", "num_segments", "kind"),
    [
        pytest.param({"context": 2}, 0, AUTO, marks=pytest.mark.exhaustive),
        ({"context": 8}, 3, EXPLICIT),  # chunks of 8 tokens: the window reaches over three of them
        pytest.param({"data": 2, "context": 4}, 3, AUTO, marks=pytest.mark.exhaustive),
        ({"context": 2, "tensor": 2}, 0, EXPLICIT),
    ],
    ids=str,
)
def test_values_and_gradients_are_those_of_one_device_and_the_same_bits_every_time(sizes, num_segments, kind):
    assert_trees_close(run_split(sizes, 128, num_segments, kind)[1], expected(128, num_segments), 1e-5)


@pytest.mark.parametrize("device_kind", ["NVIDIA H100", pytest.param("NVIDIA A100", marks=pytest.mark.exhaustive)])
def test_kernels_lower_for_a_mesh_of_gpus_that_splits_the_tokens(device_kind):
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.result_type(x)), problem(128, 3))
    device = jax.sharding.AbstractDevice(device_kind=device_kind, num_cores=None, platform="gpu")
    mesh = jax.sharding.AbstractMesh((4,), ("context",), axis_types=(AUTO,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        lowered = jax.jit(attend(None, **AXES)).trace(*arguments).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("__gpu$xla.gpu.triton") > 8


def test_devices_receive_what_the_formula_says_and_whole_keys_of_one_head_at_a_time():
    T, C, K = 256, 4, 2
    program, _ = run_split({"context": C}, T, 0)
    sizes = {"T": T, "devices": C, "num_heads": 4, "num_kv_heads": K, "head_dim": D, "v_head_dim": D, "itemsize": 4}
    rows = 2
    forward = rows * received_bytes("nsa", CONFIG, **sizes)
    selected = rows * (C - 1) * (T // C) * K * 2 * D * 4  # again for the backward pass
    phi = sum(x.nbytes for x in problem(T, 0)[1].values())
    found = collectives(program)
    gradients = 2 * 2 * phi * (C - 1) / C  # of phi, once for keys and once for values
    assert sum(x.received_bytes for x in found) == pytest.approx(2 * forward + selected + gradients, rel=1e-3)
    whole_head = rows * T * D * 4
    assert max(x.result_bytes for x in found if x.kind == "all-gather") == whole_head
    assert {x.kind for x in found} == {"all-gather", "reduce-scatter", "collective-permute", "all-reduce"}


def test_a_window_longer_than_the_sequence_reaches_as_far_as_there_are_tokens():
    T, C, config = 48, 2, dataclasses.replace(CONFIG, window=1000)
    q, k, v = (jax.random.normal(key, (1, T, 2, D)) for key in jax.random.split(jax.random.key(0), 3))
    options = {"config": config, "implementation": "xla", "return_lse": True}
    expected = jax.jit(functools.partial(window_attention, **options))(q, k, v)
    attention = sharded(window_attention, context_axes="context")
    with jax.set_mesh(make_mesh(AUTO, {"context": C})):
        split = [jax.device_put(to_zigzag(x, C), PartitionSpec(None, "context")) for x in (q, k, v)]
        o, lse = jax.device_get(jax.jit(functools.partial(attention, **options))(*split))
    assert_trees_close((from_zigzag(o, C), from_zigzag(lse, C, axis=2)), expected, 1e-6)
    sizes = {"num_heads": 2, "num_kv_heads": 2, "head_dim": D, "v_head_dim": D, "itemsize": 4}
    # Before each of its two chunks of 12 tokens there are at most 36.
    assert received_bytes("window", config, T=T, devices=C, **sizes) == 2 * 36 * 2 * 2 * D * 4


@pytest.mark.parametrize("heads", [(6, 2), (8, 4), (3, 3), (4, 1)])
def test_full_attention_exchanges_heads_and_gathers_nothing(heads):
    T, C, B = 64, 4, 2
    q, k, v = (jnp.ones((B, T, heads[i], size)) for i, size in ((0, 8), (1, 8), (1, 16)))
    attention = sharded(causal_attention, context_axes="context")

    def both(q, k, v):
        o, vjp = jax.vjp(attention, q, k, v)
        return o, vjp(o)

    with jax.set_mesh(make_mesh(AUTO, {"context": C})):
        arguments = [jax.device_put(x, PartitionSpec(None, "context")) for x in (q, k, v)]
        found = collectives(jax.jit(both).lower(*arguments).compile().as_text())
    sizes = {"num_heads": heads[0], "num_kv_heads": heads[1], "head_dim": 8, "v_head_dim": 16, "itemsize": 4}
    forward = B * received_bytes("full", CONFIG, T=T, devices=C, **sizes)
    assert {x.kind for x in found} == {"all-to-all"}
    assert sum(x.received_bytes for x in found) == 2 * forward


@pytest.mark.parametrize("devices", [1, 4])
def test_dense_attention_names_the_argument_that_does_not_fit(devices):
    q, k = jnp.ones((1, 64, 4, 16)), jnp.ones((1, 64, 3, 16))
    attention = sharded(causal_attention, context_axes="context")
    with jax.set_mesh(make_mesh(AUTO, {"context": devices})):
        with pytest.raises(ValueError, match=r"k: float32.*: expected a number of heads that divides q's 4"):
            attention(q, k, k)
        with pytest.raises(ValueError, match=r"v: bfloat16.*: expected a float dtype, the same as q's float32"):
            attention(q, q, q.astype(jnp.bfloat16))


def test_gradients_of_repeated_heads_are_summed_in_float32():
    q, k = jnp.ones((1, 64, 4, 16), jnp.bfloat16), jnp.ones((1, 64, 1, 16), jnp.bfloat16)
    attention = sharded(causal_attention, context_axes="context")
    with jax.set_mesh(make_mesh(AUTO, {"context": 4})):
        program = jax.make_jaxpr(jax.grad(lambda k: attention(q, k, k).astype(jnp.float32).sum()))(k)
    assert len(sums(program)) > 2
    assert jnp.bfloat16 not in sums(program)


@pytest.mark.parametrize(("T", "devices"), [(8, 1), (8, 2), (96, 4)])
def test_zigzag_gives_every_device_as_many_visible_keys_and_is_undone(T, devices):
    order = zigzag_order(T, devices)
    assert sorted(order) == list(range(T))
    keys = (order + 1).reshape(devices, -1).sum(axis=1)
    assert (keys == keys[0]).all()
    x = np.random.default_rng(0).random((3, T, 2))
    np.testing.assert_array_equal(from_zigzag(to_zigzag(x, devices), devices), x)
    np.testing.assert_array_equal(to_zigzag(x, devices)[0, :, 0], x[0, order, 0])


def test_what_cannot_be_split_is_refused_by_name():
    arrays, phi, _, _ = problem(128, 0)
    q, kv, _ = arrays
    options = {"config": CONFIG, "implementation": "xla"}
    with jax.set_mesh(make_mesh(AUTO, {"context": 8})):
        over = {"context_axes": "context"}
        with pytest.raises(ValueError, match=r"query_offset: expected 0 where context_axes = \('context',\) split"):
            sharded(window_attention, **over)(q, kv.win_k, kv.win_v, query_offset=8, **options)
        with pytest.raises(ValueError, match=r"context_axes = \('context',\): select_blocks is not split so, but nsa_"):
            sharded(nsa_jax.select_blocks, **over)(q, kv.cmp_k, jnp.zeros((2, 4, 128)), **options)
        with pytest.raises(ValueError, match=r"q: .*context = 120 to be a multiple of twice 8, the devices along"):
            sharded(window_attention, **over)(q[:, :120], kv.win_k, kv.win_v, **options)
        with pytest.raises(ValueError, match=r"x: chunks of 6 tokens, two for each of 8 devices: .*stride = 8"):
            sharded(compress, **over)(q[:, :96], phi, config=CONFIG)
        with pytest.raises(ValueError, match=r"x: chunks of 12 tokens, two for each of 8 devices: .*stride = 8"):
            sharded(compress, **over)(jnp.zeros((2, 192, 2, D)), phi, config=CONFIG)
        longer = dataclasses.replace(CONFIG, compress_block=24, select_block=24)
        with pytest.raises(ValueError, match=r"x: chunks of 8 tokens, .*compress_block - config.compress_stride = 16"):
            sharded(compress, **over)(jnp.zeros((2, 128, 2, D)), config=longer)
        assert jax.eval_shape(functools.partial(sharded(compress, **over), config=longer), jnp.zeros((2, 256, 2, D)))
        layer, x = nsa_jax.NSAttention(**LAYER, config=CONFIG, context_axes="context"), jnp.zeros((1, 128, 24))
        variables = jax.jit(layer.init)(jax.random.key(0), x)
        cache = layer.init_cache(batch_size=1, max_length=128)
        with pytest.raises(ValueError, match=r"context_axes = 'context': a cache's tokens are not split"):
            layer.apply(variables, x, cache, method="prefill")
    with pytest.raises(ValueError, match=r"T = 12: expected a multiple of 2 \* devices = 8"):
        zigzag_order(12, 4)


LAYER = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
LAYERS = {
    "nsa": nsa_jax.NSAttention(**LAYER, config=CONFIG),
    "full": nsa_jax.FullAttention(**LAYER),
    "full, uneven": nsa_jax.FullAttention(num_heads=6, num_kv_heads=2, head_dim=8, v_head_dim=16),
    "window": nsa_jax.FullAttention(**LAYER, window=24),
}


@pytest.mark.parametrize(
    ("name", "num_segments", "kind"),
    [("nsa", 3, AUTO), ("full", 3, EXPLICIT), ("full", 0, AUTO), ("full, uneven", 3, AUTO), ("window", 3, AUTO)],
)
def test_layers_equal_those_of_one_device_with_all_gradients(name, num_segments, kind):
    T, devices = 128, 4
    x = jax.device_get(jax.random.normal(jax.random.key(2), (2, T, 24)))
    cotangent = jax.device_get(jax.random.normal(jax.random.key(3), x.shape))
    segment_ids = problem(T, num_segments)[2]
    module = LAYERS[name]
    params = jax.device_get(nn.unbox(jax.jit(module.init)(jax.random.key(4), x))["params"])

    def run(module):
        def loss(params, x, segment_ids, cotangent):
            y = module.apply({"params": params}, x, segment_ids=segment_ids)
            return (y * cotangent).sum(), y

        return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))

    (param_grads, x_grad), y = run(module)(params, x, segment_ids, cotangent)
    mesh = make_mesh(kind, {"data": 2, "context": devices})
    with jax.set_mesh(mesh):
        placed = split(jax.tree.map(functools.partial(to_zigzag, devices=devices), (x, segment_ids, cotangent)), mesh)
        actual = jax.device_get(run(module.clone(**AXES))(params, *placed))
    back = functools.partial(from_zigzag, devices=devices)
    assert_trees_close(actual[0][0], param_grads, 1e-5)
    assert_trees_close((back(actual[0][1]), back(actual[1])), (x_grad, y), 1e-5)
