import dataclasses
import itertools
import json
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nsa_jax import NSAConfig
from train import loop
from train.checkpoints.saved import load_model
from train.config import CheckpointConfig, DataConfig, MeshConfig, ModelConfig, OptimizerConfig, TrainConfig, from_json
from train.console import Console
from train.loop import Interrupted, NonFiniteError, run
from train.metrics import read_metrics
from train.model.flops import train_flops_per_token
from train.model.loss import LossSums
from train.model.moe import RouterMetrics
from train.model.transformer import logits
from train.prepare import prepare
from train.step import StepMetrics


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> TrainConfig:
    """A run of a few seconds on a small corpus."""
    folder = tmp_path_factory.mktemp("corpus")
    draw = np.random.default_rng(0)
    for i in range(40):
        (folder / f"{i}.txt").write_bytes(draw.integers(97, 123, draw.integers(20, 80)).astype(np.uint8).tobytes())
    return TrainConfig(
        model=ModelConfig(
            num_layers=1,
            embed_dim=16,
            num_heads=2,
            num_kv_heads=1,
            head_dim=8,
            mlp_dim=16,
            attention="full",
            nsa=NSAConfig(compress_block=4, compress_stride=2, select_block=4, num_selected=3, window=6),
        ),
        data=DataConfig(path=str(folder), sequence_length=32, batch_size=8),
        optimizer=OptimizerConfig(warmup_steps=2),
        checkpoint=CheckpointConfig(every=4),
        mesh=MeshConfig(data=4, fsdp=2),
        steps=10,
        eval_every=5,
        eval_batches=2,
        position_buckets=0,
        sample_tokens=0,
    )


def train(config):
    return run(prepare(config), plain=True)


def losses(config):
    return [(entry["step"], entry["loss"]) for entry in read_metrics(config.run_dir / "metrics.jsonl")]


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    """A run that nothing stopped."""
    config = dataclasses.replace(
        base, run_dir=tmp_path_factory.mktemp("finished") / "run", sample_tokens=5, position_buckets=4
    )
    return config, train(config)


def test_a_run_leaves_its_curve_sample_metrics_config_and_checkpoint(finished, capsys):
    config, result = finished
    assert result.files["curve"].read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert result.files["sample"].read_text() == result.sample
    assert result.sample.startswith(config.sample_prompt)
    assert from_json(result.files["config"].read_text()) == config
    assert (result.files["checkpoints"] / str(config.steps)).is_dir()
    entries = read_metrics(result.files["metrics"])
    assert [entry["step"] for entry in entries] == list(range(1, config.steps + 1))
    assert [entry["step"] for entry in entries if "held_out_bits_per_byte" in entry] == [5, 10]
    assert entries[-1]["held_out_bits_per_byte"] == result.held_out["held_out_bits_per_byte"]
    by_position = [entries[-1][f"held_out_bits_per_byte/{begin}-{begin + 7}"] for begin in (0, 8, 16, 24)]
    assert min(by_position) < result.held_out["held_out_bits_per_byte"] < max(by_position)
    assert entries[0]["loss"] == pytest.approx(np.log(320), abs=0.2)  # the padded vocabulary, nothing learnt
    assert entries[-1]["loss"] < entries[0]["loss"]
    assert not any(name.startswith("selection") for entry in entries for name in entry)  # full attention has none


def test_a_run_without_steps_evaluates_and_saves_its_start_from_which_it_can_go_on(base, tmp_path):
    config = dataclasses.replace(base, run_dir=tmp_path / "run", steps=0, position_buckets=4)
    result = train(config)
    (entry,) = read_metrics(result.files["metrics"])
    assert entry["held_out_loss"] == result.held_out["held_out_loss"] == pytest.approx(np.log(320), abs=0.2)
    assert len([name for name in entry if name.startswith("held_out_bits_per_byte/")]) == 4
    assert int(result.state.step) == 0
    start = load_model(config.run_dir, step=0).params
    assert all(np.array_equal(*pair) for pair in zip(*map(jax.tree.leaves, (start, result.state.params)), strict=True))
    assert train(config).held_out == result.held_out
    more, at_once = (dataclasses.replace(config, run_dir=tmp_path / name, steps=3) for name in ("run", "at_once"))
    pairs = zip(*(jax.tree.leaves(train(config).state.params) for config in (more, at_once)), strict=True)
    assert all(np.array_equal(*pair) for pair in pairs)
    assert [entry["step"] for entry in read_metrics(result.files["metrics"])] == [0, 1, 2, 3]


