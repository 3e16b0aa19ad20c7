"""Files of every format become documents, and what cannot is named."""

import functools
import json
import sys
import typing
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from backports import zstd
from helpers.corpora import ALIGN, BYTE, assert_same, config, contents, write_texts
from helpers.damaged_files import COMPRESS, lines
from pyarrow import feather, parquet

from train.config import DataConfig, DataFormat
from train.data.corpus import load_corpus
from train.data.files import TextFile
from train.data.formats import FORMATS, Format, encode_text
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
        "no text in field 'body'; the fields are 'text'",
        "no text in field 'body'; the fields are 'body'",
        "no text in field 'body'",
        "not UTF-8 JSON",
        "field 'body' is not valid Unicode",
        "empty",
    ]


KINDS = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view", "dictionary")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ending", [".parquet", ".arrow"])
def test_tables_are_read_and_nulls_and_rows_that_are_not_utf8_counted(tmp_path, ending, kind):
    texts = ["one", None, "zwei", "東京", ""]
    values = [None if text is None else text.encode() for text in texts] + [b"\xff"] * ("binary" in kind)
    column = pyarrow.array(values if "binary" in kind else texts, "string" if kind == "dictionary" else kind)
    column = column.dictionary_encode() if kind == "dictionary" else column
    path = tmp_path / f"data{ending}"
    write = functools.partial(parquet.write_table, row_group_size=2) if ending == ".parquet" else feather.write_feather
    options = {} if ending == ".parquet" else {"compression": "uncompressed"}
    write(pyarrow.table({"other": range(len(column)), "text": column}), path, **options)
    corpus = load_corpus(DataConfig(path=str(path)))
    found = contents(corpus.train) + contents(corpus.held_out)
    assert sorted(found) == sorted(text.encode() for text in texts if text)
    skipped = [(f"{path}:1", "null in field 'text'"), (f"{path}:4", "empty"), (f"{path}:5", "not UTF-8 at byte 0")]
    assert corpus.skipped == tuple(skipped[: 2 + ("binary" in kind)])


def test_tables_that_cannot_be_used_are_skipped_with_the_reason(tmp_path):
    write_texts(tmp_path, ["one", "two"])
    (tmp_path / "broken.parquet").write_text("not parquet")
    parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "numbers.parquet")
    parquet.write_table(pyarrow.table({"body": ["a"]}), tmp_path / "other.parquet")
    parquet.write_table(pyarrow.table([["a"], ["b"]], names=["text", "text"]), tmp_path / "twice.parquet")
    parquet.write_table(pyarrow.table({"text": pyarrow.array([], "string")}), tmp_path / "no_rows.parquet")
    reasons = {Path(name).name: reason for name, reason in load_corpus(DataConfig(path=str(tmp_path))).skipped}
    assert reasons.pop("broken.parquet").startswith("not a table that can be read: Parquet magic bytes not found")
    assert reasons == {
        "numbers.parquet": "column 'text' has type int64, not string",
        "other.parquet": "no column 'text' among body",
        "twice.parquet": "2 columns 'text' among text, text",
        "no_rows.parquet": "no records",
    }


def test_a_column_whose_name_begins_like_another_is_not_taken_for_it(tmp_path):
    path = tmp_path / "data.parquet"
    parquet.write_table(pyarrow.table({"text.raw": ["wrong", "wrong too"], "text": ["one", "two"]}), path)
    corpus = load_corpus(DataConfig(path=str(path)))
    assert sorted(contents(corpus.train) + contents(corpus.held_out)) == [b"one", b"two"]


@pytest.mark.parametrize(
    ("missing", "ending", "message"),
    [
        ("pyarrow", ".parquet", r"data\.parquet: tables need pyarrow; install nsa-jax\[parquet\]"),
        ("backports", ".jsonl.zst", r"data\.jsonl\.zst: zst files need backports.zstd; install nsa-jax\[train\]"),
    ],
)
def test_a_missing_library_is_named_with_its_extra(tmp_path, monkeypatch, missing, ending, message):
    (tmp_path / f"data{ending}").write_text("")
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ValueError, match=message):
        load_corpus(DataConfig(path=str(tmp_path)))


