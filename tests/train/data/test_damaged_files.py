"""Damaged files are read, or skipped and counted, or refused by name."""

import collections
import pickle

import pytest
from helpers.corpora import BYTE, config
from helpers.damaged_files import COMPLETIONS, PLAIN_TALKS, SHAREGPT, damaged, lines, undamaged

from train.data.corpus import describe, load_corpus
from train.data.packing import to_places

GOOD = {
    "auto": [{"text": text} for text in ("one", "two")],
    "chat": [{"messages": talk} for talk in PLAIN_TALKS[:2]],
    "sharegpt": SHAREGPT[:2],
    "prompt-completion": COMPLETIONS[:2],
}


def load(folder, name, path):
    """What became of a file in a corpus of good ones: its documents, and the reasons of what was skipped."""
    settings = config(path=str(folder), format=name)
    corpus = load_corpus(settings)
    documents = 0
    for side in pickle.loads(pickle.dumps((corpus.train, corpus.held_out))):  # as worker processes get them
        for i in range(len(side)):
            to_places(side[i], BYTE, settings)
            side[i].decode("utf-8")
            documents += side.name(i) == str(path)
    skipped = [reason for where, reason in corpus.skipped if where.startswith(str(path))]
    assert documents or skipped
    assert all(reason and "\n" not in reason for reason in skipped)
    assert len(describe(corpus)) <= 7
    return documents, skipped


def refusal(folder, name):
    """What is said of a folder without documents, or of one."""
    try:
        load_corpus(config(path=str(folder), format=name))
    except ValueError as error:
        return str(error)
    return ""


def check(numbers, folder):
    """Every one of the damaged files by itself and beside good ones; how each was taken."""
    files, taken = undamaged(), collections.Counter()
    for number in numbers:
        name, ending, data, done = damaged(number, files)
        path = folder / f"damaged{ending}"
        path.write_bytes(data)
        good = folder / "good.jsonl"
        good.unlink(missing_ok=True)
        try:
            refused = refusal(folder, name)
            assert not refused or (refused.startswith("data.path: ") and "\n" not in refused), refused
            good.write_bytes(lines(GOOD[name]))
            documents, skipped = load(folder, name, path)
        except Exception as error:
            raise AssertionError(f"file {number}, {done}: {error!r}") from error
        taken["part read" if documents and skipped else "read" if documents else "skipped"] += 1
        path.unlink()
    return taken


def test_a_sample_of_damaged_files_is_read_or_counted_or_refused(tmp_path):
    taken = check(range(0, 2100, 29), tmp_path)
    assert min(taken["read"], taken["part read"], taken["skipped"]) > 0


@pytest.mark.exhaustive
@pytest.mark.parametrize("part", range(10))
def test_damaged_files_are_read_or_counted_or_refused(tmp_path, part):
    assert check(range(1000 * part, 1000 * (part + 1)), tmp_path).total() == 1000


def test_undamaged_files_are_read_to_the_last_record(tmp_path):
    for name, ending, data, expected in undamaged():
        path = tmp_path / f"file{ending}"
        path.write_bytes(data)
        (tmp_path / "good.jsonl").write_bytes(lines(GOOD[name]))
        documents, skipped = load(tmp_path, name, path)
        assert (documents, len(skipped)) == (expected, 0 if expected else 1), (name, ending, skipped)
        path.unlink()
