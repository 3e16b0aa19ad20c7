"""The command that learns a tokenizer, and what the data's arguments may be."""

import json

import pytest
import tokenizers
from helpers.corpora import write_texts

from train.__main__ import main
from train.data.tokenizer import load_tokenizer


def test_a_tokenizer_is_learnt_from_the_documents_and_the_skipped_are_named(tmp_path, capsys):
    corpus, output = tmp_path / "corpus", tmp_path / "new" / "tokenizer.json"
    corpus.mkdir()
    write_texts(corpus, [f"word word {i}" for i in range(30)])
    (corpus / "latin.txt").write_bytes(b"\xff")
    command = ["train-tokenizer", "--output", str(output), "--data.path", str(corpus), "--vocab-size", "262"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "1 skipped\n" in printed
    assert f"skipped {corpus / 'latin.txt'}: not UTF-8 at byte 0" in printed
    assert load_tokenizer(str(output)).vocab_size == 262
    assert {"word", "Ġword"} & tokenizers.Tokenizer.from_file(str(output)).get_vocab().keys()
    assert not list(output.parent.glob("*.tmp"))


def test_of_conversations_a_tokenizer_learns_what_is_said_and_not_the_records(tmp_path):
    path, output = tmp_path / "chat.jsonl", tmp_path / "tokenizer.json"
    talks = [[{"role": "user", "content": f"{i} zz"}, {"role": "assistant", "content": "zz zz"}] for i in range(40)]
    path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    command = ["train-tokenizer", "--output", str(output), "--data.path", str(path), "--data.format", "chat"]
    assert main([*command, "--vocab-size", "300"]) == 0
    learnt = tokenizers.Tokenizer.from_file(str(output)).get_vocab().keys()
    assert "zz" in learnt
    assert not [token for token in learnt if "user" in token or '"' in token[1:]]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--data.path", ""], "data.path = '': expected a file, a folder or a glob"),
        (["--data.path", "nowhere"], "data.path: nowhere does not exist; expected a file, a folder or a glob"),
        (["--data.path", "~nobody_at_all"], "data.path = ~nobody_at_all: "),
        (["--data.path", "x" * 5000], "data.path = xxx"),
        (["--data.suffix", ".nothing"], "data.path: no file whose name ends in '.nothing' in "),
        (["--data.format", "chat"], "data.path: no documents in "),
        (["--data.held-out-fraction", "1.5"], "data.held_out_fraction must lie between 0 and 1, got 1.5"),
        (["--data.held-out-fraction", "nan"], "data.held_out_fraction must lie between 0 and 1, got nan"),
        (["--data.seed", "-1"], "data.seed must be in [0, 2**32), got -1"),
        (["--output", "."], "output = .: expected a file, and this is a folder"),
        (["--output", "0.txt/tokenizer.json"], "output = 0.txt/tokenizer.json: cannot be written: "),
        (["--max-bytes", "0"], "max_bytes = 0: expected at least 1"),
        (["--vocab-size", "257"], "vocab_size = 257: expected at least 258"),
    ],
)
def test_wrong_arguments_are_refused_by_name_in_one_line(tmp_path, monkeypatch, capsys, wrong, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "0.txt").write_text("text")
    (tmp_path / "1.txt").write_text("texts")
    command = ["train-tokenizer", "--output", "tokenizer.json", "--data.path", ".", *wrong]
    assert main(command) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {message}")
    assert printed.count("\n") == 1
    assert not (tmp_path / "tokenizer.json").exists()


@pytest.mark.parametrize("wrong", [["--data.format", "csv"], ["--vocab-size", "many"], ["--data.nothing", "1"]])
def test_flags_of_the_wrong_kind_end_with_code_2(wrong, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train-tokenizer", "--output", "tokenizer.json", *wrong])
    assert stop.value.code == 2
    assert wrong[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--data.path", "nowhere"], "data.path: nowhere does not exist"),
        (["--data.tokenizer", "~nobody_at_all/t.json"], "data.tokenizer: cannot read ~nobody_at_all/t.json"),
        (["--data.tokenizer", "x" * 5000], "data.tokenizer: cannot read xxx"),
        (["--data.workers", "-1"], "data.workers must be at least 0, got -1"),
        (["--data.batch-size", "0"], "data.batch_size = 0: expected at least 1"),
        (["--data.chat-end", ""], "data.chat_end = '': expected some text"),
    ],
)
def test_the_datas_settings_of_a_run_are_refused_by_name_before_it_starts(
    tmp_path, monkeypatch, capsys, wrong, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus").mkdir()
    write_texts(tmp_path / "corpus", ["text", "texts"])
    assert main(["tiny", "--data.path", "corpus", "--data.batch-size", "8", "--run-dir", "run", *wrong]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {message}")
    assert printed.count("\n") == 1
    assert not (tmp_path / "run").exists()
