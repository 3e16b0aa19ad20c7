"""The input pipeline: every byte once, aligned, split by content, shuffled, sharded, resumed exactly."""

import collections
import dataclasses
import json
import shutil
import sys
from pathlib import Path

import grain
import numpy as np
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

import train.data.corpus
import train.data.loader
from train.config import DataConfig
from train.data.corpus import Corpus, Documents, load_corpus
from train.data.loader import held_out_batches, train_batches
from train.data.tokenizer import ByteTokenizer

T, ALIGN = 32, 8
BYTE = ByteTokenizer()


@dataclasses.dataclass(frozen=True)
class InMemory:
    """A source of documents that lie in memory."""

    texts: tuple[bytes, ...]
    path: str = "memory"

    def read(self, position):
        return self.texts[position]


def corpus_of(texts, held_out=()):
    def documents(texts):
        zeros = np.zeros(len(texts), dtype=np.int32)
        return Documents((InMemory(tuple(texts)),), zeros, np.arange(len(texts)))

    return Corpus("memory", documents(texts), documents(held_out), (), sum(map(len, texts)), "")


def random_texts(count=40, seed=0, longest=100):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, rng.integers(1, longest), dtype=np.uint8).tobytes() for _ in range(count)]


def config(**changes):
    return DataConfig(**{"sequence_length": T, "batch_size": 4, **changes})


def rows(batches):
    """Rows of the batches as dicts of [T] arrays."""
    return [{key: value[i] for key, value in batch.items()} for batch in batches for i in range(len(batch["tokens"]))]


def segments(row):
    """(tokens, targets) of every piece in a row, each a contiguous run of weight 1 in one segment."""
    ids = row.get("segment_ids", np.zeros(T, dtype=np.int32))
    for segment in np.unique(ids):
        places = np.flatnonzero((ids == segment) & (row["weights"] > 0))
        if len(places):
            yield places[0], row["tokens"][places], row["targets"][places]


def documents_of(batches):
    """The documents that packed batches hold, put together again from their pieces."""
    begun, rest = [], collections.defaultdict(list)
    for row in rows(batches):
        for _, tokens, targets in segments(row):
            if tokens[0] == BYTE.bos_id:
                begun.append(targets.tolist())
            else:
                rest[int(tokens[0])].append(targets.tolist())
    return begun, rest


texts_strategy = st.lists(st.binary(min_size=1, max_size=3 * T), min_size=1, max_size=20)


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


def assert_same(left, right):
    assert left.keys() == right.keys()
    for key in left:
        np.testing.assert_array_equal(left[key], right[key])


@pytest.fixture
def small_window(monkeypatch):
    """Windows so small that a few batches cross several."""
    monkeypatch.setattr(train.data, "WINDOW_TOKENS", 8 * T)


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


def test_every_row_boundary_of_a_stream_can_be_resumed_from():
    # Documents that end exactly where a row ends are the case in which a packer has nothing left over.
    texts = [bytes([i]) * (T - 1) for i in range(6)] + [b"x" * (2 * T + 3)]
    corpus = corpus_of(texts)
    iterator = iter(train.data._ConcatenateIterDataset(_places(corpus), T))
    states, expected = [], []
    for _ in range(8):
        states.append(json.dumps(iterator.get_state()))
        expected.append(next(iterator))
    for start, state in enumerate(states):
        resumed = iter(train.data._ConcatenateIterDataset(_places(corpus), T))
        resumed.set_state(json.loads(state))
        for row in expected[start:]:
            assert_same(next(resumed), row)


def _places(corpus):
    documents = grain.MapDataset.source(corpus.train)
    return documents.map(lambda text: train.data._places(text, BYTE, DataConfig())).to_iter_dataset()


@pytest.mark.parametrize("isolate", [True, False])
def test_the_seed_fixes_the_order_and_epochs_differ(isolate, monkeypatch):
    corpus = corpus_of([bytes([i]) * (T - 1) for i in range(64)])  # one row each

    def order(seed, count):
        monkeypatch.setattr(train.data, "WINDOW_TOKENS", 1)  # 4 rows, so that an epoch is 16 windows
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
    monkeypatch.setattr(train.data, "WINDOW_TOKENS", 0)  # four batches are packed together
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


# Where documents come from.


def write_texts(folder, texts):
    for i, text in enumerate(texts):
        (folder / f"{i:03}.txt").write_text(text)


def contents(documents):
    return sorted(documents[i] for i in range(len(documents)))


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
    held_out = train.corpus._held_out(np.array(digests, dtype=np.uint64), fraction, "x")
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


# What is refused.


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
