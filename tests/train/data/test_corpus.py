"""Which documents there are, and which are held out."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from helpers.corpora import contents, write_texts
from hypothesis import given
from hypothesis import strategies as st

from train.config import DataConfig
from train.data import corpus as corpus_module
from train.data.corpus import describe, load_corpus


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
    held_out = corpus_module._held_out(np.array(digests, dtype=np.uint64), fraction)
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


def test_text_in_other_encodings_is_not_learnt_as_if_it_were_utf8(tmp_path):
    write_texts(tmp_path, ["one", "two"])
    for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32-be"):
        (tmp_path / f"{encoding}.txt").write_bytes("plain words".encode(encoding))
    (tmp_path / "numbers.bin").write_bytes(np.arange(100, dtype=np.uint16).tobytes())
    (tmp_path / "marked.txt").write_bytes("three".encode("utf-8-sig"))
    corpus = load_corpus(DataConfig(path=str(tmp_path)))
    assert sorted(contents(corpus.train) + contents(corpus.held_out)) == [b"one", b"three", b"two"]
    assert {Path(name).name: reason for name, reason in corpus.skipped} == {
        "utf-16.txt": "not UTF-8 at byte 0",
        "utf-16-le.txt": "not text: a zero at byte 1",
        "utf-16-be.txt": "not text: a zero at byte 0",
        "utf-32-be.txt": "not text: a zero at byte 0",
        "numbers.bin": "not text: a zero at byte 0",
    }


@pytest.mark.parametrize("pattern", ["", "**"])
def test_links_are_followed_once_and_counted(tmp_path, pattern):
    real, root = tmp_path / "real", tmp_path / "root"
    for folder in (real, root, root / "own"):
        folder.mkdir()
    write_texts(real, ["linked 0", "linked 1"])
    write_texts(root / "own", ["own 0", "own 1"])
    (root / "a_folder").symlink_to(real)
    (root / "b_folder").symlink_to(real)
    (root / "a_loop").symlink_to(root)
    (real / "back").symlink_to(root / "own")
    (root / "a_file.txt").symlink_to(root / "own" / "000.txt")
    (root / "z_file.txt").symlink_to(real / "001.txt")
    (root / "dangling.txt").symlink_to(root / "nowhere")
    os.mkfifo(root / "pipe")
    corpus = load_corpus(DataConfig(path=str(root / pattern) if pattern else str(root)))
    assert sorted(contents(corpus.train) + contents(corpus.held_out)) == [b"linked 0", b"linked 1", b"own 0", b"own 1"]
    documents = [side.name(i) for side in (corpus.train, corpus.held_out) for i in range(len(side))]
    assert {str(root / "own" / "000.txt"), str(root / "own" / "001.txt")} <= set(documents)
    reasons = dict(corpus.skipped)
    assert reasons[str(root / "dangling.txt")] == "a link to nothing"
    assert reasons[str(root / "pipe")] == "no regular file"
    assert reasons[str(root / "a_file.txt")] == f"another name of {root / 'own' / '000.txt'}, which is read already"
    if not pattern:
        assert reasons[str(root / "b_folder")] == f"another name of {real}, which is read already"
        assert reasons[str(root / "a_loop")] == f"another name of {root}, which is read already"
        assert len(reasons) == 7  # and z_file.txt, and real/back
        assert load_corpus(DataConfig(path=str(root / "a_folder"))).fingerprint  # a link as the path itself


def test_folders_that_cannot_be_read_are_counted(tmp_path, monkeypatch):
    write_texts(tmp_path, ["one", "two"])
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert load_corpus(DataConfig(path=str(tmp_path))).skipped == ((str(tmp_path / "closed"), "Permission denied"),)


def test_copies_inside_one_file_are_on_one_side_of_the_split(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(f'{{"text": "document {i % 50}"}}\n' for i in range(500)))
    corpus = load_corpus(DataConfig(path=str(path), held_out_fraction=0.3))
    train, held_out = contents(corpus.train), contents(corpus.held_out)
    assert len(train) + len(held_out) == 500
    assert not set(train) & set(held_out)
    assert {train.count(text) for text in train} == {held_out.count(text) for text in held_out} == {10}


def test_what_was_skipped_is_summed_up_by_reason(tmp_path):
    write_texts(tmp_path, ["one", "two", "", ""])
    for i in range(3):
        (tmp_path / f"latin{i}.txt").write_bytes(i * b"a" + b"\xff")
    (tmp_path / "none.jsonl").write_text("\n")
    lines = describe(load_corpus(DataConfig(path=str(tmp_path))), most=2)
    assert lines[0].endswith(": 1 documents to train on, 1 held out, 0.0 MB, 6 skipped")
    assert lines[1:] == [
        f"  skipped {tmp_path / 'latin0.txt'}: not UTF-8 at byte 0 (and 2 more)",
        f"  skipped {tmp_path / '002.txt'}: empty (and 1 more)",
        "  skipped 1 for 1 other reasons",
    ]


def test_missing_and_empty_data_are_named(tmp_path):
    def refused(match, **settings):
        with pytest.raises(ValueError, match=match):
            load_corpus(DataConfig(**settings))

    refused(
        r"data\.path: .*nowhere does not exist; expected a file, a folder or a glob", path=str(tmp_path / "nowhere")
    )
    refused(r"data\.path: no file in .*\*\.txt", path=str(tmp_path / "*.txt"))
    refused(r"data\.path = '': expected a file, a folder or a glob", path="")
    refused(r"data\.path = ~nobody_at_all/x: ", path="~nobody_at_all/x")
    refused(r"data\.path = x+: File name too long", path="x" * 5000)
    os.mkfifo(tmp_path / "pipe")
    refused(r"data\.path: no file in .*pipe: 1 skipped \(.*pipe: no regular file\)", path=str(tmp_path / "pipe"))
    (tmp_path / "pipe").unlink()
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
    (one / "c.txt").write_bytes(b"\xff")
    refused(
        r"data\.path: .*one holds 2 document\(s\), all the same.*: 1 skipped \(.*c\.txt: not UTF-8",
        path=str(one),
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
