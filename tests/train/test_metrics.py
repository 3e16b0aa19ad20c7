"""What a log holds."""

import resource
import sys
import types

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


def test_no_log_yet_is_an_empty_one(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_services_get_every_value_with_its_step_and_are_closed(tmp_path, monkeypatch):
    calls = []

    class Writer:
        def __init__(self, folder):
            calls.append(("writer", folder))

        def add_scalar(self, name, value, step):
            calls.append((name, value, step))

        def close(self):
            calls.append("closed")

    class Run:
        def log(self, values, step):
            calls.append((values, step))

        def finish(self):
            calls.append("finished")

    wandb = types.ModuleType("wandb")
    wandb.init = lambda **options: calls.append(options) or Run()
    summary = types.ModuleType("tensorboard.summary")
    summary.Writer = Writer
    monkeypatch.setitem(sys.modules, "tensorboard.summary", summary)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    config = TrainConfig(run_dir=tmp_path / "mine", tensorboard=True, wandb="project")
    silent = MetricsLog(config, first_step=1, silent=True)  # what the other processes of a run have
    silent.write(1, {"loss": 2.0})
    silent.close()
    assert not calls
    assert not silent.path.exists()
    config.run_dir.mkdir()
    log = MetricsLog(config, first_step=1)
    log.write(7, {"loss": 2.0, "speed": 3.0})
    log.close()
    assert read_metrics(log.path) == [{"step": 7, "loss": 2.0, "speed": 3.0}]
    assert calls == [
        ("writer", str(config.run_dir / "tensorboard")),
        {"project": "project", "name": "mine", "id": "mine", "resume": "allow"},
        ("loss", 2.0, 7),
        ("speed", 3.0, 7),
        ({"loss": 2.0, "speed": 3.0}, 7),
        "closed",
        "finished",
    ]


def test_a_line_that_is_no_json_is_passed_over_and_said(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\x00\xff\n[2]\n{"loss": 3.0}\n{"step": 2, "loss": 1.0}\n')
    assert read_metrics(path) == [{"step": 1}, {"step": 2, "loss": 1.0}]
    assert [record.args[1] for record in caplog.records] == [2, 3, 4]


def test_lines_that_the_disk_has_no_room_for_wait_until_it_has(tmp_path, caplog):
    log = MetricsLog(TrainConfig(run_dir=tmp_path), first_step=1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, limits[1]))
    try:
        for step in (1, 2, 3, 4):
            log.write(step, {"loss": float(step)})
        assert [entry["step"] for entry in read_metrics(log.path)] == [1, 2]
        assert caplog.text.count("File too large; its lines wait in memory") == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    log.write(5, {"loss": 5.0})
    assert read_metrics(log.path) == [{"step": step, "loss": float(step)} for step in (1, 2, 3, 4, 5)]
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, limits[1]))
    try:
        log.write(6, {"loss": 6.0})
        log.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"{log.path} lacks its last 1 lines" in caplog.text


@pytest.mark.parametrize(
    ("module", "changes", "extra"),
    [("tensorboard.summary", {"tensorboard": True}, "tensorboard"), ("wandb", {"wandb": "project"}, "wandb")],
)
def test_a_missing_extra_is_named(tmp_path, monkeypatch, module, changes, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"install nsa-jax\[{extra}\]"):
        MetricsLog(TrainConfig(run_dir=tmp_path, **changes), first_step=1)
