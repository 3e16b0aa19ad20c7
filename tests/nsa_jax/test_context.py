"""Tokens split over simulated devices: values and gradients are those of one device, and what is sent is as said."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import nsa_jax
from nsa_jax import NSAConfig, compress, nsa_attention, window_attention
from nsa_jax.context import from_zigzag, to_zigzag, zigzag_order
from nsa_jax.sharding import sharded
from nsa_jax.testing import assert_trees_close, random_inputs
from nsa_jax.visibility import segment_positions

CONFIG = NSAConfig(
    compress_block=16, compress_stride=8, select_block=16, num_selected=3, num_init=1, num_local=1, window=24
)
KINDS = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
MESHES = [{"context": 2}, {"context": 8}, {"data": 2, "context": 4}, {"context": 2, "tensor": 2}]
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
        jax.random.key(T), CONFIG, B=2, T=T, num_heads=4, num_kv_heads=2, head_dim=16, num_segments=num_segments
    )
    keys = jax.random.split(jax.random.key(1), 4)
    raw_k, raw_v, cotangent = (jax.random.normal(key, inputs.kv.slc_k.shape) for key in keys[:3])
    phi = {
        "position": jax.random.normal(keys[3], (16, 16)),
        "in_kernel": jax.random.normal(keys[3], (16, 16, 24)) / 16,
        "in_bias": jnp.ones(24),
        "out_kernel": jax.random.normal(keys[3], (24, 16)) / 5,
        "out_bias": jnp.ones(16),
    }
    kv = inputs.kv._replace(cmp_k=raw_k, cmp_v=raw_v)
    cotangent = jnp.repeat(cotangent, 2, axis=2)
    return jax.device_get(((inputs.q, kv, inputs.gates), phi, inputs.segment_ids, cotangent))


def attend(implementation="xla", **axes):
    """Output and gradients of phi and attention together."""

    def run(arrays, phi, segment_ids, cotangent):
        def forward(arrays, phi):
            q, kv, gates = arrays
            phi_of = functools.partial(sharded(compress, **axes), parameters=phi, config=CONFIG)
            kv = kv._replace(cmp_k=phi_of(kv.cmp_k), cmp_v=phi_of(kv.cmp_v))
            options = {"config": CONFIG, "segment_ids": segment_ids, "implementation": implementation}
            return sharded(nsa_attention, **axes)(q, kv, gates, **options)

        o, vjp = jax.vjp(forward, arrays, phi)
        return o, *vjp(cotangent)

    return run


@functools.cache
def expected(T, num_segments):
    return jax.jit(attend("reference"))(*problem(T, num_segments))


@KINDS
@pytest.mark.parametrize("num_segments", [0, 3])
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_values_and_gradients_are_those_of_one_device(sizes, num_segments, kind):
    T = 128
    arrays, phi, segment_ids, cotangent = problem(T, num_segments)
    mesh = make_mesh(kind, sizes)
    there = functools.partial(to_zigzag, devices=sizes["context"])
    back = functools.partial(from_zigzag, devices=sizes["context"])
    with jax.set_mesh(mesh):
        placed, ids, ct = split(jax.tree.map(there, (arrays, segment_ids, cotangent)), mesh)
        o, grads, phi_grads = jax.device_get(jax.jit(attend(**AXES))(placed, phi, ids, ct))
    assert_trees_close((*jax.tree.map(back, (o, grads)), phi_grads), expected(T, num_segments), 1e-5)


LAYER = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
LAYERS = {
    "nsa": nsa_jax.NSAttention(**LAYER, config=CONFIG),
    "full": nsa_jax.FullAttention(**LAYER),
    "window": nsa_jax.FullAttention(**LAYER, window=24),
}


@KINDS
@pytest.mark.parametrize("num_segments", [0, 3])
@pytest.mark.parametrize("name", LAYERS)
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
