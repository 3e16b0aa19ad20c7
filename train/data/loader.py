"""Text to batches: finding documents, holding some out, packing them into rows, shuffling, sharding over hosts.

The training iterator is a Grain pipeline: documents in a new order each epoch, tokens, rows of T, batches. Its state is
a handful of integers, and an iterator that is given the state goes on with the very next batch.
"""

import functools
from collections.abc import Iterable
from typing import Any

import grain
import jax
import numpy as np
from absl import flags
from grain import experimental as grain_experimental
from jaxtyping import Int32

from train.config import DataConfig
from train.data import chat
from train.data.corpus import Corpus
from train.data.tokenizer import Tokenizer

Batch = dict[str, np.ndarray]
# Tokens that are packed and shuffled together. More of them mix documents better inside a batch and waste less padding;
# fewer of them start and resume faster, because a resumed iterator packs the current window again. Of the standard
# library's source, at T = 8192 and blocks of 64, 2**20 leave 2.1 % padding, 2**21 leave 1.7 % and 2**22 leave 1.2 %.
WINDOW_TOKENS = 2**22
WINDOW_ROWS = 8192  # at most, because placing a document takes time in proportion to the rows it may go to


def train_batches(
    corpus: Corpus,
    tokenizer: Tokenizer,
    config: DataConfig,
    *,
    align: int,
    process_index: int | None = None,
    process_count: int | None = None,
    num_epochs: int | None = None,
) -> grain.DatasetIterator[Batch]:
    """This host's share of every training batch, in an order that the seed fixes.

    Of the documents, in a new order each epoch, each host takes every `process_count`-th, and yields batch_size /
    process_count rows; so after as many batches, any number of hosts has come about equally far in that order. With
    `isolate_documents` each document starts on a multiple of `align` and never continues in another row: a document
    longer than T is cut, and each piece is a segment of its own. Without, documents follow one another without gaps. In
    both cases every token of a document, and one end-of-text token, is a target exactly once an epoch, and the input
    before a document's first token is the beginning-of-text token. Of
    conversations only what the assistant says has weight; see `train.chat`.

    Args:
      align: the selection block of the model.
      process_index, process_count: this host among all that load different rows (`sharding.data_shards`); default:
        those of JAX.
      num_epochs: passes over the documents; None: no end. The last batch is filled with rows of weight 0.

    Yields dicts of [batch_size / process_count, T] arrays: "tokens", "targets", "target_bytes" int32, "weights"
    float32, and "segment_ids" int32 if `isolate_documents`. `get_state` and `set_state` of the iterator save and
    restore the place in JSON's types. With `config.workers` the order depends on their number, and the iterator needs
    `close`.

    Raises ValueError where settings contradict each other, and where there are fewer documents than hosts.
    """
    _validate(config, align)
    process_index, process_count = _processes(config, process_index, process_count)
    if len(corpus.train) < process_count:
        raise ValueError(
            f"data.path: {corpus.name} has {len(corpus.train)} training documents for {process_count} processes; "
            "each needs at least one"
        )
    documents = grain.MapDataset.source(corpus.train).shuffle(config.seed).repeat(num_epochs)
    documents = documents[process_index::process_count]
    num_bytes = corpus.num_bytes // process_count
    batches = _batches(documents, num_bytes, tokenizer, config, align, config.batch_size // process_count)
    if config.workers:
        # Grain's worker processes ask absl for flags, which the command line of this trainer does not use.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(num_workers=config.workers, per_worker_buffer_size=2)
        batches = batches.mp_prefetch(options)
    else:
        # One thread prepares the next batches while the device works on this one.
        batches = grain_experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=2)
    return iter(batches)


def held_out_batches(
    corpus: Corpus,
    tokenizer: Tokenizer,
    config: DataConfig,
    *,
    align: int,
    process_index: int | None = None,
    process_count: int | None = None,
) -> Iterable[Batch]:
    """One pass over the held-out documents, the same batches in the same order every time it is iterated.

    Each document counts exactly once: the last batch is filled with rows of weight 0. The order is shuffled once, so
    that the first few batches are a fair sample. Every host packs all documents and yields its own rows of each batch,
    so that all have equally many. Batches and errors are those of `train_batches`.
    """
    _validate(config, align)
    process_index, process_count = _processes(config, process_index, process_count)
    documents = grain.MapDataset.source(corpus.held_out).shuffle(config.seed)
    batches = _batches(documents, corpus.num_bytes, tokenizer, config, align, config.batch_size)
    rows = config.batch_size // process_count
    mine = slice(process_index * rows, (process_index + 1) * rows)
    return batches.map(lambda batch: {key: value[mine] for key, value in batch.items()})


def _validate(config: DataConfig, align: int) -> None:
    for name in ("sequence_length", "batch_size"):
        if getattr(config, name) < 1:
            raise ValueError(f"data.{name} must be at least 1, got {getattr(config, name)}")
    if config.workers < 0:
        raise ValueError(f"data.workers must be at least 0, got {config.workers}")
    if align < 1:
        raise ValueError(f"align must be at least 1, got {align}")
    if config.isolate_documents and config.sequence_length % align:
        raise ValueError(
            f"data.sequence_length = {config.sequence_length} must be a multiple of the selection block ({align}), "
            "because isolate_documents starts every document on one"
        )


def _processes(config: DataConfig, index: int | None, count: int | None) -> tuple[int, int]:
    index = jax.process_index() if index is None else index
    count = jax.process_count() if count is None else count
    if not 0 <= index < count:
        raise ValueError(f"process_index must be in [0, process_count), got {index} of {count}")
    if config.batch_size % count:
        raise ValueError(f"data.batch_size = {config.batch_size} must be a multiple of the {count} processes")
    return index, count


