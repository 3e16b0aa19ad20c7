"""A step on any mesh is the step on one device: loss, gradients and statistics, the same bits every time."""

import dataclasses
import functools
import itertools
import math

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nsa_jax import NSAConfig
from nsa_jax.testing import assert_trees_close, normwise_error
from train.config import MeshConfig, ModelConfig, MoEConfig
from train.model.transformer import Transformer
from train.parallel.sharding import MESH_AXES, make_mesh, on_mesh, put_batch, tree_shardings
from train.step import make_init, make_train_step

B, VOCABULARY = 8, 50
NSA = ModelConfig(
    num_layers=2,
    embed_dim=16,
    num_heads=8,
    num_kv_heads=4,
    head_dim=8,
    mlp_dim=16,
    nsa=NSAConfig(
        compress_block=4, compress_stride=2, select_block=4, num_selected=3, num_init=1, num_local=1, window=6
    ),
)
LARGER = dataclasses.replace(  # as small as the Triton kernels take
    NSA,
    embed_dim=64,
    head_dim=32,
    mlp_dim=64,
    nsa=NSAConfig(
        compress_block=16, compress_stride=8, select_block=16, num_selected=4, num_init=1, num_local=1, window=40
    ),
)


def models(nsa):
    moe = MoEConfig(num_routed=8, num_shared=1, top_k=2, expert_dim=8, first_dense=1, aux_loss=0.01)
    return {
        "full": dataclasses.replace(nsa, attention="full"),
        "nsa": nsa,
        "experts": dataclasses.replace(nsa, moe=moe),
    }


MODELS = models(NSA)
DTYPES = ("float32", "bfloat16")
MESHES = [
    MeshConfig(data=2),
    MeshConfig(data=1, fsdp=2),
    MeshConfig(data=1, tensor=2),
    MeshConfig(data=1, expert=2),
    MeshConfig(data=1, context=2),
    MeshConfig(data=1, context=8),
    MeshConfig(data=2, fsdp=2, tensor=2),
    MeshConfig(data=1, fsdp=2, context=4),
    MeshConfig(data=2, context=2, tensor=2),
    MeshConfig(data=1, fsdp=2, expert=2, context=2),
    MeshConfig(data=1, expert=2, context=2, tensor=2),
]


def num_devices(mesh):
    return math.prod(getattr(mesh, axis) for axis in MESH_AXES)


def batch(T):
    """Rows of an odd length, in segments, of which not every token counts."""
    draw = np.random.default_rng(0)
    return {
        "tokens": draw.integers(0, VOCABULARY, (B, T), dtype=np.int32),
        "targets": draw.integers(0, VOCABULARY, (B, T), dtype=np.int32),
        "weights": (draw.random((B, T)) < 0.7).astype(np.float32),
        "target_bytes": draw.integers(0, 4, (B, T), dtype=np.int32),
        "segment_ids": np.sort(draw.integers(0, 3, (B, T), dtype=np.int32), axis=1),
    }


OPTIMIZER = optax.trace(decay=0)  # which keeps the gradients


@functools.cache
def initial(config):
    """The state before the step, and the logical axes of its arrays."""
    init, key = make_init(Transformer(config, VOCABULARY), OPTIMIZER), jax.random.key(0)
    return jax.device_get(jax.jit(lambda key: nn.meta.unbox(init(key)))(key)), jax.eval_shape(init, key)


def one_step(config, T, mesh=None):
    """Gradients and metrics; the same bits twice."""
    state, boxed = initial(config)
    step = make_train_step(Transformer(config, VOCABULARY), OPTIMIZER, accumulate=1, z_loss=1e-3)
    if mesh is None:
        run, arguments = jax.jit(step), (state, jax.tree.map(jnp.asarray, batch(T)))
    else:
        shardings = tree_shardings(boxed, mesh)
        arguments = (jax.device_put(state, shardings), put_batch(batch(T), mesh, config.nsa.compress_stride))
        run = on_mesh(jax.jit(step, out_shardings=(shardings, None)), mesh)
    first, second = (jax.device_get(run(*arguments)) for _ in range(2))
    chex.assert_trees_all_equal(first, second)
    state, metrics = first
    return state.opt_state.trace, metrics


alone = functools.cache(one_step)


def cases():
    """Every model on every mesh; by default a sparse one on meshes of several axes, and full attention on two."""
    for index, mesh in enumerate(MESHES):
        sparse = "experts" if mesh.expert > 1 else "nsa"
        several = sum(getattr(mesh, axis) > 1 for axis in MESH_AXES) > 1
        for name in MODELS:
            by_default = name == sparse and several and mesh.fsdp * mesh.expert < 4 and mesh.expert * mesh.context < 4
            by_default |= name == "full" and several and mesh.fsdp * mesh.context > 2
            yield pytest.param(name, index, marks=[pytest.mark.exhaustive] * (not by_default), id=f"{name}-{mesh}")


def taking_turns(name, index):
    """A mesh whose axes are Explicit or Auto: they take turns, over meshes and models."""
    return dataclasses.replace(MESHES[index], explicit=(index + list(MODELS).index(name)) % 2 == 1)


@pytest.mark.parametrize(("name", "index"), list(cases()))
def test_a_step_on_a_mesh_equals_the_step_on_one_device(name, index):
    mesh = taking_turns(name, index)
    step = one_step(MODELS[name], 61, make_mesh(mesh, jax.devices()[: num_devices(mesh)]))
    assert_trees_close(step, alone(MODELS[name], 61), 1e-5)


def gpu_cases():
    """Experts where they are split, all but them elsewhere."""
    for index, mesh in enumerate(MESHES):
        for name, dtype in itertools.product(("experts",) if mesh.expert > 1 else ("full", "nsa"), DTYPES):
            yield pytest.param(name, index, dtype, id=f"{name}-{mesh}-{dtype}")


def assert_as_good(actual, other, exact):
    """In bfloat16 one device is 1e-2 and more from float32 itself, and sums in another order are as far from it.

    Every leaf is within 1e-2 of the other's, or no further from the exact one than the other's and a quarter.
    """
    errors = {}
    for (path, a), b, c in zip(
        jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(other), jax.tree.leaves(exact), strict=True
    ):
        errors[jax.tree_util.keystr(path)] = normwise_error(a, b), normwise_error(a, c), normwise_error(b, c)
    wrong = {name: e for name, e in errors.items() if e[0] > 1e-2 and e[1] > 1.25 * e[2]}
    assert not wrong, f"(from the other, from the exact, the other from the exact): {wrong}"
    return max(errors.items(), key=lambda item: item[1][0])


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "index", "dtype"), list(gpu_cases()))
def test_a_step_on_gpus_equals_the_step_on_one(name, index, dtype, record_property):
    mesh = taking_turns(name, index)
    if num_devices(mesh) > jax.device_count():
        pytest.skip(f"needs {num_devices(mesh)} GPUs")
    config = dataclasses.replace(models(LARGER)[name], dtype=dtype)
    with jax.default_matmul_precision("highest"):  # else float32 is multiplied in TF32
        step = one_step(config, 301, make_mesh(mesh, jax.devices()[: num_devices(mesh)]))
        if dtype == "float32":
            assert_trees_close(step, alone(config, 301), 1e-5)
        else:
            exact = alone(dataclasses.replace(config, dtype="float32"), 301)
            assert_trees_close(step[1].sums, alone(config, 301)[1].sums, 1e-2)
            record_property("furthest", str(assert_as_good(step, alone(config, 301), exact)))
