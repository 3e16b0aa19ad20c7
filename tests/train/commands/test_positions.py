"""Held-out loss by position: the sums of each bucket, and the command on a run."""

import dataclasses
import json
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.saved_run import save_untrained

from nsa_jax import NSAConfig, RopeScaling
from train.__main__ import main
from train.commands.positions import Arguments, _scaling
from train.config import DataConfig, MeshConfig, ModelConfig, OptimizerConfig, TrainConfig
from train.evaluate import evaluate_positions, position_sums
from train.model.loss import cross_entropy
from train.model.transformer import Transformer, logits
from train.parallel.sharding import make_mesh, on_mesh, put_batch
from train.plot import main as report
from train.presets import tiny
from train.step import loss_sums

B, T, VOCABULARY = 8, 24, 40
MODEL = ModelConfig(
    num_layers=1,
    embed_dim=16,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    mlp_dim=16,
    attention="full",
    nsa=NSAConfig(compress_block=4, compress_stride=2, select_block=4, num_selected=3, window=6),
)


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


def test_the_command_evaluates_a_run_at_another_length_and_draws_it(tmp_path, capsys):
    draw = np.random.default_rng(0)
    (tmp_path / "corpus").mkdir()
    for i in range(12):
        (tmp_path / "corpus" / f"{i}.txt").write_bytes(draw.integers(97, 123, 400).astype(np.uint8).tobytes())
    data = DataConfig(str(tmp_path / "corpus"), sequence_length=64, batch_size=8, isolate_documents=False)
    data = dataclasses.replace(data, held_out_fraction=0.5)
    save_untrained(TrainConfig(MODEL, data, OptimizerConfig(warmup_steps=0), run_dir=tmp_path / "run", eval_batches=2))
    folder = str(tmp_path / "run")

    def evaluated(name, *options):
        out = tmp_path / f"{name}.json"
        assert main(["positions", "--run", folder, "--buckets", "4", "--out", str(out), *options]) == 0
        return json.loads(out.read_text())

    longer = ["--sequence-length", "128", "--batch-size", "4"]
    plain, yarn = evaluated("plain", *longer), evaluated("yarn", *longer, "--rope-scaling", "yarn")
    assert yarn["rope_scaling"] | {"kind": "yarn", "factor": 2.0, "original_length": 64} == yarn["rope_scaling"]
    assert plain["buckets"][-1]["end"] == yarn["buckets"][-1]["end"] == 128
    assert [bucket["tokens"] for bucket in plain["buckets"]] == [bucket["tokens"] for bucket in yarn["buckets"]]
    assert plain["buckets"] != yarn["buckets"]
    assert "96-127" in capsys.readouterr().out
    report([str(tmp_path / "lines.png"), *(f"{name}={tmp_path / name}.json" for name in ("plain", "yarn"))])
    assert (tmp_path / "lines.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"

    for wrong, message in (
        (["--buckets", "65"], "buckets = 65: expected 1 to sequence_length = 64"),
        (["--factor", "2"], "factor = 2.0: expected rope_scaling linear, ntk or yarn"),
        (["--batches", "0"], "batches = 0: expected at least 1"),
    ):
        assert main(["positions", "--run", folder, *wrong]) == 2
        assert message in capsys.readouterr().err
    assert main(["positions", "--run", folder, "--step", "5"]) == 1
    assert "no checkpoint of step 5" in capsys.readouterr().err


def test_scaling_is_the_runs_unless_the_command_says_otherwise(tmp_path):
    config = tiny()  # trained at 512
    assert _scaling(Arguments(tmp_path), config, 2048) is None
    assert _scaling(Arguments(tmp_path, rope_scaling="none"), config, 2048) == RopeScaling()
    assert _scaling(Arguments(tmp_path, rope_scaling="yarn"), config, 2048) == RopeScaling("yarn", 4, 512)
    chosen = Arguments(tmp_path, rope_scaling="linear", factor=3, original_length=100)
    assert _scaling(chosen, config, 2048) == RopeScaling("linear", 3, 100)


def test_a_file_that_holds_no_positions_is_named(tmp_path):
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match=r"other.json: expected a file that `python -m train positions --out` wrote"):
        report([str(tmp_path / "lines.png"), f"a={tmp_path / 'other.json'}"])
