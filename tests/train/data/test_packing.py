"""Packing: every byte once, aligned, with little padding."""

import json

import grain
import numpy as np
from helpers.corpora import ALIGN, BYTE, T, assert_same, config, corpus_of, random_texts, rows
from hypothesis import given, settings
from hypothesis import strategies as st

from train.config import DataConfig
from train.data.loader import train_batches
from train.data.packing import ConcatenateIterDataset, to_places

texts_strategy = st.lists(st.binary(min_size=1, max_size=3 * T), min_size=1, max_size=20)


def segments(row):
    """(tokens, targets) of every piece in a row, each a contiguous run of weight 1 in one segment."""
    ids = row.get("segment_ids", np.zeros(T, dtype=np.int32))
    for segment in np.unique(ids):
        places = np.flatnonzero((ids == segment) & (row["weights"] > 0))
        if len(places):
            yield places[0], row["tokens"][places], row["targets"][places]


@settings(max_examples=25)
@given(texts=texts_strategy, isolate=st.booleans())
def test_every_byte_and_end_of_text_is_a_target_exactly_once(texts, isolate):
    batches = train_batches(corpus_of(texts), BYTE, config(isolate_documents=isolate), align=ALIGN, num_epochs=1)
    targets, num_bytes = [], 0
    for batch in batches:
        targets.append(batch["targets"][batch["weights"] > 0])
        num_bytes += batch["target_bytes"].sum()
        assert (batch["target_bytes"] <= batch["weights"]).all()
        assert (batch["targets"][batch["weights"] == 0] == BYTE.pad_id).all()
        assert (batch["tokens"][batch["weights"] == 0] == BYTE.pad_id).all()
    expected = np.concatenate([np.frombuffer(text, np.uint8) for text in texts])
    counts = np.bincount(np.concatenate(targets), minlength=BYTE.vocab_size)
    np.testing.assert_array_equal(counts[:256], np.bincount(expected, minlength=256))
    assert counts[BYTE.eos_id] == len(texts)
    assert num_bytes == len(expected)


@settings(max_examples=25)
@given(texts=texts_strategy)
def test_isolated_documents_start_on_a_block_and_segment_ids_never_decrease(texts):
    batches = list(train_batches(corpus_of(texts), BYTE, config(), align=ALIGN, num_epochs=1))
    pieces = []
    for batch in batches:
        assert batch["segment_ids"].dtype == np.int32
        assert (np.diff(batch["segment_ids"], axis=1) >= 0).all()
        starts = np.flatnonzero(np.diff(batch["segment_ids"], axis=1, prepend=-1))
        assert (starts % T % ALIGN == 0).all()
        for row in rows([batch]):
            for start, tokens, targets in segments(row):
                assert start % ALIGN == 0
                np.testing.assert_array_equal(tokens[1:], targets[:-1])  # inside a segment, plain next-token pairs
                pieces.append((tokens.tolist(), targets.tolist()))
    expected = []
    for text in texts:
        inputs, targets = [BYTE.bos_id, *text], [*text, BYTE.eos_id]
        expected += [(inputs[i : i + T], targets[i : i + T]) for i in range(0, len(inputs), T)]
    assert sorted(pieces) == sorted(expected)


def test_without_isolation_the_rows_are_one_unbroken_stream():
    texts = random_texts()
    batches = list(train_batches(corpus_of(texts), BYTE, config(isolate_documents=False), align=5, num_epochs=1))
    assert all("segment_ids" not in batch for batch in batches)
    # Rows come shuffled: chain them by the fact that a row's last target is the next row's first input.
    every = rows(batches)
    assert sum(0 < row["weights"].sum() < T for row in every) <= 1
    streams = [row["targets"][row["weights"] > 0].tolist() for row in every]
    joined = "".join(chr(token) for stream in streams for token in stream)
    for row in every:
        real = row["weights"] > 0
        np.testing.assert_array_equal(row["tokens"][1:][real[1:]], row["targets"][:-1][real[1:]])
    assert joined.count(chr(BYTE.eos_id)) == len(texts)


def test_batches_have_the_contract_shapes_and_dtypes():
    batch = next(train_batches(corpus_of(random_texts()), BYTE, config(), align=ALIGN))
    assert {key: (value.shape, str(value.dtype)) for key, value in batch.items()} == {
        "tokens": ((4, T), "int32"),
        "targets": ((4, T), "int32"),
        "weights": ((4, T), "float32"),
        "target_bytes": ((4, T), "int32"),
        "segment_ids": ((4, T), "int32"),
    }


def test_packing_wastes_little():
    texts = random_texts(600, longest=3 * T)
    weights = np.stack(
        [row["weights"] for row in rows(train_batches(corpus_of(texts), BYTE, config(), align=1, num_epochs=1))]
    )
    assert weights.mean() > 0.97


def test_every_row_boundary_of_a_stream_can_be_resumed_from():
    # Documents that end exactly where a row ends are the case in which a packer has nothing left over.
    texts = [bytes([i]) * (T - 1) for i in range(6)] + [b"x" * (2 * T + 3)]
    corpus = corpus_of(texts)
    iterator = iter(ConcatenateIterDataset(_places(corpus), T))
    states, expected = [], []
    for _ in range(8):
        states.append(json.dumps(iterator.get_state()))
        expected.append(next(iterator))
    for start, state in enumerate(states):
        resumed = iter(ConcatenateIterDataset(_places(corpus), T))
        resumed.set_state(json.loads(state))
        for row in expected[start:]:
            assert_same(next(resumed), row)


def _places(corpus):
    documents = grain.MapDataset.source(corpus.train)
    return documents.map(lambda text: to_places(text, BYTE, DataConfig())).to_iter_dataset()
