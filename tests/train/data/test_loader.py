"""The iterators: shuffled, shared out over hosts, resumed exactly."""

import collections
import dataclasses
import itertools
import json
import shutil

import grain
import numpy as np
import pytest
from helpers.corpora import ALIGN, BYTE, T, assert_same, config, corpus_of, random_texts, rows, write_texts

from train.data import packing
from train.data.corpus import load_corpus
from train.data.loader import NeighboursMapDataset, held_out_batches, train_batches


@pytest.fixture
def small_window(monkeypatch):
    """Windows so small that a few batches cross several."""
    monkeypatch.setattr(packing, "WINDOW_TOKENS", 8 * T)


@pytest.mark.parametrize("isolate", [True, False])
def test_an_iterator_given_the_state_continues_exactly(isolate, small_window):
    corpus = corpus_of(random_texts())
    settings = config(isolate_documents=isolate, batch_size=1)
    iterator = train_batches(corpus, BYTE, settings, align=ALIGN)
    states, batches = [], []
    for _ in range(150):  # over more than one epoch, window by window
        # Grain saves states as JSON.
        states.append(json.dumps(iterator.get_state()))
        batches.append(next(iterator))
    assert max(map(len, states)) < 500
    iterator.close()
    for start in (0, 1, 7, 8, 9, 31, 32, 63, 64, 100, 120):
        resumed = train_batches(corpus, BYTE, settings, align=ALIGN)
        if start % 2:  # a used iterator can be sent back as well
            next(resumed)
        resumed.set_state(json.loads(states[start]))
        for expected in batches[start : start + 30]:
            assert_same(next(resumed), expected)
        resumed.close()


@pytest.mark.parametrize("isolate", [True, False])
def test_the_seed_fixes_the_order_and_epochs_differ(isolate, monkeypatch):
    corpus = corpus_of([bytes([i]) * (T - 1) for i in range(64)])  # one row each

    def order(seed, count):
        monkeypatch.setattr(packing, "WINDOW_TOKENS", 1)  # 4 rows, so that an epoch is 16 windows
        settings = config(isolate_documents=isolate, seed=seed, batch_size=1)
        iterator = train_batches(corpus, BYTE, settings, align=ALIGN)
        found = [int(next(iterator)["targets"][0, 0]) for _ in range(count)]
        iterator.close()
        return found

    first = order(0, 128)
    assert first == order(0, 128)
    assert sorted(first[:64]) == sorted(first[64:]) == list(range(64))
    assert first[:64] != first[64:]
    # The documents themselves are shuffled, not only the rows of a window (4 here), and anew each epoch.
    assert set(first[:4]) != set(range(4))
    assert set(first[:4]) != set(first[64:68])
    assert first[:64] != order(1, 64)


@pytest.mark.parametrize("isolate", [True, False])
def test_host_shards_are_disjoint_and_together_whole(isolate):
    texts = [bytes([i]) * (i + 1) for i in range(50)]
    seen = []
    for index in range(4):
        batches = list(
            train_batches(
                corpus_of(texts),
                BYTE,
                config(isolate_documents=isolate, batch_size=8),
                align=ALIGN,
                process_index=index,
                process_count=4,
                num_epochs=1,
            )
        )
        assert all(batch["tokens"].shape == (2, T) for batch in batches)
        targets = np.concatenate([batch["targets"][batch["weights"] > 0] for batch in batches])
        seen.append(collections.Counter(targets[targets != BYTE.eos_id].tolist()))
    assert not any(seen[i].keys() & seen[j].keys() for i in range(4) for j in range(i))
    assert sum(seen, collections.Counter()) == {i: i + 1 for i in range(50)}


def test_after_as_many_batches_any_number_of_hosts_has_taken_the_same_documents(monkeypatch):
    monkeypatch.setattr(packing, "WINDOW_TOKENS", 0)  # four batches are packed together
    corpus = corpus_of([bytes([i]) * (T - 1) for i in range(38)])  # a document fills a row

    def taken(count, num_batches):
        documents = collections.Counter()
        for index in range(count):
            batches = train_batches(corpus, BYTE, config(), align=ALIGN, process_index=index, process_count=count)
            for _ in range(num_batches):
                documents.update(next(batches)["targets"][:, 0].tolist())
            batches.close()
        return documents

    for num_batches in (4, 12):  # within the first epoch, and after it
        assert taken(1, num_batches) == taken(2, num_batches) == taken(4, num_batches)


def test_held_out_documents_count_once_in_a_fixed_order():
    texts = random_texts(23, seed=1)
    corpus = corpus_of([b"train"], held_out=texts)
    batches = held_out_batches(corpus, BYTE, config(), align=ALIGN)
    once, again = list(batches), list(batches)
    assert len(once) == len(again) > 1
    for left, right in zip(once, again, strict=True):
        assert left["tokens"].shape == (4, T)
        assert_same(left, right)
    assert sum(batch["target_bytes"].sum() for batch in once) == sum(map(len, texts))
    eos = sum(((batch["targets"] == BYTE.eos_id) & (batch["weights"] > 0)).sum() for batch in once)
    assert eos == len(texts)
    empty = ~(once[-1]["weights"] > 0).any(axis=1)
    assert (once[-1]["target_bytes"][empty] == 0).all()
    # The hosts' rows, one above the other, are the whole batch.
    shares = [
        list(held_out_batches(corpus, BYTE, config(), align=ALIGN, process_index=i, process_count=2)) for i in range(2)
    ]
    for whole, top, bottom in zip(once, *shares, strict=True):
        assert_same(whole, {key: np.concatenate([top[key], bottom[key]]) for key in whole})


