"""What a config holds, what it refuses, and how it is written and read."""

import dataclasses
import json
from pathlib import Path

import pytest

from nsa_jax import NSAConfig
from train.config import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    TrainConfig,
    check,
    differences,
    from_json,
    to_json,
)


def test_a_run_that_was_saved_before_a_setting_existed_has_its_default():
    config = dataclasses.replace(TrainConfig(), init_from=Path("runs/other"))
    assert from_json(to_json(config)) == config
    saved = json.loads(to_json(TrainConfig(steps=7)))
    for name in ("init_from", "init_step", "position_buckets"):
        del saved[name]
    del saved["model"]["rope_scaling"]
    for name in ("chat_start", "chat_end"):
        del saved["data"][name]
    assert from_json(json.dumps(saved)) == TrainConfig(steps=7)


def test_differences_are_named_with_both_values():
    old = TrainConfig()
    new = dataclasses.replace(
        old, steps=7, model=dataclasses.replace(old.model, nsa=dataclasses.replace(old.model.nsa, window=9))
    )
    assert list(differences(old, new)) == [("model.nsa.window", old.model.nsa.window, 9), ("steps", old.steps, 7)]


def test_a_setting_that_is_not_known_is_refused_by_name():
    with pytest.raises(ValueError, match=r"unknown setting model\.nsa\.windows"):
        from_json('{"model": {"nsa": {"windows": 3}}}')


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": ModelConfig(num_heads=6, num_kv_heads=4)}, r"model.num_heads = 6: .* model.num_kv_heads = 4"),
        ({"model": ModelConfig(embedding_init=0.0)}, r"model.embedding_init = 0.0: expected a positive number"),
        ({"optimizer": OptimizerConfig(decay_fraction=1.5)}, r"optimizer.decay_fraction = 1.5: .*from 0 to 1"),
        ({"sample_prompt": "caf\udce9"}, r"sample_prompt = 'caf.udce9': expected text that UTF-8 can hold"),
        ({"model": ModelConfig(head_dim=7)}, r"model.head_dim = 7: expected an even number"),
        ({"model": ModelConfig(num_layers=0)}, r"model.num_layers = 0: expected at least 1"),
        (
            {"model": ModelConfig(nsa=NSAConfig(select_block=48)), "data": DataConfig(sequence_length=64)},
            r"data.sequence_length = 64: .*model.nsa.select_block = 48.*data.isolate_documents",
        ),
        ({"model": ModelConfig(moe=MoEConfig(num_routed=4, top_k=5))}, r"model.moe.top_k = 5: .*num_routed = 4"),
        ({"model": ModelConfig(moe=MoEConfig(num_routed=4, top_k=0))}, r"model.moe.top_k = 0: expected at least 1"),
        (
            {"model": ModelConfig(num_layers=3, moe=MoEConfig(num_routed=4, first_dense=3))},
            r"model.moe.first_dense = 3: .*model.num_layers = 3",
        ),
        ({"model": ModelConfig(moe=MoEConfig(num_shared=1))}, r"num_routed = 0 with .*num_shared = 1"),
        ({"model": ModelConfig(moe=MoEConfig(bias_speed=-1.0))}, r"model.moe.bias_speed = -1.0: expected at least 0"),
        ({"model": ModelConfig(moe=MoEConfig(routed_scaling=0.0))}, r"model.moe.routed_scaling = 0.0: .*positive"),
        ({"model": ModelConfig(selection_loss=-0.1)}, r"model.selection_loss = -0.1: expected at least 0"),
        (
            {"model": ModelConfig(selection_loss=0.1, pattern=("full", "min-max"), num_layers=2)},
            r"model.selection_loss = 0.1: expected 0 with model.attention = full\+min-max",
        ),
        (
            {"model": ModelConfig(selection_loss=0.1, nsa=NSAConfig(num_selected=0))},
            r"model.selection_loss = 0.1: expected 0 with model.nsa.num_selected = 0",
        ),
        (
            {"model": ModelConfig(selection_loss=0.1, selection_loss_queries=600)},
            r"model.selection_loss_queries = 600: expected at most data.sequence_length = 512",
        ),
        ({"optimizer": OptimizerConfig(warmup_steps=300)}, r"optimizer.warmup_steps = 300: .*steps = 300"),
        ({"optimizer": OptimizerConfig(accumulate=3)}, r"data.batch_size = 8: .*optimizer.accumulate = 3"),
        ({"optimizer": OptimizerConfig(learning_rate=0.0)}, r"optimizer.learning_rate = 0.0: .*positive"),
        ({"checkpoint": CheckpointConfig(every=0)}, r"checkpoint.every = 0: expected at least 1"),
        ({"steps": -1}, r"steps = -1: expected at least 0"),
    ],
)
def test_contradictions_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        check(dataclasses.replace(TrainConfig(), **changes))


def test_a_config_saved_before_there_were_experts_loads_without_any():
    saved = json.loads(to_json(TrainConfig()))
    del saved["model"]["moe"]
    assert from_json(json.dumps(saved)) == TrainConfig()
    assert TrainConfig().model.moe.num_routed == 0


def test_a_sequence_of_any_length_is_allowed_where_documents_run_into_each_other():
    check(TrainConfig(data=DataConfig(sequence_length=100, isolate_documents=False)))