@pytest.mark.parametrize("packed", COMPRESS)
@pytest.mark.parametrize("ending", [".txt", ".jsonl", ".json", ".parquet"])
def test_compressed_files_are_read_like_others_in_pieces_too(tmp_path, ending, packed):
    texts = [f"document {i} 🙂" for i in range(9)]
    plain, compressed = tmp_path / "plain", tmp_path / "compressed"
    plain.mkdir()
    compressed.mkdir()
    write_texts(plain, texts[:2])
    records = [{"text": text} for text in texts]
    if ending == ".parquet":
        parquet.write_table(pyarrow.table({"text": texts}), plain / "data.parquet")
    elif ending != ".txt":
        (plain / f"data{ending}").write_bytes(lines(records) if ending == ".jsonl" else json.dumps(records).encode())
    for file in plain.iterdir():
        data = file.read_bytes()
        packed_data = COMPRESS[packed](data[:10]) + COMPRESS[packed](data[10:])  # as pigz, pzstd and cat make them
        (compressed / f"{file.name}{packed.upper()}").write_bytes(packed_data)
    corpora = [load_corpus(config(path=str(folder))) for folder in (plain, compressed)]
    assert corpora[0].fingerprint == corpora[1].fingerprint
    assert contents(corpora[0].train) == contents(corpora[1].train)
    assert corpora[1].skipped == ()


def test_json_files_are_records_and_not_text(tmp_path):
    (tmp_path / "array.json").write_text(json.dumps([{"text": "one"}, {"body": "b"}, {"text": None}, {"text": "two"}]))
    (tmp_path / "pretty.json").write_text(json.dumps([{"text": "three"}], indent=2))
    (tmp_path / "object.json").write_text(json.dumps({"text": "four"}, indent=2))
    (tmp_path / "lines.json").write_text('{"text": "five"}\n\n{"text": \n{"text": "six"}\n')
    (tmp_path / "package.json").write_text(json.dumps({"name": "x"}, indent=2))
    (tmp_path / "cut.json").write_text('[{"text": "seven"}, {"te')
    (tmp_path / "none.json").write_text("[]")
    corpus = load_corpus(DataConfig(path=str(tmp_path)))
    found = sorted(contents(corpus.train) + contents(corpus.held_out))
    assert found == sorted(text.encode() for text in ("one", "two", "three", "four", "five", "six"))
    reasons = {Path(name).name: reason for name, reason in corpus.skipped}
    assert reasons.pop("lines.json:1").startswith("not UTF-8 JSON: ")
    assert reasons.pop("cut.json").startswith("not UTF-8 JSON: ")
    assert reasons == {
        "array.json:1": "no text in field 'text'; the fields are 'body'",
        "array.json:2": "null in field 'text'",
        "package.json:0": "no text in field 'text'; the fields are 'name'",
        "none.json": "no records",
    }
    raw = load_corpus(DataConfig(path=str(tmp_path), format="text"))
    assert len(raw.train) + len(raw.held_out) == 7


def test_hugging_face_folders_are_read_by_their_arrow_streams(tmp_path):
    table = pyarrow.table({"text": ["one", "two"], "n": [1, 2]})
    with pyarrow.ipc.new_stream(tmp_path / "data-00000-of-00001.arrow", table.schema) as writer:
        writer.write_table(table)
    (tmp_path / "state.json").write_text('{"_format_type": null}')
    corpus = load_corpus(DataConfig(path=str(tmp_path)))
    assert sorted(contents(corpus.train) + contents(corpus.held_out)) == [b"one", b"two"]
    assert [Path(name).name for name, _ in corpus.skipped] == ["state.json:0"]


def test_every_format_gives_the_same_batches(tmp_path):
    texts = [f"document {i} " * (i % 7 + 1) for i in range(20)]
    write_texts(tmp_path, texts)
    (tmp_path / "all.jsonl").write_bytes(lines({"text": text} for text in texts))
    (tmp_path / "all.jsonl.zst").write_bytes(zstd.compress((tmp_path / "all.jsonl").read_bytes()))
    (tmp_path / "all.json").write_text(json.dumps([{"text": text} for text in texts]))
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "all.parquet")
    found = []
    for pattern in ("*.txt", "all.jsonl", "all.jsonl.zst", "all.json", "all.parquet"):
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
