import dataclasses
import re

import pytest
from helpers import train_runs

from nsa_jax import RopeScaling
from train.__main__ import main
from train.config import TrainConfig, from_json
from train.presets import PRESETS, parse, tiny


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


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["tiny", "--stepz", "3"], "--stepz"),
        (["tiny", "--steps", "many"], "--steps"),
        (["tiny", "--attention", "none"], "--attention"),
        (["huge"], "huge"),
    ],
)
def test_unknown_settings_and_values_of_the_wrong_type_are_refused_by_name(capsys, arguments, named):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    captured = capsys.readouterr()
    assert named in captured.out + captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.num-heads", "6", "--model.num-kv-heads", "4"], "model.num_heads = 6: expected a multiple"),
        (["--optimizer.warmup-steps", "9", "--steps", "9"], "optimizer.warmup_steps = 9: expected fewer than"),
        (["--data.sequence-length", "100"], "data.sequence_length = 100: expected a multiple of model.nsa"),
        (["--optimizer.accumulate", "3"], "optimizer.accumulate = 3"),
        (["--mesh.data", "3"], "mesh = (data 3, fsdp 1, expert 1, context 1, tensor 1): expected a product of 8"),
        (["--model.nsa.compress-stride", "7"], "compress_stride = 7"),
        (["--data.tokenizer", "absent.json"], "absent.json"),
        (["--data.path", "absent"], "data.path: absent does not exist"),
    ],
)
def test_contradictory_settings_are_refused_by_name(capsys, tmp_path, arguments, message):
    size = [] if "--mesh.data" in arguments or "--optimizer.accumulate" in arguments else ["--data.batch-size", "8"]
    try:
        code = main(["tiny", "--run-dir", str(tmp_path / "run"), *size, *arguments])
    except SystemExit as exit_:
        code = exit_.code
    assert code == 2
    captured = capsys.readouterr()
    said = " ".join(re.sub(r"[│╭╮╰╯─]", " ", captured.out + captured.err).split())
    assert message in said
    assert not (tmp_path / "run").exists()


def test_the_merged_config_is_printed(capsys, tmp_path):
    main(["tiny", "--seed", "5", "--run-dir", str(tmp_path / "run"), "--data.path", "absent"])
    printed = from_json(capsys.readouterr().out)
    assert printed == dataclasses.replace(
        tiny(), seed=5, run_dir=tmp_path / "run", data=dataclasses.replace(tiny().data, path="absent")
    )


def test_generate_continues_a_prompt_with_the_model_of_a_run(tmp_path, capsys):
    run = ["tiny", "--run-dir", str(tmp_path / "run"), "--steps", "1", "--eval-batches", "1", "--sample-tokens", "0"]
    train_runs.write_corpus(tmp_path / "corpus")
    small = ["--data.path", str(tmp_path / "corpus"), "--data.sequence-length", "64", "--data.batch-size", "8"]
    assert main([*run, *small, "--optimizer.warmup-steps", "0", "--model.num-layers", "1"]) == 0
    capsys.readouterr()
    command = ["generate", "--run", str(tmp_path / "run"), "--prompt", "def ", "--max-tokens", "4", "--num-samples=2"]
    assert main(command) == 0
    lines = capsys.readouterr().out
    assert lines.count("def ") >= 2
    assert main(["generate", "--run", str(tmp_path / "none")]) == 2
    assert "expected the folder of a run" in capsys.readouterr().err
    assert main([*command, "--top-p", "3"]) == 2
    assert "top_p = 3.0" in capsys.readouterr().err
