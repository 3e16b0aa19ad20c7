"""The command line: which command runs, and how it ends."""

import dataclasses
import re
import subprocess
import sys

import pytest
from helpers import train_runs

from train.__main__ import main
from train.commands import COMMANDS
from train.config import from_json
from train.presets import PRESETS, tiny


def test_help_lists_every_command_without_importing_jax():
    program = (
        "import sys; from train.__main__ import main; code = main(['--help']); "
        "assert not {'jax', 'flax', 'orbax', 'grain'} & set(sys.modules); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=train_runs.ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    for name, command in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(command.summary)}$", done.stdout, flags=re.M), name


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_says_what_it_takes(capsys, name):
    with pytest.raises(SystemExit) as exit_:
        main([*name.split(), "--help"])
    assert exit_.value.code == 0
    assert "usage: python -m train" in capsys.readouterr().out


def test_train_is_the_command_where_none_is_named(capsys, tmp_path):
    arguments = ["tiny", "--run-dir", str(tmp_path / "run"), "--data.path", "absent"]
    assert main(arguments) == 2
    without = capsys.readouterr()
    assert main(["train", *arguments]) == 2
    assert capsys.readouterr() == without


def test_an_incomplete_command_is_answered_with_those_that_begin_so(capsys):
    assert main(["benchmark"]) == main(["benchmark", "nothing"]) == 2
    assert main(["benchmark", "--help"]) == 0
    out = capsys.readouterr().out
    assert "benchmark decoding" in out
    assert "positions" not in out


@pytest.mark.parametrize("word", ["huge", "genrate"])
def test_a_word_that_is_neither_command_nor_preset_is_answered_with_all_of_both(capsys, word):
    assert main([word, "--steps", "3"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {word}: expected a command (train, generate, ")
    assert all(name in err for name in (*COMMANDS, *PRESETS))
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["tiny", "--stepz", "3"], "--stepz"),
        (["tiny", "--steps", "many"], "--steps"),
        (["tiny", "--attention", "none"], "--attention"),
        (["train", "huge"], "huge"),
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
