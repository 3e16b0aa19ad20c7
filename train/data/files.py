"""Files that hold records: what unpacks them, and what takes them apart. What a record says is for `formats` to read.

A new kind of file is a class here with its endings in `RECORD_FILES`; a new compression is a line of `COMPRESSIONS`.
"""

import bz2
import codecs
import dataclasses
import functools
import gzip
import io
import json
import lzma
import reprlib
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol


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


class Layout(NamedTuple):
    """Where in a record the document is."""

    fields: tuple[str, ...]  # that `extract` reads; a table's other columns are not decoded
    extract: Callable[[Any], bytes]  # from a record to the document; raises Skip
    needs: tuple[str, ...]  # fields without which a table has no documents
    plain: bool  # the fields hold text, and nothing nested


def _unpack(open_file: Callable[..., Any], damaged: tuple[type[Exception], ...], path: str) -> bytes:
    try:
        with open_file(path, "rb") as file:
            return file.read()
    except damaged as error:
        raise Skip(f"cannot be unpacked: {error}") from error


def _unpack_zstd(path: str) -> bytes:
    try:
        from backports import zstd
    except ImportError as error:
        raise ValueError(f"data.path: {path}: zst files need backports.zstd; install nsa-jax[train]") from error
    return _unpack(zstd.open, (EOFError, zstd.ZstdError), path)


COMPRESSIONS: dict[str, Callable[[str], bytes]] = {
    ".gz": functools.partial(_unpack, gzip.open, (EOFError, OSError, zlib.error)),
    ".bz2": functools.partial(_unpack, bz2.open, (EOFError, OSError)),
    ".xz": functools.partial(_unpack, lzma.open, (EOFError, lzma.LZMAError)),
    ".zst": _unpack_zstd,
}


def is_compressed(path: str) -> bool:
    """Whether a file is to be unpacked, as its ending says."""
    return Path(path.lower()).suffix in COMPRESSIONS


def ending(path: str) -> str:
    """How a file's name ends, in lower case, without the ending of a compression: .jsonl for a.JSONL.gz."""
    file = Path(path.lower())
    return Path(file.stem).suffix if is_compressed(path) else file.suffix


def contents(path: str) -> bytes:
    """All of a file, unpacked.

    Raises Skip where it cannot be unpacked, and OSError where it cannot be read.
    """
    return COMPRESSIONS[Path(path.lower()).suffix](path) if is_compressed(path) else Path(path).read_bytes()


def shown(value: Any) -> str:
    """A value for a message, cut where it is long."""
    return reprlib.repr(value)


@dataclasses.dataclass(frozen=True)
class TextFile:
    """One document, without a byte-order mark."""

    path: str

    def scan(self) -> Iterator[tuple[int, bytes | Skip]]:
        """The one document, if it is UTF-8 and no binary file."""
        text = self.read(0)
        try:
            text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise Skip(f"not UTF-8 at byte {error.start}") from error
        if (nul := text.find(b"\0")) >= 0:  # UTF-16 and arrays of numbers can be valid UTF-8
            raise Skip(f"not text: a zero at byte {nul}")
        yield 0, text

    def read(self, position: int) -> bytes:
        """The whole file."""
        return contents(self.path).removeprefix(codecs.BOM_UTF8)

    def name(self, position: int) -> str:
        """The file."""
        return self.path


@dataclasses.dataclass(frozen=True)
class RecordFile:
    """A file of records, each of which holds a document as `layout` says."""

    path: str
    layout: Layout

    def name(self, position: int) -> str:
        """The file and the record: which of them, or the offset of its line."""
        return f"{self.path}:{position}"


class JsonLinesFile(RecordFile):
    """A record per line of JSON. Only the offsets of lines stay in memory, unless the file is compressed."""

    def scan(self) -> Iterator[tuple[int, bytes | Skip]]:
        """Every line that is not empty."""
        position = 0
        with self._open() as file:
            for line in file:
                if line.strip():
                    yield position, _attempt(self._text, line)
                position += len(line)

    def read(self, position: int) -> bytes:
        """The line at an offset."""
        with self._open() as file:
            file.seek(position)
            return self._text(file.readline())

    def _text(self, line: bytes) -> bytes:
        return self.layout.extract(_parse_json(line))

    def _open(self) -> BinaryIO:
        return io.BytesIO(self._unpacked) if is_compressed(self.path) else open(self.path, "rb")

    @functools.cached_property
    def _unpacked(self) -> bytes:
        return contents(self.path)


