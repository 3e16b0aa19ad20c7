"""Where text comes from: files become documents, split into those to train on and those held out."""

import dataclasses
import functools
import glob
import hashlib
import json
import os
import sysconfig
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, overload

import numpy as np
from jaxtyping import Int32

from train.config import DataConfig
from train.data import chat

# Tests are left out of the default corpus because many distributions of Python strip them, so that the figures of a run
# would depend on who built the interpreter. Some of them are also undecodable on purpose.
_STDLIB_EXCLUDED = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})


class _Skip(Exception):
    """Why a file or a record is not a document."""


class _Source(Protocol):
    """A file that holds documents."""

    @property
    def path(self) -> str:
        """Where it is."""

    def scan(self) -> Iterator[tuple[int, bytes | _Skip]]:
        """Every record of the file: its position, and the text or the reason why there is none."""

    def read(self, position: int) -> bytes:
        """The text at a position that `scan` gave."""


@dataclasses.dataclass(frozen=True)
class _TextFile:
    """One document."""

    path: str

    def scan(self) -> Iterator[tuple[int, bytes | _Skip]]:
        text = self.read(0)
        try:
            text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise _Skip(f"not UTF-8 at byte {error.start}") from error
        yield 0, text

    def read(self, position: int) -> bytes:
        return Path(self.path).read_bytes()


@dataclasses.dataclass(frozen=True)
class _JsonLinesFile:
    """One document per line, which `extract` makes of its JSON. Only the lines' offsets are kept in memory."""

    path: str
    extract: Callable[[Any], bytes]

    def scan(self) -> Iterator[tuple[int, bytes | _Skip]]:
        position = 0
        with open(self.path, "rb") as file:
            for line in file:
                if line.strip():
                    try:
                        yield position, self._text(line)
                    except _Skip as skip:
                        yield position, skip
                position += len(line)

    def read(self, position: int) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(position)
            return self._text(file.readline())

    def _text(self, line: bytes) -> bytes:
        try:
            record = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise _Skip(f"not UTF-8 JSON: {error}") from error
        return self.extract(record)


def _field_text(record: Any, field: str) -> bytes:
    text = record.get(field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise _Skip(f"no text in field {field!r}")
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
        raise _Skip(f"field {field!r} is not valid Unicode") from error


def _conversation(record: Any) -> bytes:
    try:
        return chat.to_document(chat.parse(record))
    except UnicodeEncodeError as error:
        raise _Skip("a message is not valid Unicode") from error
    except ValueError as error:
        raise _Skip(str(error)) from error


@dataclasses.dataclass(frozen=True)
class _ParquetFile:
    """One document per row. The text column stays in memory: row groups are too large to decode for every document."""

    path: str
    field: str

    def scan(self) -> Iterator[tuple[int, bytes | _Skip]]:
        column = self._column
        for row in range(len(column)):
            text = column[row].as_py()
            yield row, _Skip(f"null in column {self.field!r}") if text is None else text.encode("utf-8")

    def read(self, position: int) -> bytes:
        return self._column[position].as_py().encode("utf-8")

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
                    raise _Skip(f"no column {self.field!r} among {', '.join(file.schema_arrow.names)}")
                column = file.read(columns=[self.field]).column(0)
            if pyarrow.types.is_dictionary(column.type):
                column = column.cast(column.type.value_type)
            if not (pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)):
                raise _Skip(f"column {self.field!r} has type {column.type}, not string")
            return column
        except pyarrow.ArrowException as error:
            raise _Skip(f"not a Parquet file: {error}") from error


@dataclasses.dataclass(frozen=True, eq=False)
class Documents(Sequence[bytes]):
    """Documents as UTF-8 bytes, each read from its file when it is asked for."""

    sources: tuple[_Source, ...]
    source: Int32[np.ndarray, "documents"]  # which of `sources`
    position: np.ndarray  # int64, where in it

    def __len__(self) -> int:
        return len(self.source)

    @overload
    def __getitem__(self, index: int) -> bytes: ...

    @overload
    def __getitem__(self, index: slice) -> "Documents": ...

    def __getitem__(self, index: int | slice) -> "bytes | Documents":
        if isinstance(index, slice):
            return Documents(self.sources, self.source[index], self.position[index])
        return self.sources[self.source[index]].read(int(self.position[index]))

    def name(self, index: int) -> str:
        """The file that holds a document."""
        return self.sources[self.source[index]].path


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """The documents of a run; make one with `load_corpus`."""

    name: str  # the file, folder or glob they came from
    train: Documents
    held_out: Documents
    skipped: tuple[tuple[str, str], ...]  # (file or file:position, reason)
    num_bytes: int  # of text, train and held_out together
    fingerprint: str  # changes when any document does; the same for the same documents wherever they lie


