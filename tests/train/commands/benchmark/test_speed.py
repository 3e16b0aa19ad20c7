"""The benchmark of training on a model small enough for a CPU."""

import dataclasses
import json

import pytest
import tokenizers

from train.__main__ import main
from train.commands.benchmark import speed
from train.config import MeshConfig, to_json
from train.presets import PRESETS, named


@pytest.fixture
def small(monkeypatch):
    """A preset of one layer."""
    tiny = PRESETS["tiny"]()
    one_layer = dataclasses.replace(tiny, model=dataclasses.replace(tiny.model, num_layers=1))
    monkeypatch.setitem(PRESETS, "small", lambda: one_layer)
    return "small"


@pytest.mark.exhaustive
def test_writes_a_row_for_each_attention_and_length(tmp_path, small):
    out = tmp_path / "speed.json"
    speed.benchmark(speed.Arguments(preset=small, lengths=(64, 128), tokens_per_device=128, steps=1, out=out))
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


@pytest.mark.exhaustive
def test_a_run_is_measured_with_the_vocabulary_of_its_tokenizer(tmp_path, small):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "</s>": 1000}, unk_token="a"))
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    data = dataclasses.replace(named(small).data, tokenizer="/elsewhere/tokenizer.json")
    (tmp_path / "config.json").write_text(to_json(dataclasses.replace(named(small), data=data)))
    rows = []
    for preset in (small, str(tmp_path)):
        out = tmp_path / "speed.json"
        arguments = {"attentions": ("full",), "lengths": (64,), "tokens_per_device": 64, "steps": 1, "out": out}
        speed.benchmark(speed.Arguments(preset=preset, **arguments))
        rows += json.loads(out.read_text())["rows"]
    more = (1024 - 320) * named(small).model.embed_dim  # 1001 and 258 tokens, each up to a multiple of 64
    assert rows[1]["parameters"] == rows[0]["parameters"] + more


def test_a_length_that_does_not_divide_the_step_is_refused():
    config = dataclasses.replace(PRESETS["tiny"](), mesh=MeshConfig(data=1))
    with pytest.raises(ValueError, match="lengths: 100: expected a divisor of 128, the tokens of a step"):
        speed.measure(config, (100,), 128, 1)


@pytest.mark.parametrize("kind", ["speed", "decoding"])
def test_an_unknown_preset_is_refused(capsys, kind):
    assert main(["benchmark", kind, "--preset", "nothing"]) == 2
    assert "preset = 'nothing': expected one of" in capsys.readouterr().err


def test_a_mesh_is_told_by_its_axes():
    assert speed.parse_mesh("fsdp=2,context=4") == MeshConfig(data=1, fsdp=2, context=4)


@pytest.mark.parametrize("text", ["fsdp", "fsdp=0", "rows=2", "fsdp=2;context=2", ""])
def test_what_is_no_mesh_is_refused(text):
    with pytest.raises(ValueError, match="expected AXIS=SIZE"):
        speed.parse_mesh(text)


def test_more_devices_than_there_are_are_refused():
    config = dataclasses.replace(PRESETS["tiny"](), mesh=speed.parse_mesh("fsdp=64"))
    with pytest.raises(ValueError, match="expected at most 8 devices"):
        speed.measure(config, (64,), 64, 1)


@pytest.mark.exhaustive
def test_what_devices_receive_is_counted_and_predicted():
    tiny = PRESETS["tiny"]()
    small = dataclasses.replace(tiny.model, num_layers=1, attention="full", dtype="float32")
    config = dataclasses.replace(tiny, model=small, mesh=speed.parse_mesh("fsdp=2"))
    (row,) = speed.measure(config, (64,), 64, 1)
    assert (row["rows"], row["devices"], row["mesh"]) == (2, 2, {"fsdp": 2})
    assert sum(row["received_bytes"].values()) == pytest.approx(sum(row["predicted_bytes"].values()), rel=0.05)
