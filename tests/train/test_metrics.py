"""What a log holds."""

import sys

import pytest

from train.config import TrainConfig
from train.metrics import MetricsLog, read_metrics


def test_a_resumed_log_holds_every_step_once(tmp_path):
    config = TrainConfig(run_dir=tmp_path)
    log = MetricsLog(config, first_step=1)
    for step in (1, 2, 3, 4):
        log.write(step, {"loss": float(step)})
    log.close()
    with log.path.open("a") as file:
        file.write('{"step": 5, "lo')  # killed while writing
    assert [entry["step"] for entry in read_metrics(log.path)] == [1, 2, 3, 4]
    log = MetricsLog(config, first_step=3)
    log.write(3, {"loss": 30.0})
    log.close()
    assert read_metrics(log.path) == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 2.0},
        {"step": 3, "loss": 30.0},
    ]


@pytest.mark.parametrize(
    ("module", "changes", "extra"),
    [("tensorboard.summary", {"tensorboard": True}, "tensorboard"), ("wandb", {"wandb": "project"}, "wandb")],
)
def test_a_missing_extra_is_named(tmp_path, monkeypatch, module, changes, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"install nsa-jax\[{extra}\]"):
        MetricsLog(TrainConfig(run_dir=tmp_path, **changes), first_step=1)
