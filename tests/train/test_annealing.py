"""NSA that starts from full attention: exact at the start, ordinary at the end, and nothing jumps in between."""

import dataclasses
import json
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import train_runs
from helpers.models import SMALL
from helpers.saved_run import save_untrained

from nsa_jax.testing import normwise_error
from train import annealing
from train.checkpoints.saved import load_model, starting_parameters
from train.config import CheckpointConfig, DataConfig, MeshConfig, OptimizerConfig, TrainConfig, check
from train.loop import run
from train.model.transformer import Transformer
from train.prepare import prepare
from train.step import loss_sums

T, VOCABULARY = 40, 30
DENSE = dataclasses.replace(SMALL, num_layers=2, attention="full", qk_norm=True, qkv_bias=True)
MODELS = {
    "by default": dataclasses.replace(DENSE, attention="nsa"),
    "the paper's layout": dataclasses.replace(DENSE, attention="nsa", compression="mlp", share_kv=False),
    "tied keys": dataclasses.replace(DENSE, attention="nsa", compression="linear", share_kv=False, tie_keys=True),
    "every other layer": dataclasses.replace(DENSE, pattern=("full", "nsa")),
}


def initial(model, seed=0):
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens())
    leaves, tree = jax.tree.flatten(nn.meta.unbox(shapes["params"]))
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(
        tree, [0.3 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    )


def tokens():
    return jax.random.randint(jax.random.key(5), (2, T), 0, VOCABULARY)


def hidden(model, params):
    return jax.jit(model.apply)({"params": params}, tokens())


def config_of(model, **changes):
    data = DataConfig(sequence_length=T, isolate_documents=False)
    return TrainConfig(model, data, anneal_steps=10, **changes)


def started(model):
    """A model, its dense one, and the parameters of both."""
    dense, new = Transformer(DENSE, VOCABULARY), Transformer(model, VOCABULARY)
    params, fresh = initial(dense), initial(new, seed=1)
    assert jax.tree.map(jnp.shape, annealing.dense_shapes(fresh, model)) == jax.tree.map(jnp.shape, params)
    return dense, params, new, annealing.from_dense(params, fresh, model)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.exhaustive if name == "tied keys" else ()) for name in MODELS]
)
def test_at_the_start_the_model_is_the_dense_one(name):
    dense, params, new, start = started(MODELS[name])
    config = config_of(MODELS[name])
    assert annealing.goes_over(DENSE, MODELS[name])
    first = annealing.first_model(new, config)
    opened = annealing.opening(config)(start, jnp.int32(0))
    assert normwise_error(hidden(first, opened), hidden(dense, params)) < 1e-6
    if name == "by default":
        for changed in (hidden(new, opened), hidden(first, start)):  # without the window, and without the gates
            assert normwise_error(changed, hidden(dense, params)) > 1e-3


def test_in_the_middle_the_window_changes_unnoticed_and_at_the_end_nothing_is_added():
    _, _, new, start = started(MODELS["by default"])
    config = config_of(new.config)
    first, opened = annealing.first_model(new, config), annealing.opening(config)
    assert [annealing.in_first_half(step, config) for step in range(1, 11)] == [True] * 5 + [False] * 5
    middle = opened(start, jnp.int32(5))
    assert normwise_error(hidden(first, middle), hidden(new, middle)) < 1e-6
    before = opened(start, jnp.int32(4))
    assert normwise_error(hidden(first, before), hidden(new, before)) > 1e-3
    for step in (10, 11, 1000):
        end = opened(start, jnp.int32(step))
        assert all(np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (end, start)), strict=True))
    gates = jax.nn.sigmoid(start["layers"]["attention"]["gate_out_bias"])
    np.testing.assert_allclose(gates, np.broadcast_to(annealing.GATES, gates.shape), rtol=1e-6)
    assert not start["layers"]["attention"]["gate_out_kernel"].any()


