"""A step on any mesh is the step on one device: loss, gradients and statistics, the same bits every time."""

import dataclasses
import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nsa_jax import NSAConfig
from nsa_jax.testing import assert_trees_close
from train.config import MeshConfig, ModelConfig, MoEConfig
from train.model import Transformer
from train.sharding import make_mesh, on_mesh, put_batch, tree_shardings
from train.step import make_init, make_train_step

B, T, VOCABULARY = 8, 61, 50
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
MODELS = {
    "full": dataclasses.replace(NSA, attention="full"),
    "nsa": NSA,
    "experts": dataclasses.replace(
        NSA, moe=MoEConfig(num_routed=8, num_shared=1, top_k=2, expert_dim=8, first_dense=1, aux_loss=0.01)
    ),
}
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


def batch():
    """Rows of an odd length, in segments, of which not every token counts."""
    draw = np.random.default_rng(0)
    return {
        "tokens": draw.integers(0, VOCABULARY, (B, T), dtype=np.int32),
        "targets": draw.integers(0, VOCABULARY, (B, T), dtype=np.int32),
        "weights": (draw.random((B, T)) < 0.7).astype(np.float32),
        "target_bytes": draw.integers(0, 4, (B, T), dtype=np.int32),
        "segment_ids": np.sort(draw.integers(0, 3, (B, T), dtype=np.int32), axis=1),
    }


def one_step(config, mesh=None):
    """Gradients and metrics; the same bits twice."""
    model, optimizer = Transformer(config, VOCABULARY), optax.trace(decay=0)  # which keeps the gradients
    init, key = make_init(model, optimizer), jax.random.key(0)
    step = make_train_step(model, optimizer, accumulate=1, z_loss=1e-3)
    if mesh is None:
        state = jax.jit(lambda key: nn.meta.unbox(init(key)))(key)
        run, arguments = jax.jit(step), (state, jax.tree.map(jnp.asarray, batch()))
    else:
        shardings = tree_shardings(jax.eval_shape(init, key), mesh)
        state = jax.jit(lambda key: nn.meta.unbox(init(key)), out_shardings=shardings)(key)
        arguments = (state, put_batch(batch(), mesh, config.nsa.compress_stride))
        run = on_mesh(jax.jit(step, out_shardings=(shardings, None)), mesh)
    first, second = (jax.device_get(run(*arguments)) for _ in range(2))
    chex.assert_trees_all_equal(first, second)
    state, metrics = first
    return state.opt_state.trace, metrics


@functools.cache
def alone(name):
    return one_step(MODELS[name])


def cases():
    """Every model on every mesh; by default full and one sparse attention where tokens or experts are split."""
    for index, mesh in enumerate(MESHES):
        sparse = "experts" if mesh.expert > 1 else "nsa"
        for name in MODELS:
            by_default = mesh.context > 2 or mesh.expert * mesh.tensor > 1 if name == sparse else mesh.context > 1
            by_default = by_default and name in ("full", sparse)
            marks = () if by_default else (pytest.mark.exhaustive,)
            yield pytest.param(name, index, marks=marks, id=f"{name}-{mesh}")


@pytest.mark.parametrize(("name", "index"), list(cases()))
def test_a_step_on_a_mesh_equals_the_step_on_one_device(name, index):
    # Explicit and Auto axes take turns, over meshes and models.
    mesh = dataclasses.replace(MESHES[index], explicit=(index + list(MODELS).index(name)) % 2 == 1)
    devices = make_mesh(mesh, jax.devices()[: mesh.data * mesh.fsdp * mesh.expert * mesh.context * mesh.tensor])
    gradients, metrics = one_step(MODELS[name], devices)
    assert_trees_close((gradients, metrics), alone(name), 1e-5)
