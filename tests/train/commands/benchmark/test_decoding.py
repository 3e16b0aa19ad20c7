"""The benchmark of decoding on a model small enough for a CPU."""

import dataclasses
import json

import pytest

from train.commands.benchmark import decoding
from train.presets import PRESETS


@pytest.fixture
def small(monkeypatch):
    """A preset of one layer."""
    tiny = PRESETS["tiny"]()
    one_layer = dataclasses.replace(tiny, model=dataclasses.replace(tiny.model, num_layers=1))
    monkeypatch.setitem(PRESETS, "small", lambda: one_layer)
    return "small"


@pytest.mark.exhaustive
def test_decoding_writes_a_row_for_each_attention_and_batch(tmp_path, small):
    out = tmp_path / "speed.json"
    decoding.benchmark(decoding.Arguments(preset=small, context=128, batches=(1, 2), steps=2, out=out))
    rows = json.loads(out.read_text())["rows"]
    assert [(r["attention"], r["batch"]) for r in rows] == [("nsa", 1), ("nsa", 2), ("full", 1), ("full", 2)]
    for row in rows:
        assert 0 < row["lowest"] <= row["tokens_per_second"] <= row["highest"]
    assert rows[1]["cache_gib"] == pytest.approx(2 * rows[0]["cache_gib"], rel=0.01)