def test_gates_add_up_to_one_and_go_from_stage_to_stage():
    own = np.log(annealing.GATES) - np.log1p(-np.array(annealing.GATES))
    progress = np.linspace(0, 1, 21, dtype=np.float32)
    gates = np.array([jax.nn.sigmoid(own + annealing.gate_shift(jnp.float32(p))) for p in progress])
    np.testing.assert_allclose(gates.sum(axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(gates[::10], annealing.STAGES, atol=1e-6)
    np.testing.assert_allclose(np.diff(gates[:11], 2, axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(np.diff(gates[10:], 2, axis=0), 0, atol=1e-5)
    assert gates[0].tolist() == [gates[0, 0], gates[0, 1], 1.0]


@pytest.mark.parametrize("steps", [50, 100, 200])
def test_half_way_no_gate_is_rounded_to_less_than_zero(steps):
    own = np.log(annealing.GATES) - np.log1p(-np.array(annealing.GATES))
    shift = jax.jit(lambda step: annealing.gate_shift(step / steps))(jnp.int32(steps // 2))
    np.testing.assert_allclose(jax.nn.sigmoid(own + shift), annealing.STAGES[1], atol=1e-6)


@pytest.mark.parametrize(
    ("old", "new", "allowed"),
    [
        ({}, {"attention": "nsa"}, True),
        ({"attention": "window"}, {"pattern": ("nsa", "window")}, True),
        ({}, {"pattern": ("nsa", "window")}, False),
        ({}, {"attention": "min-max"}, False),
        ({}, {}, False),
        ({"attention": "nsa"}, {"attention": "nsa"}, False),
        ({"pattern": ("full", "window")}, {"attention": "nsa"}, False),
    ],
)
def test_full_attention_and_a_window_go_over_to_nsa_and_nothing_else_does(old, new, allowed):
    assert annealing.goes_over(dataclasses.replace(DENSE, **old), dataclasses.replace(DENSE, **new)) == allowed


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> TrainConfig:
    """A run with full attention."""
    folder = tmp_path_factory.mktemp("annealing")
    train_runs.write_corpus(folder / "corpus")
    config = TrainConfig(
        model=dataclasses.replace(SMALL, attention="full"),
        data=DataConfig(path=str(folder / "corpus"), sequence_length=32, batch_size=8),
        optimizer=OptimizerConfig(warmup_steps=0),
        checkpoint=CheckpointConfig(every=3, keep_last=3),
        run_dir=folder / "run",
        steps=3,
        eval_batches=1,
        eval_selection=False,
        position_buckets=0,
        sample_tokens=0,
    )
    save_untrained(config)
    return config


def going_over(base, run_dir, **changes):
    model = dataclasses.replace(base.model, attention="nsa")
    return dataclasses.replace(base, **{"model": model, "init_from": base.run_dir, "run_dir": run_dir, **changes})


def metrics(config):
    return [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_begins_with_the_dense_loss_and_goes_on_over_an_interruption(base, tmp_path):
    saved, batches = load_model(base.run_dir), prepare(base).train_batches
    sums = loss_sums(saved.model, saved.params, jax.tree.map(jnp.asarray, next(batches)))
    whole = going_over(base, tmp_path / "whole", steps=6, anneal_steps=4)
    result = run(prepare(whole), plain=True)
    found = metrics(whole)[1:]
    assert found[0]["loss"] == pytest.approx(float(sums.nll / sums.weight), rel=1e-6)
    assert [entry["annealed"] for entry in found] == [0, 0.25, 0.5, 0.75, 1, 1]
    parts = dataclasses.replace(whole, run_dir=shutil.copytree(whole.run_dir, tmp_path / "parts"))
    shutil.rmtree(parts.run_dir / "checkpoints" / "6")  # as if it had been stopped after step 3
    again = run(prepare(parts), plain=True)
    for x, y in zip(jax.tree.leaves(again.state.params), jax.tree.leaves(result.state.params), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
    assert load_model(whole.run_dir).config.model.nsa == base.model.nsa


@pytest.mark.exhaustive
def test_what_it_starts_from_is_evaluated_as_the_dense_model_and_as_ordinary_nsa(base, tmp_path):
    """Until the last step of the annealing, evaluations tell the loss of the model that is trained, too."""
    starts = {
        "dense": dataclasses.replace(base, init_from=base.run_dir, run_dir=tmp_path / "dense", steps=0),
        "at once": going_over(base, tmp_path / "at_once", steps=0),
        "annealed": going_over(
            base,
            tmp_path / "annealed",
            steps=4,
            anneal_steps=3,
            eval_every=1,
            checkpoint=CheckpointConfig(every=1, keep_last=4),
        ),
    }
    for config in starts.values():
        run(prepare(config), plain=True)
    (dense,), (at_once,), (start, *later) = map(metrics, starts.values())
    assert (dense["step"], at_once["step"], start["step"]) == (0, 0, 0)
    assert start["held_out_loss_as_trained"] == pytest.approx(dense["held_out_loss"], rel=1e-6)
    assert start["held_out_loss"] == pytest.approx(at_once["held_out_loss"], rel=1e-6)
    assert abs(at_once["held_out_loss"] - dense["held_out_loss"]) > 1e-4
    assert "held_out_loss_as_trained" not in dense | at_once
    assert ["held_out_loss_as_trained" in entry for entry in later] == [True, True, False, False]
    # The gates of the step that follows, and its window; see the table of stages.
    saved = load_model(starts["annealed"].run_dir, step=2)
    params = annealing.opening(starts["annealed"])(saved.params, 2)
    sums = [loss_sums(saved.model, params, batch) for batch in prepare(base).held_out]
    expected = sum(float(x.nll) for x in sums) / sum(float(x.weight) for x in sums)
    assert later[1]["held_out_loss_as_trained"] == pytest.approx(expected, rel=1e-6)


def test_parameters_of_the_dense_run_come_with_the_new_runs_sharding(base, tmp_path):
    prepared = prepare(going_over(base, tmp_path / "run", mesh=MeshConfig(data=2, fsdp=2, tensor=1, context=2)))
    shardings = jax.tree.map(lambda x: x.sharding, prepared.abstract_state.params)
    fresh = jax.tree.map(
        lambda x: jax.device_put(jnp.full(x.shape, 0.5, x.dtype), x.sharding), prepared.abstract_state.params
    )
    start = starting_parameters(prepared.config, fresh)
    dense = load_model(base.run_dir).params
    assert jax.tree.map(lambda x: x.sharding, start) == shardings
    for name in ("q_kernel", "k_kernel", "v_kernel", "o_kernel"):
        np.testing.assert_array_equal(start["layers"]["attention"][name], dense["layers"]["attention"][name])
    np.testing.assert_array_equal(start["layers"]["attention"]["gate_in_kernel"], 0.5)
    np.testing.assert_array_equal(start["embedding"], dense["embedding"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"anneal_steps": 4}, "anneal_steps = 4: expected at most steps = 3"),
        ({"anneal_steps": -1}, "anneal_steps = -1: expected at least 0"),
        ({"anneal_steps": 2, "init_from": None}, "anneal_steps = 2: expected init_from, a run with full attention"),
    ],
)
def test_contradictory_settings_are_refused_by_name(base, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        check(going_over(base, tmp_path / "run", **changes))


def test_what_does_not_begin_with_the_dense_model_is_refused(base, tmp_path):
    still_full = going_over(base, tmp_path / "run", model=base.model, anneal_steps=2)
    with pytest.raises(ValueError, match=r"anneal_steps = 2: expected 0, because attention = full of init_from does"):
        prepare(still_full)
    window = dataclasses.replace(base.model, attention="window")
    other = dataclasses.replace(base, model=window, run_dir=tmp_path / "window")
    save_untrained(other)
    config = going_over(other, tmp_path / "run", anneal_steps=2)
    with pytest.raises(ValueError, match=r"anneal_steps = 2: .* window of init_from, 6, is shorter than .* = 32"):
        prepare(config)
    prepare(dataclasses.replace(config, anneal_steps=0)).train_batches.close()
