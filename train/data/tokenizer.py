"""Text to token ids and back: bytes by default, or any Hugging Face `tokenizers` JSON file."""

import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tokenizers
from jaxtyping import Int32

# Names under which published tokenizers keep their special tokens, the commonest first. DeepSeek's have wide bars.
EOS_NAMES = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "[EOS]",
    "<\uff5cend▁of▁sentence\uff5c>",
    "<|eot_id|>",
    "<|im_end|>",
    "[SEP]",
)
BOS_NAMES = ("<|begin_of_text|>", "<s>", "<bos>", "<|bos|>", "[BOS]", "<\uff5cbegin▁of▁sentence\uff5c>", "[CLS]")
UNFINISHED = "\ufffd"  # what `decode` makes of a character of which bytes are missing
PAD_NAMES = ("<pad>", "<|pad|>", "<|padding|>", "[PAD]", "<|finetune_right_pad_id|>")


class Tokenizer(Protocol):
    """What the trainer asks of a tokenizer.

    `bos_id` stands before a document's first token in the inputs, `eos_id` after its last one in the targets. They may
    be the same token. `pad_id` fills places of weight 0.
    """

    @property
    def vocab_size(self) -> int:
        """Number of ids, special ones included."""

    @property
    def bos_id(self) -> int:
        """Input before the first token of a document."""

    @property
    def eos_id(self) -> int:
        """Target after the last token of a document."""

    @property
    def pad_id(self) -> int:
        """Filler that is never weighed."""

    @property
    def token_bytes(self) -> Int32[np.ndarray, " vocab"]:
        """UTF-8 bytes that each token stands for, 0 for special tokens."""

    def encode(self, text: str | bytes) -> Int32[np.ndarray, " tokens"]:
        """Ids of `text`, without special tokens. Bytes are read as UTF-8."""

    def encode_marker(self, text: str) -> Int32[np.ndarray, " tokens"]:
        """The token with exactly this text, special ones included; if there is none, as `encode`."""

    def decode(self, ids: Any) -> str:
        """Text of `ids`; special tokens are left out and bytes that are not UTF-8 become U+FFFD."""


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
    """One token per byte, then one token for both ends of a document and one for padding: 258 in all."""

    vocab_size: int = 258
    bos_id: int = 256
    eos_id: int = 256
    pad_id: int = 257

    @property
    def token_bytes(self) -> Int32[np.ndarray, " vocab"]:
        """1 for the 256 bytes, 0 for the special tokens."""
        return (np.arange(self.vocab_size) < 256).astype(np.int32)

    def encode(self, text: str | bytes) -> Int32[np.ndarray, " tokens"]:
        """The bytes of `text`, as they are."""
        data = text.encode("utf-8") if isinstance(text, str) else text
        return np.frombuffer(data, dtype=np.uint8).astype(np.int32)

    def encode_marker(self, text: str) -> Int32[np.ndarray, " tokens"]:
        """The bytes of `text`."""
        return self.encode(text)

    def decode(self, ids: Any) -> str:
        """Text of `ids`; special tokens are left out and bytes that are not UTF-8 become U+FFFD."""
        ids = np.asarray(ids, dtype=np.int64).reshape(-1)
        return ids[(ids >= 0) & (ids < 256)].astype(np.uint8).tobytes().decode("utf-8", errors="replace")


