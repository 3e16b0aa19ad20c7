"""Small training runs in processes of their own."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from helpers.compiling import QUICKLY

from train.checkpoints.checkpointer import Checkpointer
from train.config import CheckpointConfig

ROOT = Path(__file__).parents[2]
COMPILED = ROOT / ".jax_cache" / "runs"  # programs of such runs, kept between runs of the tests
DEADLINE = 120.0  # seconds until a process that does not do what is waited for fails the test
SETTINGS: dict[str, Any] = {
    "eval-batches": 1,
    "sample-tokens": 0,
    "data.sequence-length": 64,
    "model.num-layers": 1,
    "model.attention": "full",
    "model.embed-dim": 32,
    "model.num-heads": 2,
    "model.num-kv-heads": 1,
    "model.head-dim": 16,
    "model.mlp-dim": 32,
    "model.nsa.num-selected": 4,
    "model.nsa.window": 32,
}


def write_corpus(folder: Path) -> None:
    """A small corpus in a new folder."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    for i in range(60):
        letters = draw.integers(ord("a"), ord("z") + 1, draw.integers(20, 400))
        (folder / f"{i}.txt").write_bytes(letters.astype(np.uint8).tobytes())


def take_compiled(cache: Path) -> Path:
    """A new folder with the compiled programs that earlier tests kept.

    It is a copy, because a process that is killed may leave half a program behind.
    """
    cache.mkdir()
    if COMPILED.is_dir():
        shutil.copytree(COMPILED, cache, dirs_exist_ok=True)
    return cache


def keep_compiled(cache: Path) -> None:
    """Keeps the programs in a folder, once all processes that write there have ended by themselves."""
    COMPILED.mkdir(parents=True, exist_ok=True)
    for program in cache.iterdir():
        if not (COMPILED / program.name).exists():
            unfinished = COMPILED / f"{program.name}.{os.getpid()}"
            shutil.copyfile(program, unfinished)
            os.replace(unfinished, COMPILED / program.name)


def arguments(run_dir: Path, settings: Mapping[str, Any]) -> list[str]:
    """The command line, without `python -m train`, of a run with `SETTINGS` and some more."""
    settings = {"run-dir": run_dir, **SETTINGS, **settings}
    return ["tiny", *(text for name, value in settings.items() for text in (f"--{name}", str(value)))]


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Processes that are started inside listen to SIGINT, also where this one ignores it, as behind `&` in a script."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def start(
    command: list[str], log: Path, *, cache: Path, umask: int = 0o022, environment: Mapping[str, str] | None = None
) -> subprocess.Popen:
    """A process, in a group of its own, whose output is added to a file.

    `cache` is the folder of compiled programs, so that only the first process compiles; `umask` tells who wrote a file;
    `environment` is added to this process's own, without whose XLA_FLAGS there is one device, compiled for quickly.
    """
    environment = {
        **os.environ,
        "XLA_FLAGS": QUICKLY,
        **(environment or {}),
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    with open(log, "a") as output, interruptible():
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            umask=umask,
        )


def train_command(run_dir: Path, settings: Mapping[str, Any]) -> list[str]:
    """`python -m train` with `SETTINGS` and some more."""
    return [sys.executable, "-m", "train", *arguments(run_dir, settings)]


def kill(process: subprocess.Popen) -> None:
    """Ends a process and all that it started, however it stands."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def losses(run_dir: Path) -> list[tuple[int, float]]:
    """The (step, loss) of every line of metrics.jsonl that has a loss; a line cut off by a kill is left out."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [(record["step"], record["loss"]) for record in records if "loss" in record]


def metrics_file(run_dir: Path) -> int | None:
    """Which file metrics.jsonl is: a resumed run writes another, without the steps that it makes again."""
    path = run_dir / "metrics.jsonl"
    return path.stat().st_ino if path.exists() else None


def has_reached(run_dir: Path, step: int, earlier_file: int | None) -> bool:
    """Whether a run that was started after `earlier_file` was there has logged a step."""
    return metrics_file(run_dir) != earlier_file and any(done >= step for done, _ in losses(run_dir))


def latest_step(run_dir: Path) -> int:
    """The newest checkpoint; 0 where there is none."""
    return Checkpointer(run_dir / "checkpoints", CheckpointConfig()).latest_step or 0


def wait_until(processes: Mapping[Path, subprocess.Popen], condition: Callable[[], bool]) -> None:
    """Returns when the condition holds; fails, with the logs, when a process ends before it or nothing happens."""
    give_up = time.monotonic() + DEADLINE
    while not condition():
        stuck = time.monotonic() > give_up or any(process.poll() is not None for process in processes.values())
        assert not stuck, "\n".join(log.read_text() for log in processes)
        time.sleep(0.001)


def finish(process: subprocess.Popen, log: Path, code: int = 0) -> None:
    """Waits for a process to end with an exit code; fails, with its log, where it does not."""
    try:
        process.wait(DEADLINE)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"did not end:\n{log.read_text()}") from None
    finally:
        kill(process)
    assert process.returncode == code, log.read_text()
