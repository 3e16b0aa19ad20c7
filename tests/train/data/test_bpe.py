import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.__main__ import main
from train.data.bpe import train_bpe
from train.data.tokenizer import HuggingFaceTokenizer, load_tokenizer

TEXTS = [b"def add(a, b):\n    return a + b\n" * 5, "Zürich, naïve: 東京\n".encode()]


@pytest.fixture(scope="module")
def tokenizer():
    return HuggingFaceTokenizer(train_bpe(TEXTS, 280), "trained here")


@given(st.text())
def test_every_text_comes_back_and_its_bytes_are_counted(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())


def test_it_has_the_size_asked_for_and_joins_what_is_frequent(tokenizer):
    assert tokenizer.vocab_size == 280
    assert len(tokenizer.encode(TEXTS[0])) < len(TEXTS[0]) / 2
    assert tokenizer.eos_id != tokenizer.pad_id
    assert tokenizer.token_bytes[tokenizer.eos_id] == 0


def test_special_tokens_in_a_text_are_text(tokenizer):
    assert tokenizer.eos_id not in tokenizer.encode("a<|endoftext|>b")


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(ValueError, match="vocab_size = 100: expected at least 258"):
        train_bpe(TEXTS, 100)


def test_one_command_writes_a_file_that_training_reads(tmp_path, capsys):
    folder = tmp_path / "texts"
    folder.mkdir()
    for index in range(20):
        (folder / f"{index}.py").write_text(f"def f{index}(x):\n    return x + {index}\n")
    output = tmp_path / "made" / "bpe.json"
    arguments = ["train-tokenizer", "--output", str(output), "--data.path", str(folder), "--vocab-size", "280"]
    assert main(arguments) == 0
    assert f"--data.tokenizer {output}" in capsys.readouterr().out
    first = output.read_bytes()
    assert load_tokenizer(str(output)).vocab_size == 280
    assert main(arguments) == 0
    assert output.read_bytes() == first
    assert np.array_equal(load_tokenizer(str(output)).encode("def"), load_tokenizer(str(output)).encode(b"def"))


def test_a_wrong_setting_ends_with_the_code_for_it(tmp_path, capsys):
    arguments = ["train-tokenizer", "--output", str(tmp_path / "x.json"), "--data.path", str(tmp_path / "missing")]
    assert main(arguments) == 2
    assert "does not exist" in capsys.readouterr().err
