import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nsa_jax import NSAConfig
from nsa_jax.testing import normwise_error
from train.config import MeshConfig, ModelConfig, OptimizerConfig
from train.model.transformer import Transformer
from train.optimizer import make_optimizer
from train.parallel.sharding import make_mesh, on_mesh, put_batch, tree_shardings
from train.step import make_init, make_train_step

B, T, VOCABULARY = 8, 16, 50
MODEL = ModelConfig(
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


def batch():
    draw = np.random.default_rng(0)
    weights = (draw.random((B, T)) < 0.7).astype(np.float32)
    weights[::2] = 0  # microbatches of very unequal weight
    weights[0, 0] = 1
    return {
        "tokens": draw.integers(0, VOCABULARY, (B, T), dtype=np.int32),
        "targets": draw.integers(0, VOCABULARY, (B, T), dtype=np.int32),
        "weights": weights,
        "target_bytes": draw.integers(0, 4, (B, T), dtype=np.int32),
        "segment_ids": np.repeat(np.arange(2, dtype=np.int32), T // 2)[None].repeat(B, axis=0),
    }


def one_step(attention="full", accumulate=1, mesh=None):
    model = Transformer(dataclasses.replace(MODEL, attention=attention), VOCABULARY)
    optimizer = make_optimizer(OptimizerConfig(warmup_steps=0), 10)
    init = make_init(model, optimizer)
    step = make_train_step(model, optimizer, accumulate=accumulate, z_loss=1e-3)
    key = jax.random.key(0)
    if mesh is None:
        state = jax.jit(lambda key: nn.meta.unbox(init(key)))(key)
        return jax.jit(step)(state, jax.tree.map(jnp.asarray, batch()))
    shardings = tree_shardings(jax.eval_shape(init, key), mesh)
    state = jax.jit(lambda key: nn.meta.unbox(init(key)), out_shardings=shardings)(key)
    return on_mesh(jax.jit(step, out_shardings=(shardings, None)), mesh)(state, put_batch(batch(), mesh, 2))


class Lookup(nn.Module):
    """Hidden states are the embeddings of the tokens, so that the gradient of the loss can be written out by hand."""

    config: ModelConfig

    @nn.compact
    def __call__(self, tokens, *, segment_ids=None, counted=None):
        return self.param("embedding", nn.initializers.normal(1.0), (VOCABULARY, 16))[tokens]


def loss_and_gradient(embedding, batch, z_loss):
    """Sums of nll and of squared log-normalisers, and the gradient of (nll + z_loss z) / weight, token by token."""
    nll = z = 0.0
    gradient = np.zeros_like(embedding)
    for token, target, weight in zip(*(batch[name].ravel() for name in ("tokens", "targets", "weights")), strict=True):
        scores = embedding @ embedding[token]
        log_normaliser = np.log(np.exp(scores).sum())
        softmax = np.exp(scores - log_normaliser)
        nll += weight * (log_normaliser - scores[target])
        z += weight * log_normaliser**2
        to_scores = weight * (softmax * (1 + 2 * z_loss * log_normaliser) - (np.arange(VOCABULARY) == target))
        gradient += np.outer(to_scores, embedding[token])  # through the output layer
        gradient[token] += embedding.T @ to_scores
    return nll, z, gradient / batch["weights"].sum()


@pytest.mark.parametrize(("accumulate", "clip"), [(1, 0.5), (4, 0.5), (4, 2.0)])
def test_loss_norm_and_clipped_gradient_equal_those_written_out_by_hand(accumulate, clip):
    z_loss, model = 0.2, Lookup(MODEL)
    made = batch()
    made["weights"] *= np.random.default_rng(1).choice([0.5, 1.0, 3.0], made["weights"].shape).astype(np.float32)
    key = jax.random.key(0)
    embedding = np.asarray(make_init(model, optax.identity())(key).params["embedding"], np.float64)
    nll, z, gradient = loss_and_gradient(embedding, made, z_loss)
    norm = np.linalg.norm(gradient)
    optimizer = make_optimizer(OptimizerConfig(warmup_steps=0, b1=0.75, clip_norm=clip * norm), 10)
    step = jax.jit(make_train_step(model, optimizer, accumulate=accumulate, z_loss=z_loss))
    before = make_init(model, optimizer)(key)
    # The hidden states of all rows exist at once only where they are one microbatch.
    assert (f"f32[{B},{T},16]" in str(jax.make_jaxpr(step)(before, made))) == (accumulate == 1)
    state, metrics = step(before, made)
    np.testing.assert_allclose(metrics.sums.nll, nll, rtol=1e-5)
    np.testing.assert_allclose(metrics.sums.z, z, rtol=1e-5)
    np.testing.assert_allclose(metrics.sums.weight, made["weights"].sum(), rtol=1e-6)
    np.testing.assert_allclose(metrics.sums.bytes, (made["weights"] * made["target_bytes"]).sum(), rtol=1e-6)
    np.testing.assert_allclose(metrics.grad_norm, norm, rtol=1e-5)  # before clipping
    first_moment = state.opt_state[1][0].mu["embedding"]
    assert normwise_error(first_moment, 0.25 * min(1.0, clip) * gradient) < 1e-5
    assert int(state.step) == 1
    # Where no token counts, there is nothing to learn, and nothing becomes NaN.
    state, metrics = step(before, made | {"weights": np.zeros_like(made["weights"])})
    assert float(metrics.sums.weight) == float(metrics.grad_norm) == 0.0
    assert not np.any(state.opt_state[1][0].mu["embedding"])
    assert np.all(np.isfinite(state.params["embedding"]))


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_gradient_is_over_the_sum_of_the_weights_even_where_they_sum_to_less_than_a_token(accumulate):
    z_loss, model, optimizer = 0.2, Lookup(MODEL), optax.identity()
    step = jax.jit(make_train_step(model, optimizer, accumulate=accumulate, z_loss=z_loss))
    state = make_init(model, optimizer)(jax.random.key(0))
    alone = np.zeros((B, T), np.float32)
    alone[2, 3] = 1
    _, _, gradient = loss_and_gradient(np.float64(state.params["embedding"]), batch() | {"weights": alone}, z_loss)
    for weight in (2**-20, 0.5, 1, 1.5, 3):
        _, metrics = step(state, batch() | {"weights": np.float32(weight) * alone})
        np.testing.assert_allclose(metrics.grad_norm, np.linalg.norm(gradient), rtol=1e-5)


def test_muons_state_lies_on_a_mesh_as_its_parameters_do():
    model, mesh = Transformer(MODEL, VOCABULARY), make_mesh(MeshConfig(fsdp=2))
    init = make_init(model, make_optimizer(OptimizerConfig(kind="muon", warmup_steps=0), 10))
    abstract = jax.eval_shape(init, jax.random.key(0))
    shardings = tree_shardings(abstract, mesh)
    assert jax.tree.structure(shardings) == jax.tree.structure(nn.meta.unbox(abstract))
    state = jax.jit(lambda key: nn.meta.unbox(init(key)), out_shardings=shardings)(jax.random.key(0))
    assert state.params["embedding"].sharding == shardings.params["embedding"]


def assert_close(actual, expected, tolerance):
    (state, metrics), (expected_state, expected_metrics) = actual, expected
    np.testing.assert_allclose(metrics.grad_norm, expected_metrics.grad_norm, rtol=tolerance)
    np.testing.assert_allclose(metrics.sums, expected_metrics.sums, rtol=tolerance)
    # The first moment is the clipped gradient, up to a factor. The parameters say less: Adam turns gradients of 1e-12
    # into steps of full size.
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(state.opt_state[1][0].mu),
        jax.tree.leaves(expected_state.opt_state[1][0].mu),
        strict=True,
    ):
        assert np.linalg.norm(np.asarray(x) - np.asarray(y)) <= tolerance * np.linalg.norm(y), path


@pytest.fixture(scope="module")
def whole():
    return one_step()


def test_accumulated_microbatches_equal_one_batch_however_unequal_their_weights(whole):
    assert_close(one_step(accumulate=8), whole, 1e-5)


@pytest.mark.parametrize(("explicit", "accumulate"), [(False, 1), (True, 2)])
def test_a_step_on_a_mesh_equals_the_step_on_one_device(whole, explicit, accumulate):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2, explicit=explicit))
    sharded = one_step(accumulate=accumulate, mesh=mesh)
    assert_close(sharded, whole, 1e-5)
    kernel = sharded[0].params["layers"]["mlp"]["gate_kernel"]
    assert kernel.addressable_shards[0].data.shape == (2, 16 // 2, 24 // 2)
    second_moment = sharded[0].opt_state[1][0].nu["layers"]["mlp"]["gate_kernel"]
    assert second_moment.sharding == kernel.sharding


def test_a_step_moves_the_random_state(whole):
    state, _ = whole
    _, rng = jax.random.split(jax.random.key(0))
    assert not np.array_equal(state.rng, jax.random.key_data(rng))
