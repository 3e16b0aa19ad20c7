"""Presets, and what flags make of them."""

import dataclasses
import re
from pathlib import Path

import pytest

from nsa_jax import RopeScaling
from train import presets
from train.__main__ import main
from train.config import TrainConfig, check, from_json, to_json
from train.presets import PRESETS, parse, tiny


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_sound_and_survive_being_written_and_read(name):
    config = PRESETS[name]()
    check(config)
    assert from_json(to_json(config)) == config
    assert config.run_dir == Path("runs") / name


def field_names(kind: type, prefix: str = ""):
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(field.type):
            yield from field_names(field.type, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


def test_help_lists_every_preset_and_every_field_with_its_comment(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as exit_:
        parse(["--help"])
    assert exit_.value.code == 0
    text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    for name in PRESETS:
        assert name in text
    names = list(field_names(TrainConfig))
    assert "model.nsa.window" in names
    for name in names:
        assert re.search(rf"--{re.escape(name.replace('_', '-'))}\b", text), name
    for comment in (
        "rows per optimiser step over all hosts",  # beside the field
        "The one flag that comparisons change",  # above the field
        "tokens that one compressed token stands for",  # of the library's config
        "steps between checkpoints",
    ):
        assert comment.lower() in text.lower(), comment


def test_a_preset_is_changed_by_its_flags_and_nothing_else():
    assert parse(["tiny"]) == tiny()
    experts = dataclasses.replace(
        tiny().model, moe=dataclasses.replace(tiny().model.moe, num_routed=6, score="sigmoid")
    )
    flags = ["--model.moe.num-routed", "6", "--model.moe.score", "sigmoid"]
    assert parse(["tiny", *flags]) == dataclasses.replace(tiny(), model=experts)
    expected = dataclasses.replace(
        tiny(), steps=7, model=dataclasses.replace(tiny().model, attention="full", num_layers=3)
    )
    assert parse(["tiny", "--steps", "7", "--attention", "full", "--model.num-layers", "3"]) == expected
    assert parse(["tiny", "--steps", "7", "--model.attention", "full", "--model.num_layers", "3"]) == expected


def test_every_field_of_the_rope_scaling_is_set_by_a_flag():
    flags = {"kind": "yarn", "factor": "4", "original-length": "1024", "beta-fast": "16", "beta-slow": "2"}
    arguments = [part for name, value in flags.items() for part in (f"--model.rope-scaling.{name}", value)]
    assert parse(["tiny", *arguments]).model.rope_scaling == RopeScaling("yarn", 4, 1024, 16, 2)


def test_a_new_preset_is_one_function(monkeypatch):
    monkeypatch.setattr(presets, "PRESETS", dict(PRESETS))

    @presets.preset
    def tiny_full():
        """`tiny` with full attention."""
        return dataclasses.replace(tiny(), model=dataclasses.replace(tiny().model, attention="full"))

    assert parse(["tiny-full", "--steps", "30"]) == dataclasses.replace(tiny_full(), steps=30)
    assert presets.named("tiny-full") == tiny_full()


def test_the_folder_of_a_run_stands_for_its_settings_and_parameters(tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    saved = dataclasses.replace(
        tiny(), steps=7, data=dataclasses.replace(tiny().data, tokenizer="/elsewhere/tokenizer.json")
    )
    (run / "config.json").write_text(to_json(saved))
    expected = dataclasses.replace(saved, init_from=run, run_dir=tmp_path / "new", seed=3)
    flags = ["--run-dir", str(tmp_path / "new"), "--seed", "3"]
    assert parse([str(run), *flags]) == expected
    (run / "tokenizer.json").write_text("{}")
    data = dataclasses.replace(saved.data, tokenizer=str(run / "tokenizer.json"))
    assert parse([str(run), *flags]) == dataclasses.replace(expected, data=data)
    assert main([str(run)]) == 2
    assert f"init_from = {run}: expected another folder than run_dir" in capsys.readouterr().err
    (run / "config.json").write_text('{"model_type": "llama"}')
    assert main([str(run)]) == 2
    assert "unknown setting model_type" in capsys.readouterr().err
