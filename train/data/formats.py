"""The formats of text files: how a file becomes documents, and a document tokens.

A new format is a `Format` with its name in `FORMATS`.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from jaxtyping import Bool, Int32

from train.data import chat

if TYPE_CHECKING:  # the config reads the names of `FORMATS`
    from train.config import DataConfig
    from train.data.tokenizer import Tokenizer

Encoded = tuple[Int32[np.ndarray, " tokens"], Bool[np.ndarray, " tokens"]]


class Skip(Exception):
    """Why a file or a record is not a document."""


class Source(Protocol):
    """A file that holds documents."""

    @property
    def path(self) -> str:
        """Where it is."""

    def scan(self) -> Iterator[tuple[int, bytes | Skip]]:
        """Every record of the file: its position, and the text or the reason why there is none."""

    def read(self, position: int) -> bytes:
        """The text at a position that `scan` gave."""

    def name(self, position: int) -> str:
        """What messages call the record at a position."""


@dataclasses.dataclass(frozen=True)
class TextFile:
    """One document."""

    path: str

    def scan(self) -> Iterator[tuple[int, bytes | Skip]]:
        """The one document, if it is UTF-8."""
        text = self.read(0)
        try:
            text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise Skip(f"not UTF-8 at byte {error.start}") from error
        yield 0, text

    def read(self, position: int) -> bytes:
        """The whole file."""
        return Path(self.path).read_bytes()

    def name(self, position: int) -> str:
        """The file."""
        return self.path


@dataclasses.dataclass(frozen=True)
class JsonLinesFile:
    """One document per line: what `extract` makes of the line's JSON. Only the offsets of lines are kept in memory."""

    path: str
    extract: Callable[[Any], bytes]

    def scan(self) -> Iterator[tuple[int, bytes | Skip]]:
        """Every line that is not empty."""
        position = 0
        with open(self.path, "rb") as file:
            for line in file:
                if line.strip():
                    try:
                        yield position, self._text(line)
                    except Skip as skip:
                        yield position, skip
                position += len(line)

    def read(self, position: int) -> bytes:
        """The line at an offset."""
        with open(self.path, "rb") as file:
            file.seek(position)
            return self._text(file.readline())

    def name(self, position: int) -> str:
        """The file and the offset of the line."""
        return f"{self.path}:{position}"

    def _text(self, line: bytes) -> bytes:
        try:
            record = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise Skip(f"not UTF-8 JSON: {error}") from error
        return self.extract(record)


def _field_text(record: Any, field: str) -> bytes:
    text = record.get(field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise Skip(f"no text in field {field!r}")
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
        raise Skip(f"field {field!r} is not valid Unicode") from error


def _conversation(record: Any) -> bytes:
    try:
        return chat.to_document(chat.parse(record))
    except UnicodeEncodeError as error:
        raise Skip("a message is not valid Unicode") from error
    except ValueError as error:
        raise Skip(str(error)) from error


@dataclasses.dataclass(frozen=True)
class ParquetFile:
    """One document per row. The text column stays in memory: row groups are too large to decode for every document."""

    path: str
    field: str

    def scan(self) -> Iterator[tuple[int, bytes | Skip]]:
        """Every row."""
        column = self._column
        for row in range(len(column)):
            text = column[row].as_py()
            yield row, Skip(f"null in column {self.field!r}") if text is None else text.encode("utf-8")

    def read(self, position: int) -> bytes:
        """A row."""
        return self._column[position].as_py().encode("utf-8")

    def name(self, position: int) -> str:
        """The file and the row."""
        return f"{self.path}:{position}"

    @functools.cached_property
    def _column(self) -> Any:
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError as error:
            raise ImportError(f"{self.path}: Parquet needs pyarrow; install nsa-jax[parquet]") from error
        try:
            # One file at a time: the data set reader would also take columns from folder names like lang=en.
            with parquet.ParquetFile(self.path) as file:
                if self.field not in file.schema_arrow.names:
                    raise Skip(f"no column {self.field!r} among {', '.join(file.schema_arrow.names)}")
                column = file.read(columns=[self.field]).column(0)
            if pyarrow.types.is_dictionary(column.type):
                column = column.cast(column.type.value_type)
            if not (pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)):
                raise Skip(f"column {self.field!r} has type {column.type}, not string")
            return column
        except pyarrow.ArrowException as error:
            raise Skip(f"not a Parquet file: {error}") from error


def encode_text(document: bytes, tokenizer: "Tokenizer", config: "DataConfig") -> Encoded:
    """Token ids of a document of plain text, all of which are learnt."""
    ids = tokenizer.encode(document)
    return ids, np.ones(len(ids), dtype=bool)


def encode_conversation(document: bytes, tokenizer: "Tokenizer", config: "DataConfig") -> Encoded:
    """Token ids of a conversation, and which of them are learnt (`train.data.chat`)."""
    return chat.encode(chat.from_document(document), tokenizer, config)


@dataclasses.dataclass(frozen=True)
class Format:
    """How files of one format are read."""

    open: Callable[[str, "DataConfig"], Source]  # a file by its path
    endings: tuple[str, ...] = ()  # of the files that `data.format = auto` reads so; documents of these are plain text
    encode: Callable[[bytes, "Tokenizer", "DataConfig"], Encoded] = (
        encode_text  # ids of a document, and which are learnt
    )
    learns_end: bool = True  # whether the end-of-text token behind a document is learnt


FORMATS = {
    "text": Format(lambda path, config: TextFile(path)),
    "jsonl": Format(
        lambda path, config: JsonLinesFile(path, functools.partial(_field_text, field=config.text_field)),
        endings=(".jsonl", ".ndjson"),
    ),
    "parquet": Format(lambda path, config: ParquetFile(path, config.text_field), endings=(".parquet", ".pq")),
    "chat": Format(
        lambda path, config: JsonLinesFile(path, _conversation), encode=encode_conversation, learns_end=False
    ),
}


def format_of(config: "DataConfig", path: str = "") -> Format:
    """The format that the config names or, where that is "auto", that of the file's ending, which may be plain text."""
    if config.format != "auto":
        return FORMATS[config.format]
    ending = Path(path).suffix.lower()
    return next((found for found in FORMATS.values() if ending in found.endings), FORMATS["text"])
