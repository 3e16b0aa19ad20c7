"""The command that compares a model with transformers, up to where it needs them."""

import hashlib
import sys

import pytest
from helpers.pretrained import MODELS, expected

from train.__main__ import main
from train.commands import compare as command


def sha256(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_what_is_not_installed_is_named_with_its_extra(monkeypatch, capsys):
    def missing(*arguments):
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr(command, "_theirs", missing)
    arguments = ["compare", str(MODELS / "qwen2"), "--tokens", "8", "--prompt", "4"]
    assert main(arguments) == 2
    assert capsys.readouterr().err == 'error: torch is not installed: pip install -e ".[transformers]"\n'
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert main(arguments) == 2
    assert capsys.readouterr().err == 'error: safetensors is not installed: pip install -e ".[pretrained]"\n'


def test_the_comparison_is_that_of_the_files_numbers(tmp_path, monkeypatch, capsys):
    """Against what transformers gave for the tiny model, with which other logits and another token are compared."""
    wanted = expected("qwen2")
    monkeypatch.setattr(command, "held_out_tokens", lambda corpus, tokenizer, most: wanted["tokens"][0][:most])
    monkeypatch.setattr(command.importlib.metadata, "version", lambda name: "1")
    logits, found = wanted["logits"], []
    for changed in (logits, logits * 1.01):
        choice = [int(changed[0, -1].argmax())]
        theirs = (changed, choice if changed is logits else [choice[0] + 1])
        monkeypatch.setattr(command, "_theirs", lambda *arguments, theirs=theirs: theirs)
        monkeypatch.setattr(command, "_their_tokens", lambda source, text: [1])
        out = tmp_path / "out.json"
        options = ["--tokens", "32", "--prompt", "32", "--continuation", "1", "--out", str(out)]
        assert main(["compare", str(MODELS / "qwen2"), *options]) == 0
        found.append(command.json.loads(out.read_text()))
    same, other = found
    assert same["relative_error"] < 1e-5
    assert same["same_continuation"]
    assert other["relative_error"] == pytest.approx(0.01 / 1.01, rel=1e-3)
    assert other["normwise_error"] == pytest.approx(0.01 / 1.01, rel=1e-3)
    assert not other["same_continuation"]
    assert not other["same_tokens"]
    assert same["model"]["family"] == "qwen2"
    assert same["model"]["sha256"] == {file.name: sha256(file) for file in (MODELS / "qwen2").iterdir()}
    assert main(["compare", str(MODELS / "qwen2"), "--tokens", "0"]) == 2
    assert "tokens = 0: expected at least 1" in capsys.readouterr().err


def test_a_file_is_known_by_its_own_sha256(tmp_path):
    (tmp_path / "inside").mkdir()
    file = tmp_path / "model.gguf"
    file.write_bytes(b"abc")
    # FIPS 180-2, appendix B.1
    assert command._digest(file) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert command._digest(tmp_path) == {"model.gguf": command._digest(file)}