def _batches(
    documents: grain.MapDataset[bytes], num_bytes: int, tokenizer: Tokenizer, config: DataConfig, align: int, rows: int
) -> grain.IterDataset[Batch]:
    """Documents in the given order, about `num_bytes` an epoch, to batches of `rows` rows."""
    length = config.sequence_length
    # No more than an epoch: packing a small corpus many times over before the first batch would help nobody.
    window = min(WINDOW_ROWS, max(4 * rows, WINDOW_TOKENS // length), max(rows, num_bytes // length))
    # Reading and tokenizing run ahead in threads, by a few documents only because some are huge.
    ahead = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
    places = documents.map(functools.partial(_places, tokenizer=tokenizer, config=config)).to_iter_dataset(ahead)
    packed: grain.IterDataset
    if config.isolate_documents:
        pieces = grain_experimental.FlatMapIterDataset(places, _Cut(length))
        packed = grain_experimental.BestFitPackIterDataset(
            pieces,
            length_struct={"places": length},
            num_packing_bins=window,
            seed=config.seed,
            shuffle_bins=True,  # pieces of one document go to rows next to one another
            pack_alignment_struct={"places": align},
        )
    else:
        packed = _ConcatenateIterDataset(places, length)
        packed = grain_experimental.WindowShuffleIterDataset(packed, window_size=window, seed=config.seed)
    batch_and_pad = functools.partial(grain_experimental.batch_and_pad, batch_size=rows)
    finish = functools.partial(
        _finish_batch,
        pad_id=tokenizer.pad_id,
        token_bytes=tokenizer.token_bytes,
        isolate_documents=config.isolate_documents,
    )
    return packed.batch(rows, batch_fn=batch_and_pad).map(finish)


def _places(document: bytes, tokenizer: Tokenizer, config: DataConfig) -> Int32[np.ndarray, "tokens 3"]:
    """(input, target, weight) at each place of a document; wherever these are cut, each target is in just one piece."""
    if config.format == "chat":
        ids, learnt = chat.encode(chat.from_document(document), tokenizer, config)
        weights = np.append(learnt, False)
    else:
        ids = tokenizer.encode(document)
        weights = np.ones(len(ids) + 1, dtype=np.int32)
    return np.stack(
        [np.append(tokenizer.bos_id, ids), np.append(ids, tokenizer.eos_id), weights], axis=1, dtype=np.int32
    )


class _Cut(grain_experimental.FlatMapTransform):
    """Cuts a document's places into pieces of at most `length`."""

    def __init__(self, length: int):
        self._length = length

    def flat_map(self, element: np.ndarray) -> list[dict[str, np.ndarray]]:
        return [{"places": element[i : i + self._length]} for i in range(0, len(element), self._length)]


class _ConcatenateIterDataset(grain.IterDataset):
    """Documents one after the other, cut into rows of `length`; only the very last row can have padding.

    Grain's ConcatThenSplitIterDataset is not used because its state does not survive JSON, in which Grain itself saves
    it: a tuple comes back as a list, and restoring then drops a document without a word (seen in Grain 0.2.18).
    """

    def __init__(self, parent: grain.IterDataset, length: int):
        super().__init__(parent)
        self._length = length

    def __iter__(self) -> grain.DatasetIterator:
        return _ConcatenateIterator(iter(self._parent), self._length)


class _ConcatenateIterator(grain.DatasetIterator):
    def __init__(self, parent: grain.DatasetIterator, length: int):
        super().__init__(parent)
        self._length = length
        self._document = np.empty((0, 3), dtype=np.int32)
        self._before_document = self._parent.get_state()  # the parent's state from which the document is read again
        self._offset = 0  # places of the document that earlier rows hold

    def __next__(self) -> dict[str, np.ndarray]:
        places = np.zeros((self._length, 3), dtype=np.int32)
        filled = 0
        while filled < self._length:
            if self._offset == len(self._document):
                before = self._parent.get_state()
                try:
                    document = next(self._parent)
                except StopIteration:
                    if filled == 0:
                        raise
                    break
                self._document, self._before_document, self._offset = document, before, 0
            taken = self._document[self._offset : self._offset + self._length - filled]
            places[filled : filled + len(taken)] = taken
            filled += len(taken)
            self._offset += len(taken)
        return {"places": places, "places_segment_ids": (np.arange(self._length) < filled).astype(np.int32)}

    def get_state(self) -> dict[str, Any]:
        return {"parent": self._before_document, "offset": self._offset}

    def set_state(self, state: dict[str, Any]) -> None:
        self._before_document, self._offset = state["parent"], state["offset"]
        self._parent.set_state(self._before_document)
        # A document has at least one place, so an offset of 0 means that none was begun.
        self._document = next(self._parent) if self._offset else np.empty((0, 3), dtype=np.int32)


def _finish_batch(
    packed: dict[str, np.ndarray], *, pad_id: int, token_bytes: np.ndarray, isolate_documents: bool
) -> Batch:
    """Packed places [B, T, 3] and segments [B, T] (from 1; 0 where nothing was packed) to the trainer's batch."""
    segments = packed["places_segment_ids"]
    valid = segments > 0
    tokens, targets = (np.where(valid, packed["places"][..., i], np.int32(pad_id)) for i in range(2))
    weights = np.where(valid, packed["places"][..., 2], np.int32(0))
    batch = {
        "tokens": tokens,
        "targets": targets,
        "weights": weights.astype(np.float32),
        "target_bytes": np.where(weights > 0, token_bytes[targets], np.int32(0)),
    }
    if isolate_documents:
        # Padding belongs to the document before it, which cannot see it, so that the ids never decrease.
        batch["segment_ids"] = np.maximum.accumulate(segments, axis=1)
    return batch
