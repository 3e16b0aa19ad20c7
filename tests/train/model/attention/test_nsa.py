"""The loss that teaches a selection: left by layers of NSA in training alone, the same on a mesh, and it teaches."""

import dataclasses

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.models import SMALL

from nsa_jax.layer import nsa_layer_inputs
from nsa_jax.selection import selection_loss
from train.config import MeshConfig, TrainConfig
from train.model.attention.kind import make_attention
from train.model.attention.nsa import drawn_positions
from train.model.auxiliary import DRAWS, LOSSES, total_loss
from train.model.transformer import Transformer
from train.parallel.sharding import check_divisible, make_mesh, on_mesh, put_batch, tree_shardings
from train.step import loss_sums, make_init, make_train_step

VOCABULARY, ROWS, T = 30, 8, 64
# As in the paper, where nothing but such a loss ties a block's score to the attention that the block gets.
MODEL = dataclasses.replace(
    SMALL,
    num_heads=4,
    num_kv_heads=2,
    compression="mlp",
    share_kv=False,
    selection_loss=0.5,
    selection_loss_queries=16,
)


def batch():
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, VOCABULARY, (ROWS, T + 1), dtype=np.int32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": np.ones((ROWS, T), np.float32),
        "target_bytes": np.ones((ROWS, T), np.int32),
        "segment_ids": np.repeat([[0] * 16 + [1] * 48], ROWS, axis=0).astype(np.int32),
    }


def start(model, optimizer):
    """The state before the first step, and the logical axes of its arrays."""
    init = make_init(model, optimizer)
    state = jax.device_get(jax.jit(lambda key: nn.meta.unbox(init(key)))(jax.random.key(0)))
    return state, jax.eval_shape(init, jax.random.key(0))


def test_a_position_is_drawn_from_each_part_of_a_row():
    drawn = np.stack([drawn_positions(jax.random.key(seed), 50, 7) for seed in range(200)])
    edges = np.arange(8) * 50 // 7
    for part, positions in enumerate(drawn.T):
        assert set(positions) == set(range(edges[part], edges[part + 1]))


@pytest.mark.parametrize("moves_queries", [True, False])
def test_a_layer_leaves_its_loss_where_there_are_random_numbers_and_moves_what_scores_are_made_of(moves_queries):
    # With as many queries as there are tokens, nothing is left to chance.
    config = dataclasses.replace(MODEL, selection_loss_queries=T, selection_loss_moves_queries=moves_queries)
    layer = make_attention(config, name="attention")
    plain = make_attention(dataclasses.replace(config, selection_loss=0.0), name="attention")
    x = jax.random.normal(jax.random.key(0), (2, T, config.embed_dim))
    params = nn.meta.unbox(jax.jit(layer.init)(jax.random.key(1), x))["params"]

    @jax.jit
    def outputs(params):
        def loss(params):
            y, left = layer.apply({"params": params}, x, mutable=[LOSSES], rngs={DRAWS: jax.random.key(2)})
            return total_loss(left), y

        inputs = nsa_layer_inputs(params, x, config=layer._config())
        direct = selection_loss(inputs, config.nsa, jnp.arange(T, dtype=jnp.int32))
        alone = layer.apply({"params": params}, x, mutable=[LOSSES])[1]
        return jax.value_and_grad(loss, has_aux=True)(params), plain.apply({"params": params}, x), direct, alone

    ((loss, y), gradient), expected, direct, alone = outputs(params)
    assert not jax.tree.leaves(alone)
    chex.assert_trees_all_close(y, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(loss, 0.5 * direct, rtol=1e-5)
    of_scores = ("cmp_k_", "phi_k_", "q_") if moves_queries else ("cmp_k_", "phi_k_")
    moved = {name for name, x in gradient.items() if np.any(x != 0)}
    assert moved == {name for name in params if name.startswith(of_scores)}


def test_training_lowers_it_and_leaves_the_cross_entropy_as_it_is_measured():
    config = dataclasses.replace(MODEL, selection_loss=100.0, remat="attention")
    model, optimizer = Transformer(config, VOCABULARY), optax.adam(1e-2)
    state, _ = start(model, optimizer)
    step = jax.jit(make_train_step(model, optimizer, accumulate=2, z_loss=0.0))
    given = jax.tree.map(jnp.asarray, batch())
    measured, found = jax.jit(loss_sums, static_argnums=0)(model, state.params, given), []
    for _ in range(30):
        state, metrics = step(state, given)
        found.append((float(metrics.sums.nll), float(metrics.of_layers)))
    assert found[0][0] == pytest.approx(float(measured.nll), rel=1e-5)
    losses = [of_layers for _, of_layers in found]
    assert losses[0] != losses[1]
    assert np.mean(losses[-5:]) < 0.5 * losses[0]


@pytest.mark.exhaustive
def test_a_mesh_makes_the_step_of_one_device():
    model, optimizer = Transformer(MODEL, VOCABULARY), optax.trace(decay=0)  # which keeps the gradients
    state, boxed = start(model, optimizer)
    step = make_train_step(model, optimizer, accumulate=1, z_loss=0.0)
    expected, of_one = jax.jit(step)(state, jax.tree.map(jnp.asarray, batch()))
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2, explicit=True))
    shardings = tree_shardings(boxed, mesh)
    run = on_mesh(jax.jit(step, out_shardings=(shardings, None)), mesh)
    actual, of_mesh = run(jax.device_put(state, shardings), put_batch(batch(), mesh, MODEL.nsa.compress_stride))
    assert float(of_one.of_layers) > 0
    chex.assert_trees_all_close(
        jax.device_get((actual, of_mesh)), jax.device_get((expected, of_one)), rtol=1e-4, atol=1e-6
    )


def test_rows_that_are_split_are_refused():
    config = TrainConfig(model=MODEL, mesh=MeshConfig(data=4, context=2))
    with pytest.raises(ValueError, match=r"mesh.context = 2: expected 1 with model.selection_loss = 0.5"):
        check_divisible(config, 64, 8)
