"""Run folders: one process at a time, and everything that belongs to the run inside, wherever the folder lies."""

import dataclasses
import json
import os
import platform
import resource
import shutil

import pytest
import tokenizers

from train.__main__ import main
from train.commands.train import train
from train.config import DataConfig, OptimizerConfig, TrainConfig, to_json
from train.prepare import prepare
from train.run_folder import InUseError, describe, load_run_tokenizer, locked, read_config, read_facts, write


def test_a_second_process_is_told_which_is_there_and_since_when(tmp_path):
    with locked(tmp_path / "run") as left:
        assert left is None
        since = json.loads((tmp_path / "run" / "lock.json").read_text())["since"]
        with pytest.raises(InUseError) as caught, locked(tmp_path / "run"):
            pass
        assert f"run is in use by process {os.getpid()} on {platform.node()} since {since}" in str(caught.value)
    with locked(tmp_path / "run") as left:
        assert left is None


def test_what_a_killed_process_left_does_not_block_and_is_said(tmp_path):
    (tmp_path / "lock").touch()
    (tmp_path / "lock.json").write_text('{"process": 12, "host": "far", "since": "2026-01-01 00:00:00 +0000"}')
    with locked(tmp_path) as left:
        assert left == "process 12 on far since 2026-01-01 00:00:00 +0000"
    (tmp_path / "lock.json").write_text("")
    with locked(tmp_path) as left:
        assert left == "a process that does not say which"
    assert not (tmp_path / "lock.json").exists()


def test_a_run_in_a_folder_in_use_fails_with_one_line_and_changes_nothing(described, capsys):
    before = sorted(path.name for path in described.run_dir.iterdir())
    with locked(described.run_dir):
        assert train(described) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"error: run_dir = {described.run_dir} is in use by process {os.getpid()} on ")
    assert err.count("\n") == 1
    assert sorted(path.name for path in described.run_dir.iterdir()) == sorted([*before, "lock"])


BROKEN = {"empty": "", "cut": '{"steps": 3', "a list": "[1, 2]", "a word": '"steps"', "unknown": '{"stepz": 3}'}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN)
def test_settings_that_cannot_be_read_are_named_with_their_file(tmp_path, text, capsys):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"run = .*: expected .*config.json as a run wrote it, but "):
        read_config(tmp_path)
    assert main(["generate", "--run", str(tmp_path)]) == 2
    (tmp_path / "config.json").write_text(to_json(TrainConfig()))
    (tmp_path / "facts.json").write_text(text or "{")
    if text != BROKEN["unknown"]:
        with pytest.raises(ValueError, match=r"run = .*: expected .*facts.json as a run wrote it, but "):
            read_facts(tmp_path)
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("run_dir", ["file", "file/below"])
def test_a_file_where_the_folder_should_be_is_named(tmp_path, run_dir):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"run_dir = .*: expected a folder, or none yet, but .*file is a file"):
        prepare(TrainConfig(run_dir=tmp_path / run_dir))


def test_a_file_that_does_not_fit_on_the_disk_is_named_and_what_was_there_remains(tmp_path):
    write(tmp_path / "facts.json", "before")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: '.*facts.json'"):
            write(tmp_path / "facts.json", "much too long for it")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "facts.json").read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["facts.json"]


def save_tokenizer(path, first, second):
    """A tokenizer of three tokens, of which two are in the given order."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({first: 0, second: 1, "</s>": 2}, unk_token="a"))
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(path))


@pytest.fixture
def described(tmp_path, monkeypatch) -> TrainConfig:
    """What a run says of itself, in `tmp_path / "run"`; its paths are relative to `tmp_path`."""
    monkeypatch.chdir(tmp_path)
    save_tokenizer("tokenizer.json", "a", "b")
    os.mkdir("data")
    for i in range(8):
        with open(f"data/{i}.txt", "w") as file:
            file.write("a b " * i + "a")
    config = TrainConfig(data=DataConfig("data", tokenizer="tokenizer.json"), optimizer=OptimizerConfig(warmup_steps=0))
    config = dataclasses.replace(config, run_dir=tmp_path / "run", eval_batches=1)
    prepared = prepare(config)
    config.run_dir.mkdir()
    describe(config, prepared.facts)
    return config


def test_a_copied_folder_stands_alone_in_any_working_directory(described, tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    config = read_config(described.run_dir)
    assert config.data.path == str(tmp_path / "data")
    copy = shutil.copytree(described.run_dir, tmp_path / "elsewhere" / "copy")
    shutil.rmtree(described.run_dir)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "data").rename(tmp_path / "elsewhere" / "data")
    assert load_run_tokenizer(copy, config).encode("a").tolist() == [0]
    monkeypatch.chdir(tmp_path / "elsewhere")
    moved = dataclasses.replace(described.data, path="data")
    prepared = prepare(dataclasses.replace(described, data=moved, run_dir=copy))  # goes on, with the tokenizer inside
    assert prepared.tokenizer.encode("b").tolist() == [1]
    with open("data/8.txt", "w") as file:
        file.write("more")
    with pytest.raises(ValueError, match="data_fingerprint was"):
        prepare(dataclasses.replace(described, data=moved, run_dir=copy))


def test_another_tokenizer_of_the_same_size_is_refused_and_the_same_in_another_file_is_not(described, tmp_path):
    shutil.copy("tokenizer.json", "same.json")
    save_tokenizer("tokenizer.json", "b", "a")
    with pytest.raises(ValueError, match=r"run_dir = .*run holds a run with other settings: tokenizer was '.*', is '"):
        prepare(described)
    prepare(dataclasses.replace(described, data=dataclasses.replace(described.data, tokenizer="same.json")))
    fresh = dataclasses.replace(described, run_dir=tmp_path / "fresh", init_from=described.run_dir)
    with pytest.raises(ValueError, match=r"init_from = .*run holds another model: the tokenizer \(SHA-256\) was"):
        prepare(fresh)
    shutil.copy("tokenizer.json", described.run_dir)
    with pytest.raises(ValueError, match=r"tokenizer.json: expected the tokenizer that .*run was trained with"):
        load_run_tokenizer(described.run_dir, described)
