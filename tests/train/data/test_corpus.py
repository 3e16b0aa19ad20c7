"""Which documents there are, and which are held out."""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers.corpora import contents, write_texts
from hypothesis import given
from hypothesis import strategies as st

from train.config import DataConfig
from train.data import corpus as corpus_module
from train.data.corpus import load_corpus


def test_split_goes_by_content_and_depends_on_neither_order_nor_names(tmp_path):
    texts = [f"document {i // 2}" for i in range(200)]  # each twice
    sides = []
    for name, ordered in (("a", texts), ("b", texts[::-1])):
        folder = tmp_path / name
        folder.mkdir()
        write_texts(folder, ordered)
        corpus = load_corpus(DataConfig(path=str(folder), held_out_fraction=0.2))
        sides.append((contents(corpus.train), contents(corpus.held_out), corpus.fingerprint))
    assert sides[0] == sides[1]
    held_out = set(sides[0][1])
    assert not held_out & set(sides[0][0])
    assert 10 <= len(held_out) <= 30
    assert contents(load_corpus(DataConfig(path=str(tmp_path / "a"), seed=1)).held_out) != sides[0][1]


def test_documents_keep_their_side_when_others_are_added(tmp_path):
    write_texts(tmp_path, [f"document {i}" for i in range(60)])
    before = load_corpus(DataConfig(path=str(tmp_path), held_out_fraction=0.3))
    write_texts(tmp_path, [f"document {i}" for i in range(120)])
    after = load_corpus(DataConfig(path=str(tmp_path), held_out_fraction=0.3))
    assert set(contents(before.held_out)) < set(contents(after.held_out))
    assert set(contents(before.train)) < set(contents(after.train))
    assert before.fingerprint != after.fingerprint


@given(
    digests=st.lists(st.integers(0, 2**64 - 1), min_size=2, max_size=20).filter(lambda found: len(set(found)) > 1),
    fraction=st.floats(0, 1, exclude_min=True, exclude_max=True),
)
def test_neither_side_of_the_split_is_empty(digests, fraction):
    held_out = corpus_module._held_out(np.array(digests, dtype=np.uint64), fraction, "x")
    assert 0 < held_out.sum() < len(digests)
    assert not set(np.array(digests)[held_out]) & set(np.array(digests)[~held_out])


def test_default_is_the_standard_library_without_packages_and_tests():
    corpus = load_corpus(DataConfig())
    names = [corpus.train.name(i) for i in range(len(corpus.train))]
    names += [corpus.held_out.name(i) for i in range(len(corpus.held_out))]
    assert Path(json.__file__).resolve() in {Path(name).resolve() for name in names}
    assert all(name.endswith(".py") for name in names)
    parts = {part for name in names for part in Path(name).relative_to(Path(json.__file__).parents[1]).parts}
    assert not parts & {"site-packages", "test", "tests"}
    assert corpus.num_bytes > 5_000_000
    assert len(corpus.held_out) >= 10


def test_folders_are_read_recursively_without_hidden_files(tmp_path):
    write_texts(tmp_path, ["one", "two"])
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "three.md").write_text("three")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "HEAD").write_text("hidden")
    (tmp_path / ".hidden").write_text("hidden")

    def found(**settings):
        corpus = load_corpus(DataConfig(**settings))
        return contents(corpus.train) + contents(corpus.held_out)

    assert sorted(found(path=str(tmp_path))) == [b"one", b"three", b"two"]
    assert sorted(found(path=str(tmp_path), suffix=".txt")) == [b"one", b"two"]
    assert sorted(found(path=str(tmp_path / "0*.txt"))) == [b"one", b"two"]
    assert sorted(found(path=str(tmp_path / "**" / "*.*"))) == [b"one", b"three", b"two"]


def test_undecodable_and_empty_files_are_skipped_and_counted(tmp_path):
    write_texts(tmp_path, ["one", "two", ""])
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    corpus = load_corpus(DataConfig(path=str(tmp_path)))
    assert corpus.skipped == (
        (str(tmp_path / "002.txt"), "empty"),
        (str(tmp_path / "latin.txt"), "not UTF-8 at byte 0"),
    )
    assert len(corpus.train) + len(corpus.held_out) == 2
    assert corpus.num_bytes == 6


def test_missing_and_empty_data_are_named(tmp_path):
    def refused(match, **settings):
        with pytest.raises(ValueError, match=match):
            load_corpus(DataConfig(**settings))

    refused(
        r"data\.path: .*nowhere does not exist; expected a file, a folder or a glob", path=str(tmp_path / "nowhere")
    )
    refused(r"data\.path: no file in .*\*\.txt", path=str(tmp_path / "*.txt"))
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(r"data\.path: no file in .*empty", path=str(empty))
    (empty / "a.txt").write_text("")
    (empty / "b.txt").write_bytes(b"\xff")
    refused(r"no documents in .*empty: 2 skipped \(.*a\.txt: empty; .*b\.txt: not UTF-8 at byte 0\)", path=str(empty))
    refused(r"no file whose name ends in '\.md' in .*empty", path=str(empty), suffix=".md")
    one = tmp_path / "one"
    one.mkdir()
    (one / "a.txt").write_text("same")
    (one / "b.txt").write_text("same")
    refused(
        r"data\.path: .*one holds 2 document\(s\), all the same, so the held-out split would be empty", path=str(one)
    )


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"held_out_fraction": 0.0}, r"data\.held_out_fraction must lie between 0 and 1, got 0\.0"),
        ({"held_out_fraction": 1.0}, r"data\.held_out_fraction must lie between 0 and 1, got 1\.0"),
        ({"seed": -1}, r"data\.seed must be in \[0, 2\*\*32\), got -1"),
    ],
)
def test_impossible_corpus_settings_are_refused(changes, match):
    with pytest.raises(ValueError, match=match):
        load_corpus(DataConfig(**changes))
