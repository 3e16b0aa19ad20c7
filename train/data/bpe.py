"""A byte-level BPE tokenizer, learnt from documents."""

from collections.abc import Iterable

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

END_OF_TEXT, PADDING = "<|endoftext|>", "<|pad|>"
BYTES = 256


def byte_tokenizer() -> str:
    """The trainer's byte tokenizer, with the same ids, as the JSON of the `tokenizers` library."""
    # Byte-level BPE writes a byte as a character: itself if it can be seen, and otherwise one from 256 on.
    seen = {*range(33, 127), *range(161, 173), *range(174, BYTES)}
    unseen = [byte for byte in range(BYTES) if byte not in seen]
    characters = [chr(byte if byte in seen else BYTES + unseen.index(byte)) for byte in range(BYTES)]
    vocab = {token: index for index, token in enumerate([*characters, END_OF_TEXT, PADDING])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT, PADDING])
    return tokenizer.to_str()


def check_vocab_size(vocab_size: int) -> None:
    """Raises ValueError where the bytes and the two special tokens would not fit."""
    if vocab_size < BYTES + 2:
        raise ValueError(f"vocab_size = {vocab_size}: expected at least {BYTES + 2}")


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
    check_vocab_size(vocab_size)
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
