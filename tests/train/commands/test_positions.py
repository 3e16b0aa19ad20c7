"""Held-out loss by position: the command on a run."""

import dataclasses
import json

import numpy as np
import pytest
from helpers.models import SMALL
from helpers.saved_run import save_untrained

from nsa_jax import RopeScaling
from train.__main__ import main
from train.commands.positions import Arguments, _scaling
from train.commands.report import Arguments as ReportArguments
from train.commands.report import report
from train.config import DataConfig, OptimizerConfig, TrainConfig
from train.presets import tiny

MODEL = dataclasses.replace(SMALL, attention="full")


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
    lines = [f"{name}={tmp_path / name}.json" for name in ("plain", "yarn")]
    assert main(["report", str(tmp_path / "lines.png"), *lines]) == 0
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
        report(ReportArguments(tmp_path / "lines.png", (f"a={tmp_path / 'other.json'}",)))
