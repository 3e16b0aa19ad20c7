"""Where text comes from: files become documents, split into those to train on and those held out."""

import dataclasses
import glob
import hashlib
import os
import sysconfig
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import overload

import numpy as np
from jaxtyping import Int32

from train.config import DataConfig
from train.data.formats import Skip, Source, format_of

# Tests are left out of the default corpus because many distributions of Python strip them, so that the figures of a run
# would depend on who built the interpreter. Some of them are also undecodable on purpose.
_STDLIB_EXCLUDED = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})


@dataclasses.dataclass(frozen=True, eq=False)
class Documents(Sequence[bytes]):
    """Documents as UTF-8 bytes. Each is read from its file when it is accessed."""

    sources: tuple[Source, ...]
    source: Int32[np.ndarray, " documents"]  # which of `sources`
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
    fingerprint: str  # changes when any document changes; does not depend on the folder


def load_corpus(config: DataConfig) -> Corpus:
    """Finds the documents, reads each once to check and hash it, and holds some out.

    `train.data.formats` says what a document is in each format. What cannot be decoded, has no text, is empty or is not
    a valid conversation is skipped and listed in `Corpus.skipped`.

    The held-out side is chosen by a hash of the document's content and the seed. So copies of a document are always on
    the same side, and the side depends neither on the document's name nor on the other documents. There is one
    exception: where one side would be empty, the document nearest to it is moved there.

    Raises ValueError where a setting or the path is wrong, and where no or only one distinct document is found.
    """
    if not 0 < config.held_out_fraction < 1:
        raise ValueError(f"data.held_out_fraction must lie between 0 and 1, got {config.held_out_fraction}")
    if not 0 <= config.seed < 2**32:
        raise ValueError(f"data.seed must be in [0, 2**32), got {config.seed}")
    name, files = _find_files(config)
    sources = tuple(format_of(config, str(file)).open(str(file), config) for file in files)
    source_index, positions, digests = array("i"), array("q"), array("Q")
    skipped: list[tuple[str, str]] = []
    num_bytes = 0
    for i, source in enumerate(sources):
        try:
            for position, text in source.scan():
                if isinstance(text, Skip) or not text:
                    skipped.append((source.name(position), str(text) if isinstance(text, Skip) else "empty"))
                    continue
                source_index.append(i)
                positions.append(position)
                digests.append(_digest(text, config.seed))
                num_bytes += len(text)
        except (Skip, OSError) as error:
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
    # The smallest hash is always below the threshold, and the largest one never.
    return digests < np.clip(np.uint64(int(fraction * 2.0**64)), distinct[0] + np.uint64(1), distinct[-1])
