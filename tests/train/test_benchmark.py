"""The training benchmark on a model small enough for a CPU."""

import dataclasses
import json

import pytest

from train import benchmark
from train.presets import PRESETS


@pytest.mark.exhaustive
def test_writes_a_row_for_each_attention_and_length(tmp_path, monkeypatch):
    tiny = PRESETS["tiny"]()
    small = dataclasses.replace(tiny, model=dataclasses.replace(tiny.model, num_layers=1))
    monkeypatch.setitem(PRESETS, "small", lambda: small)
    out = tmp_path / "speed.json"
    benchmark.main(benchmark.Arguments(preset="small", lengths=(64, 128), tokens_per_device=128, steps=1, out=out))
    rows = json.loads(out.read_text())["rows"]
    assert [(r["attention"], r["length"], r["rows"]) for r in rows] == [
        ("nsa", 64, 2),
        ("nsa", 128, 1),
        ("full", 64, 2),
        ("full", 128, 1),
    ]
    for row in rows:
        assert 0 < row["lowest"] <= row["tokens_per_second"] <= row["highest"]
        assert 4 < row["loss"] < 8  # ln 258 = 5.55 before training
        assert row["memory_gib"] > 0
    assert rows[0]["parameters"] > rows[2]["parameters"]


def test_a_length_that_does_not_divide_the_step_is_refused():
    with pytest.raises(ValueError, match="lengths: 100: expected a divisor of 128, the tokens of a step"):
        benchmark.measure(PRESETS["tiny"](), (100,), 128, 1)


def test_an_unknown_preset_is_refused():
    with pytest.raises(SystemExit, match="preset = 'nothing': expected one of"):
        benchmark.main(benchmark.Arguments(preset="nothing"))
