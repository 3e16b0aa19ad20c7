"""Trains a byte-level BPE tokenizer on a run's documents: `python -m train train-tokenizer --output FILE`."""

import dataclasses
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from train.config import DataConfig
from train.corpus import load_corpus

END_OF_TEXT, PADDING = "<|endoftext|>", "<|pad|>"
BYTES = 256


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What the command takes; `data` as for training, so that the held-out documents are not read."""

    output: Path  # the tokenizers JSON file to write, for data.tokenizer
    data: DataConfig = DataConfig()  # the documents
    vocab_size: int = 16_384  # tokens, the two special ones included
    max_bytes: int = 200_000_000  # of text to learn from; documents are read in a random order until then


def train_bpe(documents: Iterable[bytes], vocab_size: int) -> str:
    """A byte-level BPE (GPT-2's pieces of text, no normalisation) as the JSON of the `tokenizers` library.

    Every UTF-8 text can be encoded and comes back as it was. It has an end-of-text token and one for padding, and
    `vocab_size` tokens unless the documents run out of pairs to merge.

    Args:
      documents: UTF-8 texts.
      vocab_size: at least 258: a token for each byte and the two special ones.

    Raises:
      ValueError: `vocab_size` is too small.
    """
    if vocab_size < BYTES + 2:
        raise ValueError(f"vocab_size = {vocab_size}: expected at least {BYTES + 2}")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text.decode("utf-8") for text in documents), trainer)
    return tokenizer.to_str()


def train_tokenizer(arguments: Arguments) -> None:
    """Trains on the training documents and writes the file.

    Raises:
      ValueError: a setting or the path of the data is wrong.
    """
    corpus = load_corpus(arguments.data)
    # A fixed order that mixes folders, so that `max_bytes` of a large corpus are a fair sample of it.
    order = sorted(range(len(corpus.train)), key=lambda index: (index * 2654435761) % 2**32)
    documents = _up_to(arguments.max_bytes, (corpus.train[index] for index in order))
    definition = train_bpe(documents, arguments.vocab_size)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = arguments.output.with_name(arguments.output.name + ".tmp")
    unfinished.write_text(definition, encoding="utf-8")
    os.replace(unfinished, arguments.output)
    size = tokenizers.Tokenizer.from_str(definition).get_vocab_size()
    print(f"{arguments.output}: {size} tokens; train with --data.tokenizer {arguments.output}")


def _up_to(max_bytes: int, documents: Iterable[bytes]) -> Iterator[bytes]:
    """Documents until they have `max_bytes` together; the last one may go beyond."""
    total = 0
    for document in documents:
        if total >= max_bytes:
            return
        total += len(document)
        yield document