def test_worker_processes_yield_every_document_and_resume(tmp_path):
    for i in range(12):
        (tmp_path / f"{i}.txt").write_bytes(bytes([97 + i]) * (T - 1))
    settings = config(path=str(tmp_path), workers=1, batch_size=2)
    corpus = load_corpus(settings)
    iterator = train_batches(corpus, BYTE, settings, align=ALIGN)
    in_process = train_batches(corpus, BYTE, dataclasses.replace(settings, workers=0), align=ALIGN)
    batches = []
    for step in range(8):
        if step == 3:
            state = json.loads(json.dumps(iterator.get_state()))
        batches.append(next(iterator))
        assert_same(batches[-1], next(in_process))
    iterator.set_state(state)
    for expected in batches[3:]:
        assert_same(next(iterator), expected)
    iterator.close()
    in_process.close()


@pytest.mark.parametrize(
    ("changes", "arguments", "match"),
    [
        ({"sequence_length": 36}, {}, r"data\.sequence_length = 36 must be a multiple of the selection block \(8\)"),
        ({"sequence_length": 0}, {}, r"data\.sequence_length must be at least 1, got 0"),
        ({"batch_size": 0}, {}, r"data\.batch_size must be at least 1, got 0"),
        ({"workers": -1}, {}, r"data\.workers must be at least 0, got -1"),
        ({}, {"align": 0}, r"align must be at least 1, got 0"),
        ({}, {"process_index": 0, "process_count": 3}, r"data\.batch_size = 4 must be a multiple of the 3 processes"),
        ({}, {"process_index": 2, "process_count": 2}, r"process_index must be in \[0, process_count\), got 2 of 2"),
    ],
)
@pytest.mark.parametrize("make", [train_batches, held_out_batches])
def test_contradictory_batch_settings_are_refused(make, changes, arguments, match):
    with pytest.raises(ValueError, match=match):
        make(corpus_of([b"a"], [b"b"]), BYTE, config(**changes), **{"align": ALIGN, **arguments})


def test_more_hosts_than_documents_are_refused():
    with pytest.raises(ValueError, match=r"memory has 1 training documents for 2 processes"):
        train_batches(corpus_of([b"a"]), BYTE, config(), align=ALIGN, process_index=0, process_count=2)


def test_a_document_that_vanishes_while_training_is_named(tmp_path):
    write_texts(tmp_path, [f"document {i}" for i in range(10)])
    settings = config(path=str(tmp_path))
    corpus = load_corpus(settings)
    shutil.rmtree(tmp_path)
    iterator = train_batches(corpus, BYTE, settings, align=ALIGN)
    with pytest.raises(FileNotFoundError, match=r"\d+\.txt"):
        next(iterator)
    iterator.close()


@pytest.mark.parametrize("processes", [1, 2])
def test_every_document_of_every_run_comes_once(processes):
    texts = [bytes([i]) * (T - 1) for i in range(20)]  # one row each
    settings = config(isolate_documents=False, neighbours=3, batch_size=processes)
    seen = []
    for index in range(processes):
        shard = {"process_index": index, "process_count": processes}
        iterator = train_batches(corpus_of(texts), BYTE, settings, align=ALIGN, num_epochs=1, **shard)
        seen += [int(row["targets"][0]) for row in rows(list(iterator)) if row["weights"].any()]
        iterator.close()
    assert sorted(seen) == list(range(20))


def test_runs_of_documents_come_again_in_every_epoch():
    texts = [bytes([i]) * (T - 1) for i in range(6)]
    iterator = train_batches(corpus_of(texts), BYTE, config(isolate_documents=False, neighbours=4), align=ALIGN)
    seen = [int(row["targets"][0]) for row in rows(list(itertools.islice(iterator, 30)))]
    iterator.close()
    epochs = len(seen) // len(texts)
    assert epochs >= 4
    # Rows of neighbouring epochs mix in the shuffle.
    assert all(seen.count(text) >= epochs - 2 for text in range(6))


def test_runs_of_documents_are_read_in_their_order():
    texts = [bytes([i]) for i in range(8)]
    corpus = corpus_of(texts)
    documents = NeighboursMapDataset(grain.MapDataset.source([2, 0, 1]), corpus.train, 3)
    assert list(documents.to_iter_dataset()) == [texts[i] for i in (6, 7, 0, 1, 2, 3, 4, 5)]
    with pytest.raises(ValueError, match=r"8 training documents for 4 processes; each needs at least one run of 3"):
        train_batches(corpus, BYTE, config(neighbours=3), align=ALIGN, process_index=0, process_count=4)
