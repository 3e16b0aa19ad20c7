"""Where text comes from: files become documents, split into those to train on and those held out."""

import dataclasses
import glob
import hashlib
import os
import re
import stat
import sysconfig
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import overload

import numpy as np
from jaxtyping import Int32

from train.config import DataConfig
from train.data.files import Skip, Source
from train.data.formats import format_of

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

    `train.data.formats` says what a document is in each format. What cannot be read or decoded, has no text, is empty
    or is not a valid conversation is skipped and listed in `Corpus.skipped`. Links are followed. A folder or file that
    several names lead to is read once, and its other names are listed there too.

    The held-out side is chosen by a hash of the document's content and the seed. So copies of a document are always on
    the same side, and the side depends neither on the document's name nor on the other documents. There is one
    exception: where one side would be empty, the document nearest to it is moved there.

    With `held_out_by` "file" this holds for files instead, by a hash of all their documents. Then a copy of a document
    in another file can be on the other side.

    Raises ValueError where a setting or the path is wrong, and where no or only one distinct document is found.
    """
    if not 0 < config.held_out_fraction < 1:
        raise ValueError(f"data.held_out_fraction must lie between 0 and 1, got {config.held_out_fraction}")
    if not 0 <= config.seed < 2**32:
        raise ValueError(f"data.seed must be in [0, 2**32), got {config.seed}")
    name, files, skipped = _find_files(config)
    sources = tuple(format_of(config, str(file)).open(str(file), config) for file in files)
    source_index, positions, digests = array("i"), array("q"), array("Q")
    num_bytes = 0
    for i, source in enumerate(sources):
        found = len(digests) + len(skipped)
        try:
            for position, text in source.scan():
                if isinstance(text, Skip) or not text:
                    skipped.append((source.name(position), _reason(text) if isinstance(text, Skip) else "empty"))
                    continue
                source_index.append(i)
                positions.append(position)
                digests.append(_digest(text, config.seed))
                num_bytes += len(text)
        except (Skip, OSError) as error:
            skipped.append((source.path, _reason(error)))
        if len(digests) + len(skipped) == found:
            skipped.append((source.path, "no records"))
    if not digests:
        raise ValueError(f"data.path: no documents in {name}{_shown(skipped)}")
    if len(np.unique(digests)) < 2:
        raise ValueError(
            f"data.path: {name} holds {len(digests)} document(s), all the same, so the held-out split would be empty; "
            "at least 2 distinct documents are needed (a single long text can be cut into files or JSONL lines)"
            f"{_shown(skipped)}"
        )
    which, where_in = np.asarray(source_index, dtype=np.int32), np.asarray(positions, dtype=np.int64)
    by = np.asarray(digests)
    if config.held_out_by == "file":
        by = _file_digests(by, which)[which]
        if len(np.unique(by)) < 2:
            raise ValueError(f"data.held_out_by = 'file': expected at least 2 files with documents in {name}, found 1")
    held_out = _held_out(by, config.held_out_fraction)
    train, rest = (Documents(sources, which[side], where_in[side]) for side in (~held_out, held_out))
    fingerprint = hashlib.blake2b(np.sort(np.asarray(digests)).tobytes(), digest_size=8).hexdigest()
    return Corpus(name, train, rest, tuple(skipped), num_bytes, fingerprint)


def describe(corpus: Corpus, most: int = 5) -> list[str]:
    """Lines that say what was read, and what was skipped and why, for the `most` commonest reasons."""
    reasons: dict[str, list[int]] = {}
    for i, (_, reason) in enumerate(corpus.skipped):
        reasons.setdefault(re.split(r": | at byte ", reason)[0], []).append(i)
    ordered = sorted(reasons.values(), key=len, reverse=True)
    lines = [
        f"{corpus.name}: {len(corpus.train)} documents to train on, {len(corpus.held_out)} held out, "
        f"{corpus.num_bytes / 1e6:.1f} MB, {len(corpus.skipped)} skipped"
    ]
    for found in ordered[:most]:
        where, reason = corpus.skipped[found[0]]
        lines.append(f"  skipped {where}: {reason}{f' (and {len(found) - 1} more)' if len(found) > 1 else ''}")
    rest = sum(map(len, ordered[most:]))
    return [*lines, f"  skipped {rest} for {len(ordered) - most} other reasons"] if rest else lines


def _reason(error: Exception) -> str:
    """One line; libraries that read files say more."""
    return " ".join((error.strerror if isinstance(error, OSError) and error.strerror else str(error)).split())[:300]


def _find_files(config: DataConfig) -> tuple[str, list[Path], list[tuple[str, str]]]:
    """A name for the corpus, its files in an order that does not depend on the file system, and what was skipped."""
    skipped: list[tuple[str, str]] = []
    if config.path is None:
        root = Path(sysconfig.get_path("stdlib"))
        name, suffix = f"the standard library in {root}", config.suffix or ".py"
        files = _walk(root, _STDLIB_EXCLUDED, skipped)
    elif not config.path:
        raise ValueError("data.path = '': expected a file, a folder or a glob")
    else:
        name, suffix = config.path, config.suffix or ""
        try:
            path = Path(config.path).expanduser()
            kind = "folder" if path.is_dir() else "file" if path.exists() else "glob"
        except (OSError, RuntimeError, ValueError) as error:  # a name too long, ~ of nobody
            raise ValueError(f"data.path = {config.path}: {_reason(error)}") from error
        if kind == "glob" and not glob.has_magic(config.path):
            raise ValueError(f"data.path: {config.path} does not exist; expected a file, a folder or a glob")
        if kind == "folder":
            files = _walk(path, frozenset(), skipped)
        else:
            files = [path] if kind == "file" else sorted(map(Path, glob.glob(str(path), recursive=True)))
    chosen = _distinct([file for file in files if file.name.endswith(suffix)], skipped)
    if not chosen:
        wanted = f"file whose name ends in {suffix!r}" if suffix else "file"
        raise ValueError(f"data.path: no {wanted} in {name}{_shown(skipped)}")
    return name, chosen, skipped


def _walk(root: Path, excluded: frozenset[str], skipped: list[tuple[str, str]]) -> list[Path]:
    """Files under a folder, without hidden ones (.git and the like), sorted by their path inside it.

    Links to folders are entered after the folders, so that a folder has its own name where it has one. None is entered
    twice.
    """

    def refused(error: OSError) -> None:
        skipped.append((str(error.filename), _reason(error)))

    found: list[Path] = []
    entered: set[str] = set()
    waiting = [root]
    while waiting:
        start = waiting.pop(0)
        for folder, folders, files in os.walk(start, onerror=refused):
            if (target := os.path.realpath(folder)) in entered:
                skipped.append((folder, f"another name of {target}, which is read already"))
                folders.clear()
                continue
            entered.add(target)
            kept = sorted(name for name in folders if not name.startswith(".") and name not in excluded)
            folders[:] = [name for name in kept if not os.path.islink(Path(folder, name))]
            waiting += [Path(folder, name) for name in kept if name not in folders]
            found += [Path(folder, name) for name in files if not name.startswith(".")]
    return sorted(found, key=lambda file: file.relative_to(root).parts)


def _distinct(files: list[Path], skipped: list[tuple[str, str]]) -> list[Path]:
    """The files among some paths, in their order. Of the names of one file, that with the fewest links is kept."""
    names: dict[tuple[int, int], list[Path]] = {}
    for file in dict.fromkeys(files):
        try:
            found = file.stat()
        except OSError as error:
            dangling = isinstance(error, FileNotFoundError) and file.is_symlink()
            skipped.append((str(file), "a link to nothing" if dangling else _reason(error)))
            continue
        if stat.S_ISREG(found.st_mode):
            names.setdefault((found.st_dev, found.st_ino), []).append(file)
        elif not stat.S_ISDIR(found.st_mode):  # a glob finds folders too
            skipped.append((str(file), "no regular file"))
    kept = set()
    for same in names.values():
        first = same[0] if len(same) == 1 else min(same, key=_num_links)
        kept.add(first)
        skipped += [(str(file), f"another name of {first}, which is read already") for file in same if file != first]
    return [file for file in dict.fromkeys(files) if file in kept]


def _num_links(path: Path) -> int:
    return sum(part.is_symlink() for part in (path, *path.parents))


def _shown(skipped: Sequence[tuple[str, str]]) -> str:
    """The first of what was skipped, for messages."""
    shown = "; ".join(f"{where}: {reason}" for where, reason in skipped[:3])
    return f": {len(skipped)} skipped ({shown})" if skipped else ""


def _file_digests(digests: np.ndarray, which: np.ndarray) -> np.ndarray:
    """A hash of the documents of each file (uint64), whatever their order."""
    ordered = np.lexsort((digests, which))
    parts = np.split(digests[ordered], np.searchsorted(which[ordered], np.arange(1, which.max() + 1)))
    return np.array([_digest(part.tobytes(), 0) for part in parts], np.uint64)


def _digest(text: bytes, seed: int) -> int:
    return int.from_bytes(hashlib.blake2b(text, digest_size=8, salt=seed.to_bytes(16, "little")).digest(), "little")


def _held_out(digests: np.ndarray, fraction: float) -> np.ndarray:
    """Which documents are held out, from their hashes (uint64), of which two differ; both sides get at least one."""
    distinct = np.unique(digests)
    # The smallest hash is always below the threshold, and the largest one never.
    return digests < np.clip(np.uint64(int(fraction * 2.0**64)), distinct[0] + np.uint64(1), distinct[-1])
