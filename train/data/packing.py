"""Documents to rows: each is tokenized, cut or joined to others, and packed into batches of rows of T tokens.

A place is one position of a document, as (input, target, weight).
"""

import functools
from typing import Any

import grain
import numpy as np
from grain import experimental as grain_experimental
from jaxtyping import Int32

from train.config import DataConfig
from train.data.formats import format_of
from train.data.tokenizer import Tokenizer

Batch = dict[str, np.ndarray]
# Tokens that are packed and shuffled together. More of them mix documents better inside a batch and waste less padding;
# fewer of them start and resume faster, because a resumed iterator packs the current window again. Of the standard
# library's source, at T = 8192 and blocks of 64, 2**20 leave 2.1 % padding, 2**21 leave 1.7 % and 2**22 leave 1.2 %.
WINDOW_TOKENS = 2**22
WINDOW_ROWS = 8192  # at most, because placing a document takes time in proportion to the rows it may go to


def packed_batches(
    documents: grain.MapDataset[bytes], num_bytes: int, tokenizer: Tokenizer, config: DataConfig, align: int, rows: int
) -> grain.IterDataset[Batch]:
    """Documents in the given order, about `num_bytes` an epoch, to batches of `rows` rows."""
    length = config.sequence_length
    # No more than an epoch: packing a small corpus many times over before the first batch would help nobody.
    window = min(WINDOW_ROWS, max(4 * rows, WINDOW_TOKENS // length), max(rows, num_bytes // length))
    # Reading and tokenizing run ahead in threads, by a few documents only because some are huge.
    ahead = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
    places = documents.map(functools.partial(to_places, tokenizer=tokenizer, config=config)).to_iter_dataset(ahead)
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
        packed = ConcatenateIterDataset(places, length)
        packed = grain_experimental.WindowShuffleIterDataset(packed, window_size=window, seed=config.seed)
    batch_and_pad = functools.partial(grain_experimental.batch_and_pad, batch_size=rows)
    finish = functools.partial(
        _finish_batch,
        pad_id=tokenizer.pad_id,
        token_bytes=tokenizer.token_bytes,
        isolate_documents=config.isolate_documents,
    )
    return packed.batch(rows, batch_fn=batch_and_pad).map(finish)


def to_places(document: bytes, tokenizer: Tokenizer, config: DataConfig) -> Int32[np.ndarray, "tokens 3"]:
    """(input, target, weight) at each position of a document. However it is cut, each target is in exactly one part."""
    text_format = format_of(config)
    ids, learnt = text_format.encode(document, tokenizer, config)
    weights = np.append(learnt, text_format.learns_end)
    return np.stack(
        [np.append(tokenizer.bos_id, ids), np.append(ids, tokenizer.eos_id), weights], axis=1, dtype=np.int32
    )


class _Cut(grain_experimental.FlatMapTransform):
    """Cuts a document's places into pieces of at most `length`."""

    def __init__(self, length: int):
        self._length = length

    def flat_map(self, element: np.ndarray) -> list[dict[str, np.ndarray]]:
        return [{"places": element[i : i + self._length]} for i in range(0, len(element), self._length)]


class ConcatenateIterDataset(grain.IterDataset):
    """Documents one after the other, cut into rows of `length`; only the very last row can have padding.

    Grain's ConcatThenSplitIterDataset is not used because its state does not survive JSON, in which Grain itself saves
    it: a tuple comes back as a list, and restoring then silently drops a document (seen in Grain 0.2.18).
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
