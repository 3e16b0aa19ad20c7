"""Starting a run from another one's parameters."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
from helpers.saved_run import save_untrained

from nsa_jax import NSAConfig, RopeScaling
from train.checkpoints.saved import load_model, starting_parameters
from train.config import CheckpointConfig, DataConfig, MeshConfig, ModelConfig, OptimizerConfig, TrainConfig
from train.config import check as check_config
from train.loop import run
from train.prepare import prepare


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> TrainConfig:
    """A run of three checkpoints."""
    folder = tmp_path_factory.mktemp("base")
    (folder / "corpus").mkdir()
    draw = np.random.default_rng(0)
    for i in range(40):
        text = draw.integers(97, 123, draw.integers(20, 80)).astype(np.uint8).tobytes()
        (folder / "corpus" / f"{i}.txt").write_bytes(text)
    config = TrainConfig(
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
        data=DataConfig(path=str(folder / "corpus"), sequence_length=32, batch_size=8),
        optimizer=OptimizerConfig(warmup_steps=0),
        checkpoint=CheckpointConfig(every=1, keep_last=3),
        mesh=MeshConfig(data=4, fsdp=2),
        run_dir=folder / "run",
        steps=3,
        eval_batches=1,
        position_buckets=0,
        sample_tokens=0,
    )
    save_untrained(config, steps=(1, 2, 3))
    return config


def train(config):
    return run(prepare(config), plain=True)


def continued(base, run_dir, **changes):
    """A run that starts from `base`, with twice the context on another mesh, whose steps change nothing."""
    model = dataclasses.replace(
        base.model, rope_scaling=RopeScaling("yarn", 2, 32), remat="full", implementation="reference"
    )
    return dataclasses.replace(
        base,
        model=model,
        data=dataclasses.replace(base.data, sequence_length=64, seed=7),
        optimizer=OptimizerConfig(learning_rate=1e-30, warmup_steps=0),
        mesh=MeshConfig(data=2, fsdp=4),
        init_from=base.run_dir,
        run_dir=run_dir,
        steps=1,
        **changes,
    )


def assert_same_bits(actual, expected):
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_a_run_starts_from_anothers_parameters_at_step_0_and_reads_them_only_once(base, tmp_path, capsys):
    source = tmp_path / "source"
    shutil.copytree(base.run_dir, source)
    config = dataclasses.replace(continued(base, tmp_path / "run"), init_from=source)
    state = train(config).state
    assert f"starting from the parameters of {source}" in capsys.readouterr().out
    assert_same_bits(state.params, load_model(base.run_dir).params)
    assert int(state.step) == 1
    assert {int(x) for x in jax.tree.leaves(state.opt_state) if x.ndim == 0} == {1}  # the optimiser's counts
    shutil.rmtree(source)
    state = train(config).state
    output = capsys.readouterr().out
    assert "resuming after step 1" in output
    assert "starting from" not in output
    assert int(state.step) == 1


def test_a_step_can_be_named_and_parameters_come_with_the_new_runs_sharding(base, tmp_path):
    config = continued(base, tmp_path / "run", init_step=1)
    abstract = prepare(config).abstract_state.params
    first = starting_parameters(config, abstract)
    assert_same_bits(first, load_model(base.run_dir, step=1).params)
    assert jax.tree.map(lambda x: x.sharding, first) == jax.tree.map(lambda x: x.sharding, abstract)
    assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(first))
    newest = starting_parameters(dataclasses.replace(config, init_step=None), abstract)
    assert not np.array_equal(first["embedding"], newest["embedding"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"mlp_dim": 32, "num_layers": 2}}, r"num_layers was 1, is 2; model.mlp_dim was 16, is 32"),
        ({"model": {"attention": "window"}}, r"holds another model: model.attention was 'full', is 'window'"),
        ({"data": {"tokenizer": "TOKENIZER"}}, r"another model: the size of the vocabulary was 258, is \d+"),
        ({"init_step": 9}, r"init_step = 9: expected the step of a checkpoint in .*checkpoints"),
        ({"init_from": "EMPTY"}, r"init_from = .*empty: expected the folder of a run"),
        ({"init_from": "UNSAVED"}, r"init_from = .*unsaved: expected a run with a checkpoint, found none"),
    ],
)
def test_what_cannot_be_started_from_is_refused_by_name_and_leaves_no_run(base, tmp_path, change, message):
    (tmp_path / "unsaved").mkdir()
    shutil.copy(base.run_dir / "config.json", tmp_path / "unsaved")
    change = {name: tmp_path / value.lower() if name == "init_from" else value for name, value in change.items()}
    config = continued(base, tmp_path / "run")
    for name, value in change.items():
        if isinstance(value, dict):
            if "tokenizer" in value:
                value = {"tokenizer": save_tokenizer(tmp_path / "tokenizer.json")}
            value = dataclasses.replace(getattr(config, name), **value)
        config = dataclasses.replace(config, **{name: value})
    with pytest.raises(ValueError, match=message):
        prepare(config)
    assert not config.run_dir.exists()


def save_tokenizer(path):
    import tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(path))
    return str(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_from": TrainConfig().run_dir}, r"init_from = runs/tiny: expected another folder than run_dir"),
        ({"init_step": 3}, r"init_step = 3: expected init_from"),
    ],
)
def test_contradictory_settings_of_the_start_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        check_config(dataclasses.replace(TrainConfig(), **changes))