def test_held_out_figures_are_those_of_the_last_parameters_in_numpy(finished):
    config, result = finished
    prepared, params = prepare(config), jax.tree.map(jnp.asarray, jax.device_get(result.state.params))
    forward = jax.jit(
        lambda tokens, ids: logits(
            params, prepared.model.apply({"params": params}, tokens, segment_ids=ids), config.model
        )
    )
    sums = np.zeros(3)
    for batch in prepared.held_out:
        scores = np.asarray(forward(batch["tokens"], batch["segment_ids"]), np.float64)
        nll = np.log(np.exp(scores).sum(axis=-1)) - np.take_along_axis(scores, batch["targets"][..., None], -1)[..., 0]
        weights = batch["weights"].astype(np.float64)
        sums += (weights * nll).sum(), weights.sum(), (weights * batch["target_bytes"]).sum()
    assert len(prepared.held_out) > 0
    assert result.held_out["held_out_loss"] == pytest.approx(sums[0] / sums[1], rel=1e-5)
    assert result.held_out["held_out_bits_per_byte"] == pytest.approx(sums[0] / sums[2] / np.log(2), rel=1e-5)


def test_logged_learning_rates_are_those_of_the_updates(finished):
    """Two steps of warm-up to 1e-3, then a cosine down to a tenth of it at the tenth step."""
    config, _ = finished
    expected = [5e-4, 1e-3, *(1e-4 + 9e-4 * (1 + np.cos(np.pi * np.arange(1, 9) / 8)) / 2)]
    logged = [entry["learning_rate"] for entry in read_metrics(config.run_dir / "metrics.jsonl")]
    np.testing.assert_allclose(logged, expected, rtol=1e-5)


def test_what_is_logged_of_a_step_follows_from_its_sums(finished):
    prepared = prepare(finished[0])
    reader = loop._StepReader(prepared, None, Console(10, silent=True))
    nothing_counts = LossSums(nll=0.0, z=0.0, weight=0.0, bytes=0.0)
    sums = LossSums(nll=12.0, z=7.0, weight=4.0, bytes=6.0)
    logged = reader.read(3, StepMetrics(sums, grad_norm=2.5, router=None))
    assert logged["loss"] == 3.0
    assert logged["bits_per_byte"] == pytest.approx(2.0 / np.log(2))
    assert logged["grad_norm"] == 2.5
    assert reader.read(4, StepMetrics(nothing_counts, grad_norm=0.0, router=None))["loss"] == 0.0
    routed = RouterMetrics(*range(1, 1 + len(RouterMetrics._fields)))
    logged = reader.read(5, StepMetrics(sums, grad_norm=2.5, router=routed))
    assert {name: logged[name] for name in RouterMetrics._fields} == routed._asdict()


def test_a_picture_and_a_sample_that_cannot_be_written_fail_no_finished_run(finished, tmp_path, capsys):
    config, result = finished
    copy = shutil.copytree(config.run_dir, tmp_path / "run")
    for name in ("loss.png", "sample.txt"):
        (copy / name).unlink()
        (copy / name).mkdir()
    again = train(dataclasses.replace(config, run_dir=copy))
    assert again.sample == result.sample
    assert not {"curve", "sample"} & set(again.files)
    output = capsys.readouterr().out
    assert f"could not write {copy / 'loss.png'}: Is a directory" in output
    assert f"could not write {copy / 'sample.txt'}: Is a directory" in output
    assert not list(copy.glob("*.tmp"))


def test_a_finished_run_is_reported_again_and_not_trained_further(finished, capsys):
    config, result = finished
    again = train(config)
    assert again.held_out == result.held_out
    assert again.sample == result.sample
    assert [step for step, _ in losses(config)] == list(range(1, config.steps + 1))
    output = capsys.readouterr().out
    assert "resuming after step 10" in output
    assert f"{result.held_out['held_out_bits_per_byte']:.4f} held-out bits per byte" in output
    assert str(result.files["curve"]) in output


