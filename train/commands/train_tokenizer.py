"""Trains a byte-level BPE tokenizer on a run's documents: `python -m train train-tokenizer --output FILE`."""

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path

import tokenizers

from train.commands.output import check_output
from train.config import DataConfig
from train.data.bpe import check_vocab_size, train_bpe
from train.data.corpus import describe, load_corpus
from train.data.formats import format_of
from train.run_folder import write


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What the command takes; `data` as for training, so that the held-out documents are not read."""

    output: Path  # the tokenizers JSON file to write, for data.tokenizer
    data: DataConfig = DataConfig()  # the documents
    vocab_size: int = 16_384  # tokens, the two special ones included
    max_bytes: int = 200_000_000  # of text to learn from; documents are read in a random order until then


def train_tokenizer(arguments: Arguments) -> None:
    """Trains on the training documents and writes the file.

    Raises:
      ValueError: a setting, the path of the data or that of the file is wrong.
    """
    check_output("output", arguments.output)
    if arguments.max_bytes < 1:
        raise ValueError(f"max_bytes = {arguments.max_bytes}: expected at least 1")
    check_vocab_size(arguments.vocab_size)
    corpus, texts = load_corpus(arguments.data), format_of(arguments.data).texts
    print(*describe(corpus), sep="\n")
    # A fixed order that mixes folders, so that `max_bytes` of a large corpus are a fair sample of it.
    order = sorted(range(len(corpus.train)), key=lambda index: (index * 2654435761) % 2**32)
    documents = _up_to(arguments.max_bytes, (text for index in order for text in texts(corpus.train[index])))
    definition = train_bpe(documents, arguments.vocab_size)
    write(arguments.output, definition)
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
