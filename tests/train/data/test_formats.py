"""Files of every format become documents, and what cannot is named."""

import json
import sys
import typing
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from helpers.corpora import ALIGN, BYTE, assert_same, config, contents, write_texts
from pyarrow import parquet

from train.config import DataConfig, DataFormat
from train.data.corpus import load_corpus
from train.data.formats import FORMATS, Format, TextFile, encode_text
from train.data.loader import train_batches


def test_jsonl_documents_are_read_and_bad_lines_counted(tmp_path):
    path = tmp_path / "data.jsonl"
    texts = ["one", "zwei\n", "東京"]
    good = [json.dumps({"body": text, "n": 1}).encode() for text in texts]
    bad = [
        b"{",
        b'{"text": "wrong field"}',
        b'{"body": 3}',
        b"[]",
        b'{"body": "\xff"}',
        b'{"body": "\\ud800"}',
        b'{"body": ""}',
    ]
    path.write_bytes(b"\n".join([bad[0], good[0], b"", *bad[1:4], good[1], *bad[4:], good[2]]))
    corpus = load_corpus(DataConfig(path=str(path), text_field="body"))
    assert sorted(contents(corpus.train) + contents(corpus.held_out)) == sorted(text.encode() for text in texts)
    assert len(corpus.skipped) == len(bad)
    assert corpus.skipped[0][0] == f"{path}:0"
    assert [reason.split(":")[0] for _, reason in corpus.skipped] == [
        "not UTF-8 JSON",
        "no text in field 'body'",
        "no text in field 'body'",
        "no text in field 'body'",
        "not UTF-8 JSON",
        "field 'body' is not valid Unicode",
        "empty",
    ]


@pytest.mark.parametrize("kind", ["string", "large_string", "dictionary"])
def test_parquet_documents_are_read_and_nulls_counted(tmp_path, kind):
    texts = ["one", None, "zwei", "東京", ""]
    column = pyarrow.array(texts, pyarrow.large_string() if kind == "large_string" else pyarrow.string())
    column = column.dictionary_encode() if kind == "dictionary" else column
    path = tmp_path / "data.parquet"
    parquet.write_table(pyarrow.table({"other": range(5), "text": column}), path, row_group_size=2)
    corpus = load_corpus(DataConfig(path=str(path)))
    found = contents(corpus.train) + contents(corpus.held_out)
    assert sorted(found) == sorted(text.encode() for text in texts if text)
    assert corpus.skipped == ((f"{path}:1", "null in column 'text'"), (f"{path}:4", "empty"))


def test_parquet_files_that_cannot_be_used_are_skipped_with_the_reason(tmp_path):
    write_texts(tmp_path, ["one", "two"])
    (tmp_path / "broken.parquet").write_text("not parquet")
    parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "numbers.parquet")
    parquet.write_table(pyarrow.table({"body": ["a"]}), tmp_path / "other.parquet")
    reasons = {Path(name).name: reason for name, reason in load_corpus(DataConfig(path=str(tmp_path))).skipped}
    assert reasons["broken.parquet"].startswith("not a Parquet file")
    assert reasons["numbers.parquet"] == "column 'text' has type int64, not string"
    assert reasons["other.parquet"] == "no column 'text' among body"


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "data.parquet").write_text("")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"data\.parquet: Parquet needs pyarrow; install nsa-jax\[parquet\]"):
        load_corpus(DataConfig(path=str(tmp_path)))


def test_every_format_gives_the_same_batches(tmp_path):
    texts = [f"document {i} " * (i % 7 + 1) for i in range(20)]
    write_texts(tmp_path, texts)
    (tmp_path / "all.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "all.parquet")
    found = []
    for pattern in ("*.txt", "all.jsonl", "all.parquet"):
        settings = config(path=str(tmp_path / pattern))
        iterator = train_batches(load_corpus(settings), BYTE, settings, align=ALIGN)
        found.append([next(iterator) for _ in range(3)])
        iterator.close()
    for other in found[1:]:
        for left, right in zip(found[0], other, strict=True):
            assert_same(left, right)


def test_a_new_format_is_one_entry_of_the_table(tmp_path, monkeypatch):
    """Files of Windows-1252, whose documents are learnt from the second half on."""

    class Western(TextFile):
        def scan(self):
            yield 0, self.read(0)

        def read(self, position):
            return Path(self.path).read_bytes().decode("cp1252").encode()

    def encode_second_half(document, tokenizer, config):
        ids = tokenizer.encode(document)
        return ids, np.arange(len(ids)) >= len(ids) // 2

    monkeypatch.setitem(FORMATS, "western", Format(lambda path, config: Western(path), encode=encode_second_half))
    for i in range(20):
        (tmp_path / f"{i}.txt").write_bytes(f"{i:04}é".encode("cp1252"))
    settings = config(path=str(tmp_path), format="western")
    corpus = load_corpus(settings)
    assert "0007é".encode() in contents(corpus.train) + contents(corpus.held_out)
    batches = list(train_batches(corpus, BYTE, settings, align=ALIGN, num_epochs=1))
    learnt = np.concatenate([batch["targets"][batch["weights"] > 0] for batch in batches])
    assert len(learnt) == len(corpus.train) * 4  # the second three bytes of six, and the end of the document
    assert np.sum(learnt == "é".encode()[1]) == len(corpus.train)


def test_the_command_line_offers_every_format():
    assert typing.get_args(DataFormat) == ("auto", *FORMATS)


def test_a_format_that_endings_choose_holds_plain_text():
    assert all(found.encode is encode_text and found.learns_end for found in FORMATS.values() if found.endings)