@dataclasses.dataclass(frozen=True)
class HuggingFaceTokenizer:
    """A `tokenizers` JSON file; make one with `load_tokenizer`.

    `token_bytes` is exact for byte-level BPE (GPT-2, Llama 3, Qwen) and for SentencePiece with byte fallback (Llama 2,
    Gemma), up to the one space that some of them put before a document. Tokenizers that change the text (lower case,
    WordPiece without spaces) are counted by the text of the token itself.
    """

    definition: str = dataclasses.field(repr=False)  # the JSON
    path: str  # where it came from, for messages
    vocab_size: int = dataclasses.field(init=False)
    bos_id: int = dataclasses.field(init=False)
    eos_id: int = dataclasses.field(init=False)
    pad_id: int = dataclasses.field(init=False)

    def __post_init__(self):
        # Parsed here once, so that a file that is not a tokenizer is refused when it is loaded.
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        eos = next((vocab[name] for name in EOS_NAMES if name in vocab), None)
        if eos is None:
            raise ValueError(
                f"data.tokenizer: {self.path} has no end-of-text token; looked for {', '.join(EOS_NAMES)}. "
                "Add one of these as a special token"
            )
        object.__setattr__(self, "vocab_size", max(vocab.values()) + 1)  # ids may have gaps
        object.__setattr__(self, "eos_id", eos)
        object.__setattr__(self, "bos_id", next((vocab[name] for name in BOS_NAMES if name in vocab), eos))
        object.__setattr__(self, "pad_id", next((vocab[name] for name in PAD_NAMES if name in vocab), eos))

    @functools.cached_property
    def _tokenizer(self) -> tokenizers.Tokenizer:
        try:
            tokenizer = tokenizers.Tokenizer.from_str(self.definition)
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"data.tokenizer: {self.path} is not a tokenizers JSON file: {error}") from error
        try:
            tokenizer.encode("\uffff")  # which no vocabulary has; some tokenizers fail only here
        except Exception as error:
            raise ValueError(f"data.tokenizer: {self.path} has no token for unknown text: {error}") from error
        # A file may carry the truncation and padding of the run that saved it; documents must come through whole.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        # "</s>" in a document is text, not the end of it.
        tokenizer.encode_special_tokens = True
        return tokenizer

    @functools.cached_property
    def _markup_tokenizer(self) -> tokenizers.Tokenizer:
        tokenizer = tokenizers.Tokenizer.from_str(self.definition)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    def __reduce__(self):
        # Data workers build their own: the setting for special tokens is not part of the JSON.
        return type(self), (self.definition, self.path)

    @functools.cached_property
    def token_bytes(self) -> Int32[np.ndarray, " vocab"]:
        """UTF-8 bytes that each token stands for, 0 for special tokens and unused ids."""
        counts = np.zeros(self.vocab_size, dtype=np.int32)
        definition = json.loads(self.definition)
        count = _byte_counter(definition)
        for token, index in self._tokenizer.get_vocab(with_added_tokens=False).items():
            counts[index] = count(token)
        for index, added in self._tokenizer.get_added_tokens_decoder().items():
            counts[index] = 0 if added.special else len(added.content.encode("utf-8"))
        counts[[self.bos_id, self.eos_id, self.pad_id]] = 0
        unknown = (definition.get("model") or {}).get("unk_token")
        if unknown is not None and self._tokenizer.token_to_id(unknown) is not None:
            counts[self._tokenizer.token_to_id(unknown)] = 0
        return counts

    def encode(self, text: str | bytes) -> Int32[np.ndarray, " tokens"]:
        """Ids of `text`, without special tokens. Bytes are read as UTF-8."""
        text = text if isinstance(text, str) else text.decode("utf-8")
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    def encode_marker(self, text: str) -> Int32[np.ndarray, " tokens"]:
        """The token with exactly this text, special ones included; if there is none, as `encode`."""
        token = self._tokenizer.token_to_id(text)
        return self.encode(text) if token is None else np.array([token], dtype=np.int32)

    def encode_markup(self, text: str) -> Int32[np.ndarray, " tokens"]:
        """Ids of `text` in which the names of special tokens stand for these."""
        return np.asarray(self._markup_tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    def special_token_in(self, text: str) -> str | None:
        """The first special token whose name is in `text`, by its id."""
        added = self._tokenizer.get_added_tokens_decoder().values()
        return next((token.content for token in added if token.special and token.content in text), None)

    def decode(self, ids: Any) -> str:
        """Text of `ids`; special tokens are left out and bytes that are not UTF-8 become U+FFFD."""
        ids = np.asarray(ids).reshape(-1).tolist()
        decoder = self._tokenizer.decoder
        if decoder is None or not self._byte_tokens.keys() & set(ids):
            return self._tokenizer.decode(ids, skip_special_tokens=True)
        # The decoder makes U+FFFD of every byte of a run of byte tokens, whole characters included, if one byte is
        # wrong. So the runs are mended before it sees them.
        tokens: list[str] = []
        for is_byte, run in itertools.groupby(ids, key=self._byte_tokens.__contains__):
            if is_byte:
                text = bytes(self._byte_tokens[token] for token in run).decode("utf-8", errors="replace")
                for wrong, part in itertools.groupby(text, key=UNFINISHED.__eq__):
                    tokens += part if wrong else [f"<0x{byte:02X}>" for byte in "".join(part).encode("utf-8")]
            else:
                tokens += [token for token in map(self._tokenizer.id_to_token, run) if token is not None]
        return decoder.decode(tokens)

    @functools.cached_property
    def _byte_tokens(self) -> dict[int, int]:
        """The bytes that tokens of a byte fallback stand for, by id."""
        if not (json.loads(self.definition).get("model") or {}).get("byte_fallback"):
            return {}
        ids = {self._tokenizer.token_to_id(f"<0x{byte:02X}>"): byte for byte in range(256)}
        return {token: byte for token, byte in ids.items() if token is not None}


def load_tokenizer(name_or_path: str) -> Tokenizer:
    """The byte tokenizer for "byte", otherwise the Hugging Face `tokenizers` JSON file at that path.

    Raises ValueError where the file is missing, is no such file, or has no end-of-text token.
    """
    if name_or_path == "byte":
        return ByteTokenizer()
    try:
        path = Path(name_or_path).expanduser()
        if not path.is_file():
            raise ValueError(f'data.tokenizer: {name_or_path} is not a file; expected "byte" or a tokenizers JSON file')
        definition = path.read_text(encoding="utf-8")
    except (OSError, RuntimeError, UnicodeDecodeError) as error:  # a name too long, ~ of nobody, not UTF-8
        raise ValueError(f"data.tokenizer: cannot read {name_or_path} as a tokenizers JSON file: {error}") from error
    return HuggingFaceTokenizer(definition, name_or_path)


def _byte_counter(definition: dict[str, Any]) -> Callable[[str], int]:
    """A function from a token of the model's vocabulary to the number of UTF-8 bytes it stands for."""
    parts = json.dumps([definition.get("pre_tokenizer"), definition.get("decoder")], ensure_ascii=False)
    if '"ByteLevel"' in parts:
        return len  # each character of a byte-level token is one byte in disguise
    has_metaspace = '"Metaspace"' in parts or "\u2581" in parts
    model = definition.get("model") or {}
    prefix = model.get("continuing_subword_prefix") or ""
    suffix = model.get("end_of_word_suffix") or ""

    def count(token: str) -> int:
        if model.get("byte_fallback") and re.fullmatch("<0x[0-9A-F]{2}>", token):
            return 1
        token = token.removeprefix(prefix)
        # An end-of-word mark stands for the space after the word.
        space = bool(suffix) and token.endswith(suffix)
        token = token.removesuffix(suffix)
        if has_metaspace:
            token = token.replace("\u2581", " ")
        return len(token.encode("utf-8")) + space

    return count
