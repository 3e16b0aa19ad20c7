"""Held-out loss: over all tokens and by position."""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.models import SMALL

from train.config import MeshConfig
from train.evaluate import evaluate, evaluate_positions, position_sums
from train.model.loss import LossSums, cross_entropy
from train.model.transformer import Transformer, logits
from train.parallel.sharding import make_mesh, on_mesh, put_batch
from train.step import loss_sums

MODEL = dataclasses.replace(SMALL, attention="full")


B, T, VOCABULARY = 8, 24, 40


def batch(seed, segments):
    draw = np.random.default_rng(seed)
    made = {
        "tokens": draw.integers(0, VOCABULARY, (B, T), dtype=np.int32),
        "targets": draw.integers(0, VOCABULARY, (B, T), dtype=np.int32),
        "weights": (draw.random((B, T)) < 0.7).astype(np.float32),
        "target_bytes": draw.integers(1, 4, (B, T), dtype=np.int32),
    }
    return made | ({"segment_ids": np.repeat([[0] * 8 + [1] * 16], B, axis=0).astype(np.int32)} if segments else {})


@pytest.mark.parametrize(("segments", "way"), [(False, "in chunks"), (True, "on a mesh")])
def test_buckets_hold_each_tokens_own_loss_whichever_way_it_is_computed(segments, way):
    model = Transformer(MODEL, VOCABULARY)
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32)))["params"]
    batches = [batch(seed, segments) for seed in range(2)]

    def in_chunks(params, batch):
        hidden = model.apply({"params": params}, batch["tokens"], segment_ids=batch.get("segment_ids"))
        arguments = (hidden, params["embedding"].T, batch["targets"], batch["weights"], batch["target_bytes"])
        return cross_entropy(*arguments, chunk_elements=B * 64 * 7)

    if way == "in chunks":
        step = jax.jit(lambda params, batch: position_sums(in_chunks, params, batch, 5, T))
        found = evaluate_positions(step, params, batches, T)
    else:
        mesh = make_mesh(MeshConfig(data=2, context=4))
        step = jax.jit(lambda params, batch: position_sums(lambda p, b: loss_sums(model, p, b), params, batch, 5, T))
        found = evaluate_positions(on_mesh(step, mesh), params, (put_batch(made, mesh, 2) for made in batches), T)
    forward = jax.jit(
        lambda params, batch: logits(
            params, model.apply({"params": params}, batch["tokens"], segment_ids=batch.get("segment_ids")), MODEL
        )
    )
    # 5 buckets of 5 positions, of which the last has 4; a segment begins at position 8 and starts anew there.
    position = np.arange(T) - (np.arange(T) >= 8) * 8 * segments
    expected = np.zeros((3, 5))
    for made in batches:
        scores = np.asarray(forward(params, made), np.float64)
        scores -= np.log(np.exp(scores).sum(axis=-1, keepdims=True))
        nll = -np.take_along_axis(scores, made["targets"][..., None], axis=-1)[..., 0]
        for t in range(T):
            w = made["weights"][:, t]
            expected[:, position[t] // 5] += (w @ nll[:, t], w.sum(), w @ made["target_bytes"][:, t])
    nll, weight, num_bytes = expected[:, expected[1] > 0]
    ends = [(0, 5), (5, 10), (10, 15), (15, 20), (20, 24)][: len(weight)]
    assert [(bucket.begin, bucket.end) for bucket in found] == ends
    np.testing.assert_allclose([bucket.nats_per_token for bucket in found], nll / weight, rtol=1e-5)
    np.testing.assert_allclose([bucket.bits_per_byte for bucket in found], nll / num_bytes / math.log(2), rtol=1e-5)
    np.testing.assert_array_equal([bucket.tokens for bucket in found], weight)


def test_tokens_and_bytes_count_once_however_they_lie_in_batches():
    def eval_step(params, batch):
        weight = batch["weights"]
        return LossSums(
            nll=jnp.sum(weight * batch["nll"]) * params,
            z=jnp.zeros(()),
            weight=jnp.sum(weight),
            bytes=jnp.sum(weight * batch["bytes"]),
        )

    draw = np.random.default_rng(0)
    whole = {name: draw.random((24, 4)).astype(np.float32) for name in ("nll", "bytes", "weights")}
    batches = [{name: value[begin : begin + 8] for name, value in whole.items()} for begin in (0, 8, 16)]
    values = evaluate(eval_step, jnp.float32(2.0), batches, make_mesh(MeshConfig()), 1)
    nll = 2 * (whole["weights"] * whole["nll"]).sum()
    assert values["held_out_loss"] == pytest.approx(nll / whole["weights"].sum(), rel=1e-6)
    num_bytes = (whole["weights"] * whole["bytes"]).sum()
    assert values["held_out_bits_per_byte"] == pytest.approx(nll / num_bytes / math.log(2), rel=1e-6)
    nothing_counts = {**batches[0], "weights": np.zeros((8, 4), np.float32)}
    assert all(
        math.isnan(value) for value in evaluate(eval_step, 1.0, [nothing_counts], make_mesh(MeshConfig()), 1).values()
    )
