"""Text to batches: finding documents, holding some out, packing them into rows, shuffling, sharding over hosts.

The training iterator is a Grain pipeline: documents in a new order each epoch, tokens, rows of T, batches. Its state is
a handful of integers, and an iterator that is given the state goes on with the very next batch.
"""

import sys
from collections.abc import Iterable
from typing import Any

import grain
import jax
from absl import flags
from grain import experimental as grain_experimental

from train.config import DataConfig
from train.data.corpus import Corpus, Documents
from train.data.packing import Batch, packed_batches
from train.data.tokenizer import Tokenizer
from train.signals import follow_parent


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

    Documents come in a new order each epoch, `neighbours` that follow one another in their files at a time. Each host
    takes every `process_count`-th such run, and yields batch_size / process_count rows. So after the same number of
    batches, any number of hosts is about equally far in that order.

    With `isolate_documents` each document starts on a multiple of `align` and never continues in another row: a
    document longer than T is cut, and each part is a segment of its own. Without it, documents follow one another
    without gaps. In both cases every token of a document, and one end-of-text token, is a target exactly once an epoch.
    The input before a document's first token is the beginning-of-text token. In conversations only what the assistant
    says has weight; see `train.data.chat`.

    Args:
      align: the selection block of the model.
      process_index, process_count: this host among all that load different rows (`sharding.data_shards`); default:
        those of JAX.
      num_epochs: passes over the documents; None: no end. The last batch is filled with rows of weight 0.

    Yields dicts of [batch_size / process_count, T] arrays: "tokens", "targets", "target_bytes" int32, "weights"
    float32, and "segment_ids" int32 if `isolate_documents`. `get_state` and `set_state` of the iterator save and
    restore the position, as a value that JSON can hold. With `config.workers` the order depends on their number, and
    the iterator needs `close`.

    Raises ValueError where settings contradict each other, and where there are fewer documents than hosts.
    """
    _validate(config, align)
    process_index, process_count = _processes(config, process_index, process_count)
    num_runs = -(-len(corpus.train) // config.neighbours)
    if num_runs < process_count:
        raise ValueError(
            f"data.path: {corpus.name} has {len(corpus.train)} training documents for {process_count} processes; "
            f"each needs at least one{f' run of {config.neighbours}' if config.neighbours > 1 else ''}"
        )
    runs = grain.MapDataset.range(num_runs)
    runs = runs.shuffle(config.seed).repeat(num_epochs)[process_index::process_count]
    documents = NeighboursMapDataset(runs, corpus.train, config.neighbours)
    num_bytes = corpus.num_bytes // process_count
    batches = packed_batches(documents, num_bytes, tokenizer, config, align, config.batch_size // process_count)
    if config.workers:
        # Grain's worker processes ask absl for flags, which the command line of this trainer does not use.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(num_workers=config.workers, per_worker_buffer_size=2)
        batches = batches.mp_prefetch(options, worker_init_fn=follow_parent)
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
    so that all hosts have the same number of batches. For batches and errors see `train_batches`.
    """
    _validate(config, align)
    process_index, process_count = _processes(config, process_index, process_count)
    runs = grain.MapDataset.range(-(-len(corpus.held_out) // config.neighbours)).shuffle(config.seed)
    documents = NeighboursMapDataset(runs, corpus.held_out, config.neighbours)
    batches = packed_batches(documents, corpus.num_bytes, tokenizer, config, align, config.batch_size)
    rows = config.batch_size // process_count
    mine = slice(process_index * rows, (process_index + 1) * rows)
    return batches.map(lambda batch: {key: value[mine] for key, value in batch.items()})


class NeighboursMapDataset(grain.MapDataset):
    """The documents of runs: run i holds the `neighbours` documents from i * neighbours on, in their order."""

    def __init__(self, runs: grain.MapDataset[int], documents: Documents, neighbours: int):
        super().__init__(runs)
        self._documents, self._neighbours = documents, neighbours

    def __len__(self) -> int:
        return min(len(self._parent) * self._neighbours, sys.maxsize)  # endless repetition is that long already

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        run, place = divmod(index, self._neighbours)
        document = self._parent[run] * self._neighbours + place
        return self._documents[document] if document < len(self._documents) else None  # which Grain leaves out


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