def load_corpus(config: DataConfig) -> Corpus:
    """Finds the documents, reads each once to check and hash it, and holds some out.

    A file is one document, except JSONL and conversations (one per line) and Parquet (one per row). What cannot be
    decoded, has no text or is empty, and a record that is no conversation, is skipped and listed in `Corpus.skipped`.

    The held-out side is chosen by a hash of the document's content and the seed. So copies of a document are always on
    one side, and a document's side depends neither on its name nor on the other documents, save that the document
    nearest to the other side is moved where one side would be empty.

    Raises ValueError where a setting or the path is wrong, and where no or only one distinct document is found.
    """
    if not 0 < config.held_out_fraction < 1:
        raise ValueError(f"data.held_out_fraction must lie between 0 and 1, got {config.held_out_fraction}")
    if not 0 <= config.seed < 2**32:
        raise ValueError(f"data.seed must be in [0, 2**32), got {config.seed}")
    name, files = _find_files(config)
    sources = tuple(_open_source(file, config) for file in files)
    source_index, positions, digests = array("i"), array("q"), array("Q")
    skipped: list[tuple[str, str]] = []
    num_bytes = 0
    for i, source in enumerate(sources):
        try:
            for position, text in source.scan():
                if isinstance(text, _Skip) or not text:
                    where = source.path if isinstance(source, _TextFile) else f"{source.path}:{position}"
                    skipped.append((where, str(text) if isinstance(text, _Skip) else "empty"))
                    continue
                source_index.append(i)
                positions.append(position)
                digests.append(_digest(text, config.seed))
                num_bytes += len(text)
        except (_Skip, OSError) as error:
            skipped.append((source.path, str(error)))
    if not digests:
        shown = "; ".join(f"{where}: {reason}" for where, reason in skipped[:3])
        raise ValueError(f"data.path: no documents in {name}: {len(skipped)} skipped ({shown})")
    held_out = _held_out(np.asarray(digests), config.held_out_fraction, name)
    which, where_in = np.asarray(source_index, dtype=np.int32), np.asarray(positions, dtype=np.int64)
    train, rest = (Documents(sources, which[side], where_in[side]) for side in (~held_out, held_out))
    fingerprint = hashlib.blake2b(np.sort(np.asarray(digests)).tobytes(), digest_size=8).hexdigest()
    return Corpus(name, train, rest, tuple(skipped), num_bytes, fingerprint)


def _find_files(config: DataConfig) -> tuple[str, list[Path]]:
    """A name for the corpus and its files, in an order that does not depend on the file system."""
    if config.path is None:
        root = Path(sysconfig.get_path("stdlib"))
        name, suffix = f"the standard library in {root}", config.suffix or ".py"
        files = _walk(root, _STDLIB_EXCLUDED)
    else:
        path, name, suffix = Path(config.path).expanduser(), config.path, config.suffix or ""
        if path.is_dir():
            files = _walk(path, frozenset())
        elif path.exists():
            files = [path]
        elif glob.has_magic(config.path):
            files = sorted(Path(match) for match in glob.glob(str(path), recursive=True) if Path(match).is_file())
        else:
            raise ValueError(f"data.path: {config.path} does not exist; expected a file, a folder or a glob")
    chosen = [file for file in files if file.name.endswith(suffix)]
    if not chosen:
        wanted = f"file whose name ends in {suffix!r}" if suffix else "file"
        raise ValueError(f"data.path: no {wanted} in {name}")
    return name, chosen


def _walk(root: Path, excluded: frozenset[str]) -> list[Path]:
    """Files under a folder, without hidden ones (.git and the like), sorted by their path inside it."""
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in excluded]
        found += [Path(folder, name) for name in files if not name.startswith(".")]
    return sorted((file for file in found if file.is_file()), key=lambda file: file.relative_to(root).parts)


def _open_source(file: Path, config: DataConfig) -> _Source:
    kind: str = config.format
    if kind == "auto":
        endings = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".pq": "parquet"}
        kind = endings.get(file.suffix.lower(), "text")
    if kind == "jsonl":
        return _JsonLinesFile(str(file), functools.partial(_field_text, field=config.text_field))
    if kind == "chat":
        return _JsonLinesFile(str(file), _conversation)
    if kind == "parquet":
        return _ParquetFile(str(file), config.text_field)
    return _TextFile(str(file))


def _digest(text: bytes, seed: int) -> int:
    return int.from_bytes(hashlib.blake2b(text, digest_size=8, salt=seed.to_bytes(16, "little")).digest(), "little")


def _held_out(digests: np.ndarray, fraction: float, name: str) -> np.ndarray:
    """Which documents are held out, from their hashes (uint64); both sides get at least one."""
    distinct = np.unique(digests)
    if len(distinct) < 2:
        raise ValueError(
            f"data.path: {name} holds {len(digests)} document(s), all the same, so the held-out split would be empty; "
            "at least 2 distinct documents are needed (a single long text can be cut into files or JSONL lines)"
        )
    # The hash of somebody is always below the threshold, and that of somebody else never.
    return digests < np.clip(np.uint64(int(fraction * 2.0**64)), distinct[0] + np.uint64(1), distinct[-1])
