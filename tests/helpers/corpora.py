"""Small corpora, and what tests ask of batches."""

import dataclasses

import numpy as np

from train.config import DataConfig
from train.data.corpus import Corpus, Documents
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
    """A corpus of documents that lie in memory."""

    def documents(texts):
        zeros = np.zeros(len(texts), dtype=np.int32)
        return Documents((InMemory(tuple(texts)),), zeros, np.arange(len(texts)))

    return Corpus("memory", documents(texts), documents(held_out), (), sum(map(len, texts)), "")


def random_texts(count=40, seed=0, longest=100):
    """Documents of random bytes."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, rng.integers(1, longest), dtype=np.uint8).tobytes() for _ in range(count)]


def config(**changes):
    """Batches of four rows of T tokens, with changes."""
    return DataConfig(**{"sequence_length": T, "batch_size": 4, **changes})


def rows(batches):
    """Rows of the batches as dicts of [T] arrays."""
    return [{key: value[i] for key, value in batch.items()} for batch in batches for i in range(len(batch["tokens"]))]


def assert_same(left, right):
    """Two batches are equal."""
    assert left.keys() == right.keys()
    for key in left:
        np.testing.assert_array_equal(left[key], right[key])


def write_texts(folder, texts):
    """One file for each text."""
    for i, text in enumerate(texts):
        (folder / f"{i:03}.txt").write_text(text)


def contents(documents):
    """The documents, sorted."""
    return sorted(documents[i] for i in range(len(documents)))
