"""NSA with one softmax over its branches: what it weighs, that it learns, and what it refuses."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.models import SMALL

from nsa_jax import NSAConfig, compressed_attention, select_blocks
from nsa_jax.testing import normwise_error, random_inputs
from train.config import DataConfig, MeshConfig, OptimizerConfig, TrainConfig
from train.loop import run
from train.metrics import read_metrics
from train.model.attention import attention_kind
from train.model.attention.kind import make_attention
from train.model.attention.one_softmax import one_softmax
from train.parallel.sharding import check_divisible, make_mesh
from train.prepare import prepare
from train.presets import tiny

SIZES = NSAConfig(
    compress_block=4, compress_stride=2, select_block=4, num_selected=4, num_local=0, window=10, select_in_window=False
)
MODEL = dataclasses.replace(SMALL, num_heads=4, num_kv_heads=2, nsa=SIZES, attention="one-softmax")
B, T, H, K = 2, 45, 4, 2
SEGMENTS = np.array([[0] * T, [0] * 20 + [1] * (T - 20)], np.int32)


def layer_and_inputs(**fields):
    """A layer, its parameters, x, and what it gives to the attention."""
    layer = dataclasses.replace(make_attention(dataclasses.replace(MODEL, **fields)), dtype=jnp.float32)
    x = jax.random.normal(jax.random.key(0), (B, T, MODEL.embed_dim))
    params = nn.meta.unbox(layer.init(jax.random.key(1), x)["params"])
    _, left = layer.apply({"params": params}, x, segment_ids=jnp.asarray(SEGMENTS), mutable=["intermediates"])
    return layer, params, x, left["intermediates"]["attention_inputs"][0]


def expected_attention(inputs, config):
    """By a single softmax in float64 over all keys of the branches, each of which counts as its gate says."""
    q, kv, gates, ids, _ = inputs
    lse = compressed_attention(q, kv.cmp_k, kv.cmp_v, config=config, segment_ids=ids)[1]
    blocks = np.asarray(select_blocks(q, kv.cmp_k, lse, config=config, segment_ids=ids))
    q, kv, gates = jax.tree.map(lambda x: np.asarray(x, np.float64), (q, kv, gates))
    l, d, s = config.compress_block, config.compress_stride, config.select_block  # noqa: E741
    o = np.zeros((B, T, H, q.shape[-1]))
    for b, t, h in np.ndindex(B, T, H):
        head, start = h // (H // K), int(np.flatnonzero(SEGMENTS[b] == SEGMENTS[b, t])[0])
        position = np.arange(T)
        first = np.arange(kv.cmp_k.shape[1]) * d
        seen = (position <= t) & (position >= start)
        branches = [
            (kv.cmp_k, kv.cmp_v, (first + l - 1 <= t) & (first >= start), d),
            (kv.slc_k, kv.slc_v, seen & np.isin(position // s, blocks[b, head, t]), 1),
            (kv.win_k, kv.win_v, seen & (position > t - config.window), 1),
        ]
        scores, values = [], []
        for gate, (k, v, visible, tokens) in zip(gates[b, t, h], branches, strict=True):
            scores.append(k[b, visible, head] @ q[b, t, h] / q.shape[-1] ** 0.5 + np.log(gate * tokens))
            values.append(v[b, visible, head])
        weights = np.exp(np.concatenate(scores) - np.max(np.concatenate(scores)))
        o[b, t, h] = weights @ np.concatenate(values) / weights.sum()
    return o


@pytest.mark.parametrize(
    "fields", [{}, {"share_kv": False, "compression": "mlp"}], ids=["shared", "the paper's layout"]
)
def test_all_keys_share_one_softmax_in_which_a_gate_says_how_often_a_key_counts(fields):
    layer, params, x, inputs = layer_and_inputs(**fields)
    y = jax.jit(layer.apply)({"params": params}, x, segment_ids=jnp.asarray(SEGMENTS))
    expected = np.einsum("bthd,hde->bte", expected_attention(inputs, SIZES), np.asarray(params["o_kernel"], np.float64))
    assert normwise_error(y, expected) < 1e-5


def test_a_branch_without_keys_has_no_weight_and_sends_no_gradient_that_is_not_finite():
    q, kv, gates, *_ = random_inputs(jax.random.key(0), SIZES, B=1, T=1, num_heads=2, num_kv_heads=1, head_dim=8)
    outputs = (jnp.zeros_like(q), kv.slc_v.repeat(2, axis=2), kv.win_v.repeat(2, axis=2))
    sums = (jnp.full((1, 2, 1), -jnp.inf), jnp.zeros((1, 2, 1)), jnp.zeros((1, 2, 1)))

    def total(gates, outputs):
        return one_softmax(gates, outputs, sums)

    weight = gates[..., 1:2] / (gates[..., 1:2] + gates[..., 2:3])
    np.testing.assert_allclose(total(gates, outputs), weight * outputs[1] + (1 - weight) * outputs[2], rtol=1e-6)
    gradients = jax.grad(lambda *args: total(*args).sum(), argnums=(0, 1))(gates, outputs)
    assert all(np.all(np.isfinite(gradient)) for gradient in jax.tree.leaves(gradients))


def test_it_is_the_same_on_a_mesh():
    layer, params, x, _ = layer_and_inputs()
    y = jax.jit(layer.apply)({"params": params}, x)
    split = dataclasses.replace(layer, batch_axes="data", head_axes="tensor")
    with jax.set_mesh(make_mesh(MeshConfig(data=2, tensor=2), jax.devices()[:4])):
        assert normwise_error(jax.jit(split.apply)({"params": params}, x), y) < 1e-6


@pytest.mark.exhaustive
def test_it_learns(tmp_path):
    (tmp_path / "text").mkdir()
    for i in range(30):
        (tmp_path / "text" / f"{i}.txt").write_text(f"{i} " * 200)
    config = dataclasses.replace(
        tiny(),
        model=MODEL,
        data=DataConfig(path=str(tmp_path / "text"), sequence_length=64, batch_size=8, held_out_fraction=0.3),
        optimizer=OptimizerConfig(warmup_steps=2, learning_rate=1e-2),
        steps=12,
        eval_every=12,
        eval_batches=1,
        sample_tokens=0,
        run_dir=tmp_path / "run",
    )
    run(prepare(config))
    steps = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.5
    assert "selection_chosen/0/0" in steps[-1]


def test_it_has_no_cache():
    assert not attention_kind("one-softmax").decodes


@pytest.mark.parametrize(
    ("model", "mesh", "message"),
    [
        ({"nsa": dataclasses.replace(SIZES, window=0)}, {}, "model.nsa.window = 0: expected at least 1"),
        (
            {"nsa": dataclasses.replace(SIZES, num_selected=0, num_init=0)},
            {},
            "model.nsa.num_selected = 0: expected at",
        ),
        ({"selection_loss": 0.5}, {}, "model.selection_loss = 0.5: expected 0"),
        ({}, {"context": 2}, "mesh.context = 2: expected 1"),
    ],
)
def test_what_it_cannot_do_is_refused(model, mesh, message):
    config = TrainConfig(model=dataclasses.replace(MODEL, **model), mesh=MeshConfig(**mesh))
    with pytest.raises(ValueError, match=message):
        check_divisible(config, 64, 8)