@pytest.mark.parametrize(
    ("number", "during", "call", "step"),
    [(signal.SIGTERM, "put_batch", 3, 3), (signal.SIGINT, "evaluate", 2, 10)],  # the second one at the very end
)
def test_a_stopped_and_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    finished, base, tmp_path, monkeypatch, number, during, call, step
):
    config = dataclasses.replace(base, run_dir=tmp_path / "run", sample_tokens=5)
    calls = itertools.count(1)
    function = getattr(loop, during)

    def function_and_stop(*arguments):
        if next(calls) == call:
            os.kill(os.getpid(), number)
        return function(*arguments)

    before = signal.getsignal(number)
    monkeypatch.setattr(loop, during, function_and_stop)
    with pytest.raises(Interrupted, match=rf"{number.name} after step {step}; saved"):
        train(config)
    assert signal.getsignal(number) == before
    monkeypatch.undo()
    with (config.run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step + 1, "loss": 0.0}) + "\n")  # a step that was logged and lost
    result = train(config)
    reference_config, reference = finished
    assert losses(config) == losses(reference_config)
    assert result.held_out == reference.held_out
    assert result.sample == reference.sample
    for x, y in zip(jax.tree.leaves(result.state), jax.tree.leaves(reference.state), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_a_step_is_logged_with_its_learning_rate_speed_and_part_of_the_devices_peak(base, tmp_path, monkeypatch):
    prepared = prepare(dataclasses.replace(base, run_dir=tmp_path / "run"))
    clock = iter([100.0, 102.0, 102.5])
    monkeypatch.setattr(loop.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(loop, "device_peak_flops", lambda: 4e9)
    sums = LossSums(*(np.float32(value) for value in (30.0, 0.0, 20.0, 10.0)))
    reader = loop._StepReader(prepared, None, Console(10, silent=True))
    tokens = base.data.batch_size * base.data.sequence_length
    flops = train_flops_per_token(base.model, base.data.sequence_length, prepared.model.vocab_size)
    half = base.optimizer.learning_rate * (0.1 + 0.9 * 0.5)  # of a cosine from step 2 to step 10, to a tenth
    for step, rate, seconds in ((1, base.optimizer.learning_rate / 2, 2.0), (6, half, 0.5)):
        values = reader.read(step, StepMetrics(sums, np.float32(1.5), None))
        assert values["learning_rate"] == pytest.approx(rate, rel=1e-5)
        assert values["tokens_per_second"] == pytest.approx(tokens / seconds)
        assert values["model_flop_utilisation"] == pytest.approx(tokens / seconds * flops / 4e9)
        assert values["grad_norm"] == 1.5


def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_and_checkpoint(base, tmp_path):
    config = dataclasses.replace(
        base,
        run_dir=tmp_path / "run",
        optimizer=OptimizerConfig(learning_rate=1e38, warmup_steps=0),
        checkpoint=CheckpointConfig(every=1),
    )
    with pytest.raises(
        NonFiniteError, match=r"step 2: loss .*, gradient norm .*; the last good checkpoint is step 1 in .*checkpoints"
    ):
        train(config)
    assert [step for step, _ in losses(config)] == [1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: dataclasses.replace(c, model=dataclasses.replace(c.model, mlp_dim=32)),
            "model.mlp_dim was 16, is 32",
        ),
        (lambda c: dataclasses.replace(c, seed=1), "seed was 0, is 1"),
        (lambda c: dataclasses.replace(c, steps=5), "steps = 5: expected at least 10"),
    ],
)
def test_another_run_in_the_same_folder_is_refused_by_name(finished, change, message):
    with pytest.raises(ValueError, match=message):
        prepare(change(finished[0]))


def test_another_vocabulary_or_other_data_are_refused_by_name(finished, tmp_path):
    config = finished[0]
    path = config.run_dir / "facts.json"
    facts = json.loads(path.read_text())
    for name, value in (("vocab_size", 32000), ("data_fingerprint", "other")):
        path.write_text(json.dumps(facts | {name: value}))
        with pytest.raises(ValueError, match=rf"{name} was {value!r}, is {facts[name]!r}"):
            prepare(config)
    path.write_text(json.dumps(facts))


def test_more_steps_and_other_intervals_may_be_asked_of_a_run(finished):
    changed = dataclasses.replace(
        finished[0], steps=20, eval_every=3, checkpoint=CheckpointConfig(every=2), mesh=MeshConfig(data=8, fsdp=1)
    )
    prepare(changed)
