"""The folder of a run: what is in it besides metrics, pictures and checkpoints, and who may write there.

    config.json      every setting; paths in it are absolute
    facts.json       what the settings leave open: size and digest of the tokenizer, fingerprint of the data
    tokenizer.json   a copy of the tokenizer, unless that is the byte tokenizer
    chat_template.json  how a pretrained model talks, if it came with a template
    lock, lock.json  there while a process trains; lock.json says which

Such a folder can be copied or moved: what reads it needs nothing from outside it, except the text to train or to
evaluate on.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock

from train.config import TrainConfig, from_json, to_json
from train.data.tokenizer import Tokenizer, load_tokenizer


class InUseError(RuntimeError):
    """Another process trains in the folder; the message says which, and since when."""


def write(path: Path, text: str) -> None:
    """Writes a file whole or not at all, as UTF-8; what that lacks is replaced.

    Raises:
      OSError: naming the file, where it cannot be written.
    """
    unfinished = path.with_name(path.name + ".tmp")
    try:
        with unfinished.open("w", encoding="utf-8", errors="replace", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from error


def check_place(run_dir: Path) -> None:
    """Raises ValueError where no folder can be, because a file is there or on the way."""
    for place in (run_dir, *run_dir.absolute().parents):
        if os.path.exists(place):  # which raises for no name, as Path.exists does
            if not os.path.isdir(place):
                raise ValueError(f"run_dir = {run_dir}: expected a folder, or none yet, but {place} is a file")
            return


def holds_run(run: Path) -> bool:
    """Whether there are settings of a run in a folder."""
    return (run / "config.json").exists()


def read_config(run: Path, setting: str = "run") -> TrainConfig:
    """The settings of the run in a folder.

    Raises:
      ValueError: naming `setting`, where the folder holds no run, or settings that cannot be read.
    """
    if not (run / "config.json").is_file():
        raise ValueError(f"{setting} = {run}: expected the folder of a run, which holds config.json")
    with _readable(run / "config.json", setting, run) as text:
        return from_json(text)


def read_facts(run: Path, setting: str = "run") -> dict[str, Any]:
    """What else must not change in the run in a folder; empty where nothing says so.

    Raises:
      ValueError: naming `setting`, where that cannot be read.
    """
    if not (run / "facts.json").is_file():
        return {}
    with _readable(run / "facts.json", setting, run) as text:
        return dict(json.loads(text))


@contextlib.contextmanager
def _readable(path: Path, setting: str, run: Path) -> Iterator[str]:
    try:
        yield path.read_text(encoding="utf-8")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        reason = "it is empty" if path.is_file() and not path.stat().st_size else error
        raise ValueError(f"{setting} = {run}: expected {path} as a run wrote it, but {reason}") from error


def describe(config: TrainConfig, facts: dict[str, Any]) -> None:
    """Writes into the run's folder, which exists, what the run is."""
    source = tokenizer_file(config)
    if source is not None and source != config.run_dir / "tokenizer.json":
        write(config.run_dir / "tokenizer.json", source.read_text(encoding="utf-8"))
    write(config.run_dir / "config.json", to_json(absolute(config)))
    write(config.run_dir / "facts.json", json.dumps(facts, indent=2))


def absolute(config: TrainConfig) -> TrainConfig:
    """The config with paths that mean the same in every working directory, except that of the folder itself."""

    def whole(path: str) -> str:
        return os.path.abspath(os.path.expanduser(path))

    data = dataclasses.replace(
        config.data,
        path=None if config.data.path is None else whole(config.data.path),
        tokenizer="byte" if config.data.tokenizer == "byte" else whole(config.data.tokenizer),
    )
    init_from = None if config.init_from is None else Path(whole(str(config.init_from)))
    return dataclasses.replace(config, data=data, init_from=init_from)


def tokenizer_file(config: TrainConfig) -> Path | None:
    """The file that the config names, or else the copy in the run's folder; None for the byte tokenizer."""
    if config.data.tokenizer == "byte":
        return None
    # Not pathlib's `expanduser` and `is_file`, which raise for nobody's home and for a name too long.
    named, copy = os.path.expanduser(config.data.tokenizer), config.run_dir / "tokenizer.json"
    return copy if not os.path.isfile(named) and copy.is_file() else Path(named)


def tokenizer_digest(path: Path | None) -> str:
    """What tells tokenizers apart; None is the byte tokenizer."""
    return "byte" if path is None else hashlib.sha256(path.read_bytes()).hexdigest()


def load_run_tokenizer(run: Path, config: TrainConfig) -> Tokenizer:
    """The tokenizer that the run in a folder was trained with.

    Raises:
      ValueError: it is not there any more, or another one is in its place.
    """
    copy = run / "tokenizer.json"
    path = copy if config.data.tokenizer != "byte" and copy.is_file() else tokenizer_file(config)
    tokenizer = load_tokenizer("byte" if path is None else str(path))
    expected = read_facts(run).get("tokenizer")
    if expected is not None and tokenizer_digest(path) != expected:
        raise ValueError(f"{path}: expected the tokenizer that {run} was trained with (SHA-256 {expected})")
    return tokenizer


@contextlib.contextmanager
def locked(run_dir: Path) -> Iterator[str | None]:
    """Keeps every other process from training in a folder, which is made.

    The operating system holds the lock and lets go of it when the process ends, however it ends. On file systems
    without such locks, as some network ones are, a file takes its place: one that a killed process left counts as in
    use on all hosts but its own.

    Yields:
      Which process was there before and did not end by itself; None: there was none.

    Raises:
      InUseError: a process is there.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    lock, holder = filelock.FileLock(run_dir / "lock"), run_dir / "lock.json"
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise InUseError(
            f"run_dir = {run_dir} is in use by {_said(holder)}. If that process is gone, remove {run_dir / 'lock'}"
        ) from error
    try:
        left = _said(holder) if holder.exists() else None
        since = time.strftime("%Y-%m-%d %H:%M:%S %z")
        write(holder, json.dumps({"process": os.getpid(), "host": platform.node(), "since": since}))
        yield left
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def _said(holder: Path) -> str:
    try:
        found = json.loads(holder.read_text(encoding="utf-8"))
        return f"process {found['process']} on {found['host']} since {found['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "a process that does not say which"
