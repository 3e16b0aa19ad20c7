"""Makes a corpus of source code from installed packages and archives: `python -m train corpus --out FOLDER`.

Every package, folder or archive becomes one JSON-lines file, with a document for each of its files, in the order of
their paths. So what stands near one another in a package stays so, and long contexts mean something, with

    python -m train PRESET --data.path FOLDER --data.held-out-by file --data.neighbours 64 \
      --data.no-isolate-documents
"""

import dataclasses
import hashlib
import itertools
import json
import os
import re
import shutil
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from pallas_kernels.benchmarks.provenance import provenance
from train.commands.output import check_empty
from train.run_folder import write

SUFFIXES = (".py", ".pyi", ".c", ".cc", ".cpp", ".cxx", ".h", ".hpp", ".cu", ".cuh", ".inl", ".rs", ".js", ".ts")
ARCHIVES = (".whl", ".zip", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2")
LEFT_OUT = frozenset({"__pycache__", "node_modules", "site-packages", "dist-packages"})

Member = tuple[str, bytes]  # path inside a package, content


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What the corpus is made of."""

    out: Path  # folder to write, which must not hold files yet; what was read goes into OUT.json beside it
    sources: tuple[Path, ...] = ()  # folders of packages, and archives (wheels, zip, tar); none: this Python's packages
    suffixes: tuple[str, ...] = SUFFIXES  # of the files that are taken
    min_file_bytes: int = 1  # shorter files are left out: for a corpus of long documents
    max_file_bytes: int = 300_000  # longer files are left out: most of them are generated
    min_package_bytes: int = 20_000  # smaller packages are left out


def corpus(arguments: Arguments) -> None:
    """Writes the corpus and prints what is in it.

    Exact copies of a file are taken once, where they come first. What is not UTF-8 is left out.

    Raises:
      ValueError: a setting or a path is wrong, or nothing was found.
    """
    for name in ("min_file_bytes", "max_file_bytes", "min_package_bytes"):
        if (value := getattr(arguments, name)) < 1:
            raise ValueError(f"{name} = {value}: expected at least 1")
    check_empty("out", arguments.out)
    sources = arguments.sources or tuple(_installed())
    for source in sources:
        if not source.is_dir() and not source.name.endswith(ARCHIVES):
            raise ValueError(f"sources: {source}: expected a folder or an archive ({', '.join(ARCHIVES)})")
    unfinished = arguments.out.with_name(arguments.out.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # of an earlier call that did not come to its end
    unfinished.mkdir(parents=True)
    seen: set[bytes] = set()
    left_out = dict.fromkeys(("copies", "not UTF-8", "too short", "too long", "empty"), 0)
    packages: dict[str, dict[str, int]] = {}
    for name, members in itertools.chain.from_iterable(_packages(source) for source in sources):
        kept, size = [], 0
        for path, content in members:
            if not path.endswith(arguments.suffixes):
                continue
            reason = _reason(content, arguments.min_file_bytes, arguments.max_file_bytes, seen)
            if reason is not None:
                left_out[reason] += 1
                continue
            kept.append((path, content.decode("utf-8")))
            size += len(content)
        if size < arguments.min_package_bytes:
            continue
        file = unfinished / f"{len(packages):05}-{re.sub(r'[^A-Za-z0-9._-]', '_', name)}.jsonl"
        with file.open("w", encoding="utf-8", newline="\n") as out:
            out.writelines(json.dumps({"path": path, "text": text}) + "\n" for path, text in kept)
        packages[file.name] = {"files": len(kept), "bytes": size}
    if not packages:
        shown = ", ".join(map(str, sources))
        raise ValueError(f"sources: no package of {arguments.min_package_bytes} bytes in {shown}")
    unfinished.replace(arguments.out)
    total = {key: sum(package[key] for package in packages.values()) for key in ("files", "bytes")}
    report = arguments.out.with_name(arguments.out.name + ".json")
    made = {"provenance": provenance(["python", "-m", "train", *sys.argv[1:]])}
    write(report, json.dumps({**made, **total, "left_out": left_out, "packages": packages}, indent=1) + "\n")
    print(f"{arguments.out}: {len(packages)} packages, {total['files']} files, {total['bytes'] / 1e6:.1f} MB")
    print("left out: " + ", ".join(f"{count} {reason}" for reason, count in left_out.items()))


def _installed() -> Iterator[Path]:
    """Where this Python keeps the standard library and packages, and where Debian does."""
    own = [sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")]
    places = [*own, "/usr/lib/python3/dist-packages", "/usr/local/cuda/include"]
    return (Path(place) for place in dict.fromkeys(map(os.path.realpath, places)) if os.path.isdir(place))


def _packages(source: Path) -> Iterator[tuple[str, Iterator[Member]]]:
    """The packages of a source by name: the folders in it, and its own files as one; an archive is one package."""
    if source.is_dir():
        entries = sorted(source.iterdir())
        yield source.name, ((path.name, path.read_bytes()) for path in entries if path.is_file())
        for folder in entries:
            if folder.is_dir() and not folder.is_symlink() and folder.name not in LEFT_OUT:
                yield folder.name, _files(folder)
    else:
        yield source.name, _members(source)


def _files(root: Path) -> Iterator[Member]:
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in LEFT_OUT and not name.startswith("."))
        for name in sorted(files):
            path = Path(folder, name)
            if path.is_file() and not path.is_symlink():
                yield path.relative_to(root.parent).as_posix(), path.read_bytes()


def _members(archive: Path) -> Iterator[Member]:
    """The files of an archive, in the order of their paths."""
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as zipped:
                for name in sorted(zipped.namelist(), key=lambda name: PurePosixPath(name).parts):
                    if not name.endswith("/"):
                        yield name, zipped.read(name)
            return
        with tarfile.open(archive) as tarred:
            for member in sorted(tarred.getmembers(), key=lambda member: PurePosixPath(member.name).parts):
                if member.isfile() and (content := tarred.extractfile(member)) is not None:
                    yield member.name, content.read()
    except (OSError, EOFError, zipfile.BadZipFile, tarfile.TarError) as error:
        raise ValueError(f"sources: {archive}: cannot be read: {error}") from error


def _reason(content: bytes, shortest: int, longest: int, seen: set[bytes]) -> str | None:
    """Why a file is left out; one that is not is remembered, so that its copies are."""
    if not content.strip():
        return "empty"
    if len(content) < shortest:
        return "too short"
    if len(content) > longest:
        return "too long"
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return "not UTF-8"
    digest = hashlib.blake2b(content, digest_size=16).digest()
    if digest in seen:
        return "copies"
    seen.add(digest)
    return None