class JsonFile(RecordFile):
    """An array of records, one record, or JSON lines under another name. The documents stay in memory."""

    def scan(self) -> Iterator[tuple[int, bytes | Skip]]:
        """Every record."""
        yield from enumerate(self._documents)

    def read(self, position: int) -> bytes:
        """A record's document."""
        document = self._documents[position]
        if isinstance(document, Skip):
            raise document
        return document

    @functools.cached_property
    def _documents(self) -> list[bytes | Skip]:
        data = contents(self.path)
        if not data.strip():
            raise Skip("empty")
        try:
            whole = _parse_json(data)
        except Skip as skip:
            lines = [line for line in data.splitlines() if line.strip()]
            if isinstance(_attempt(_parse_json, lines[0]), Skip):  # then these are no JSON lines either
                raise skip
            return [_attempt(lambda line: self.layout.extract(_parse_json(line)), line) for line in lines]
        return [_attempt(self.layout.extract, record) for record in (whole if isinstance(whole, list) else [whole])]


class TableFile(RecordFile):
    """A record per row. The columns that are read stay in memory: parts of files are too large to decode for a row."""

    def scan(self) -> Iterator[tuple[int, bytes | Skip]]:
        """Every row."""
        for row in range(len(self._table)):
            yield row, _attempt(self._text, row)

    def read(self, position: int) -> bytes:
        """A row's document."""
        return self._text(position)

    def _text(self, row: int) -> bytes:
        try:
            record = {name: self._table.column(name)[row].as_py() for name in self._table.column_names}
            # Text is read as bytes, so that a row that is no UTF-8 is one row.
            decoded = {name: x.decode("utf-8") if isinstance(x, bytes) else x for name, x in record.items()}
        except UnicodeDecodeError as error:
            raise Skip(f"not UTF-8 at byte {error.start}") from error
        return self.layout.extract(decoded)

    @functools.cached_property
    def _table(self) -> Any:
        try:
            import pyarrow
        except ImportError as error:
            raise ValueError(f"data.path: {self.path}: tables need pyarrow; install nsa-jax[parquet]") from error
        unpacked = contents(self.path) if is_compressed(self.path) else None
        try:
            with pyarrow.OSFile(self.path) if unpacked is None else pyarrow.BufferReader(unpacked) as file:
                table = self._read(file)
            table = _as_bytes(table) if self.layout.plain else table
            table.validate(full=True)
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise Skip(f"not a table that can be read: {error}") from error
        return table

    def _read(self, file: Any) -> Any:
        """The columns of the layout, as a pyarrow table."""
        raise NotImplementedError

    def _columns(self, names: list[str]) -> list[str]:
        """Which of a table's columns are read."""
        for name in self.layout.needs:
            if names.count(name) != 1:
                found = f"{names.count(name)} columns" if name in names else "no column"
                raise Skip(f"{found} {name!r} among {', '.join(map(str, names))[:200]}")
        return [name for name in self.layout.fields if names.count(name) == 1]


class ParquetFile(TableFile):
    """Parquet."""

    def _read(self, file: Any) -> Any:
        from pyarrow import parquet

        # One file at a time: the data set reader would also take columns from folder names like lang=en.
        opened = parquet.ParquetFile(file, page_checksum_verification=True)
        columns = self._columns(opened.schema_arrow.names)
        return opened.read(columns=columns).select(columns)


class ArrowFile(TableFile):
    """Arrow's own format: a file (also called Feather) or a stream, as Hugging Face `datasets` saves it."""

    def _read(self, file: Any) -> Any:
        import pyarrow

        try:
            opened = pyarrow.ipc.open_file(file)
        except pyarrow.ArrowInvalid:
            file.seek(0)
            opened = pyarrow.ipc.open_stream(file)
        return opened.read_all().select(self._columns(opened.schema.names))


RECORD_FILES: dict[str, type[JsonLinesFile | JsonFile | TableFile]] = {
    ".jsonl": JsonLinesFile,
    ".ndjson": JsonLinesFile,
    ".json": JsonFile,
    ".parquet": ParquetFile,
    ".pq": ParquetFile,
    ".arrow": ArrowFile,
    ".feather": ArrowFile,
}


def _parse_json(data: bytes) -> Any:
    try:
        return json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise Skip(f"not UTF-8 JSON: {error}") from error


def _attempt(function: Callable[[Any], Any], argument: Any) -> Any:
    """What a function returns, or the Skip that it raises."""
    try:
        return function(argument)
    except Skip as skip:
        return skip


def _as_bytes(table: Any) -> Any:
    """Columns of text as columns of bytes; ValueError where one holds something else."""
    import pyarrow

    types = pyarrow.types
    text = (types.is_string, types.is_large_string, types.is_string_view)
    data = (types.is_binary, types.is_large_binary, types.is_binary_view)
    columns = []
    for name, column in zip(table.column_names, table.columns, strict=True):
        if types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        if not any(is_type(column.type) for is_type in (*text, *data)):
            raise Skip(f"column {name!r} has type {column.type}, not string")
        columns.append(column.cast(pyarrow.large_binary()))
    return pyarrow.table(columns, names=table.column_names)
