"""Checkpoints on Orbax: parameters, optimiser, step, random state and data position, committed together or not at all.

A checkpoint is the folder `<directory>/<step>`, which Orbax writes under a temporary name and renames when it is whole:

    state/      the arrays, each under its path in the state ("params/embedding")
    metadata/   one JSON: format, step, metrics, data position, and shape, dtype and checksum of every array

The checksums are what tells damage that decompresses well (a flipped bit, a block of zeros) from what was saved.
"""

import contextlib
import itertools
import json
import logging
import math
import os
import re
import shutil
import sys
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from train.config import CheckpointConfig
from train.parallel.distributed import gather, in_turn, together

FORMAT = 1
SCORE = "held_out_bits_per_byte"  # the metric that makes a checkpoint one of the best; lower is better
LOGGER = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or none that fits could be read; the message says which and why."""


class _DamagedError(Exception):
    """What is on disk is not what was saved."""


class DataIterator(Protocol):
    """A data iterator whose position can be saved, as those of Grain can."""

    def __next__(self) -> Any:
        """Return the next batch, which is that of one step."""

    def get_state(self) -> Any:
        """Return the position as a value that JSON can hold."""

    def set_state(self, state: Any, /) -> None:
        """Go to a position that `get_state` returned."""


class _KeepLastAndBest:
    """Orbax's preservation policy: asked, while a checkpoint is being written, which ones to keep, it included."""

    def __init__(self, keep_last: int, keep_best: int):
        self.keep_last = keep_last
        self.keep_best = keep_best
        self.scores: Mapping[int, float] = {}

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        steps = sorted(checkpoint.step for checkpoint in checkpoints)
        best = _best_first({step: score for step, score in self.scores.items() if step in steps})
        kept = {*steps[-self.keep_last :], *best[: self.keep_best]}
        return [checkpoint.step in kept for checkpoint in checkpoints]


class Checkpointer:
    """Saves and restores the checkpoints of one run.

    Saving is asynchronous: `save` returns when the arrays are copied off the devices. An error while writing is
    raised by the next `save`, `wait` or `close`. Kept are the last `keep_last` checkpoints and those with the
    `keep_best` lowest held-out bits per byte; an old one is deleted only when the new one is committed. With several
    hosts, every process makes the same calls.

    Several processes must see the same folder. One that fails to write ends alone, and the others with it.

    Reading (`restore_parameters`, `latest_step`, `best_step`) writes nothing, so it is safe beside a running trainer.
    """

    def __init__(self, directory: Path, config: CheckpointConfig, data_shard: tuple[int, int] | None = None):
        """`data_shard`: which share of the data this process loads, of how many; None: one for each process."""
        if config.keep_last < 1:
            raise ValueError(f"checkpoint.keep_last is {config.keep_last}, expected at least 1")
        if config.keep_best < 0:
            raise ValueError(f"checkpoint.keep_best is {config.keep_best}, expected at least 0")
        self.directory = Path(directory).absolute()
        self._data_shard = data_shard or (jax.process_index(), jax.process_count())
        self._policy = _KeepLastAndBest(config.keep_last, config.keep_best)
        self._manager: ocp.CheckpointManager | None = None  # opened by the first save
        self._quiet = contextlib.ExitStack()  # holds while the manager is open
        self._pending: int | None = None  # the step being written

    @property
    def latest_step(self) -> int | None:
        """The newest step that is wholly on disk."""
        return max(_committed_steps(self.directory), default=None)

    @property
    def best_step(self) -> int | None:
        """The step on disk with the lowest held-out bits per byte; of equal ones the newest."""
        return next(iter(_best_first(_read_scores(self.directory))), None)

    def save(
        self, step: int, state: Any, data_iterator: DataIterator, metrics: Mapping[str, float] | None = None
    ) -> None:
        """Start saving; a step that is on disk already is left as it is.

        Args:
            step: the step the state belongs to.
            state: pytree of `jax.Array`, possibly sharded, with an entry `params`. Its buffers may be donated after.
            data_iterator: what the next batch will be drawn from.
            metrics: the evaluation of this state, if there was one.

        Raises:
            CheckpointError: this checkpoint, or the one before it, could not be written.
        """
        self.wait()
        if step in _committed_steps(self.directory):
            return
        arrays = _flatten(state)
        checksums = _checksums(arrays)
        content: dict[str, Any] = {
            "format": FORMAT,
            "step": step,
            "metrics": {name: float(value) for name, value in (metrics or {}).items()},
            "arrays": {name: _describe(arrays[name]) | {"checksum": checksums[name]} for name in arrays},
            "data": self._gather_positions(data_iterator),
        }
        try:
            manager = self._open()
            self._policy.scores = _read_scores(self.directory) | _score(step, content["metrics"])
            manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(arrays), metadata=ocp.args.JsonSave(_with_checksum(content))
                ),
                force=True,
            )
        except Exception as error:
            raise self._failed_to_save(step, error) from error
        self._pending = step

    def restore_latest(self, abstract_state: Any, data_iterator: DataIterator) -> tuple[int, Any] | None:
        """Read the newest undamaged checkpoint and put the data iterator where it was.

        Newer, damaged ones are named in a warning and moved to `<directory>/damaged`, never deleted. Where the data was
        shared out otherwise, there is no position to go back to: as many batches are read as the saved step had taken,
        which is as far in the same order of documents, and a warning says so.

        Args:
            abstract_state: the state expected, as arrays or `jax.ShapeDtypeStruct`. Every array comes back with
                the sharding given here.
            data_iterator: an iterator over the same data as the one saved.

        Returns:
            The step and the state, or None where no checkpoint was ever committed.

        Raises:
            CheckpointError: every checkpoint is damaged, or the newest undamaged one is of another architecture,
                or of other data.
        """
        self.wait()
        damaged: dict[int, str] = {}
        for step in sorted(_committed_steps(self.directory), reverse=True):
            try:
                content, arrays = _read(self.directory, step, _flatten(abstract_state))
            except _DamagedError as error:
                damaged[step] = str(error)
                continue
            self._move_aside(damaged)
            with together(CheckpointError):
                self._set_position(step, content["data"], data_iterator)
            return step, jax.tree.unflatten(jax.tree.structure(abstract_state), arrays.values())
        if damaged:
            reasons = "; ".join(f"step {step}: {reason}" for step, reason in damaged.items())
            raise CheckpointError(f"every checkpoint in {self.directory} is damaged: {reasons}")
        return None

    def restore_parameters(self, abstract_parameters: Any, step: int | None = None) -> Any:
        """Read the parameters alone, for evaluation or generation.

        Args:
            abstract_parameters: the parameters expected, as in `restore_latest`.
            step: which checkpoint; None: the newest that is undamaged.

        Raises:
            CheckpointError: there is no such checkpoint, it is damaged, or it is of another architecture.
        """
        self.wait()
        steps = sorted(_committed_steps(self.directory), reverse=True)
        if not steps:
            raise CheckpointError(f"no checkpoint in {self.directory}")
        if step is not None and step not in steps:
            raise CheckpointError(f"no checkpoint of step {step} in {self.directory}, only of {sorted(steps)}")
        damaged = []
        for candidate in steps if step is None else [step]:
            try:
                _, arrays = _read(self.directory, candidate, _flatten({"params": abstract_parameters}))
            except _DamagedError as error:
                damaged.append(f"checkpoint of step {candidate} in {self.directory} is damaged: {error}")
                LOGGER.warning(damaged[-1])
                continue
            return jax.tree.unflatten(jax.tree.structure(abstract_parameters), arrays.values())
        raise CheckpointError("; ".join(damaged))

    def wait(self) -> None:
        """Return when nothing is left to write; raise CheckpointError where writing failed."""
        if self._pending is None or self._manager is None:
            return
        step, self._pending = self._pending, None
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._failed_to_save(step, error) from error

    def close(self) -> None:
        """Wait, then let the writer's threads end."""
        try:
            self.wait()
        finally:
            if self._manager is not None:
                self._manager.close()
                self._manager = None
            self._quiet.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except CheckpointError as failure:
            if error is None:
                raise
            LOGGER.error("%s", failure)  # the error on its way is the one that explains the stop

    def _open(self) -> ocp.CheckpointManager:
        # Not in the constructor: opening makes the folder and removes what killed saves left behind, which only the
        # one process that writes may do.
        if self._manager is None:
            self._quiet.enter_context(_without_echoes())
            self._manager = ocp.CheckpointManager(
                self.directory,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=self._policy,
                    cleanup_tmp_directories=True,
                    lightweight_initialize=True,  # reads nothing of old checkpoints, which may be damaged
                ),
            )
        return self._manager

    def _failed_to_save(self, step: int, error: Exception) -> CheckpointError:
        # The writer is given up, since what it knows of the folder is no longer so; a later save opens another.
        if self._manager is not None:
            with contextlib.suppress(Exception):
                self._manager.close()
            self._manager = None
        self._quiet.close()
        if jax.process_index() == 0:
            self._clear_away(step)
        latest = self.latest_step
        remains = (
            f"the last good checkpoint is step {latest} and remains" if latest is not None else "there is no other"
        )
        return CheckpointError(
            f"could not save the checkpoint of step {step} in {self.directory}: {_reason(error)}; {remains}"
        )

    def _clear_away(self, step: int, attempts: int = 20) -> None:
        """Give the disk its space back; writes still on their way may stand against it for a moment."""
        for _ in range(attempts):
            unfinished = list(self.directory.glob(f"{step}.*"))
            if not unfinished:
                return
            for folder in unfinished:
                shutil.rmtree(folder, ignore_errors=True)
            time.sleep(0.05)

    def _move_aside(self, damaged: Mapping[int, str]) -> None:
        if jax.process_index() == 0:
            for step, reason in damaged.items():
                folder = self.directory / "damaged"
                folder.mkdir(exist_ok=True)
                names = itertools.chain([str(step)], (f"{step}-{copy}" for copy in itertools.count(2)))
                target = next(folder / name for name in names if not (folder / name).exists())
                os.rename(self.directory / str(step), target)
                LOGGER.warning(
                    "checkpoint of step %d in %s is damaged (%s): moved to %s, using the one before it",
                    step,
                    self.directory,
                    reason,
                    target,
                )
        if damaged and jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoints moved aside")
        if damaged and self._manager is not None:
            self._manager.reload()

    def _gather_positions(self, data_iterator: DataIterator) -> list[Any]:
        # Processes that load the same rows stand at the same place. A copy, that does not change as the iterator goes.
        shard, count = self._data_shard
        positions = dict(gather([shard, data_iterator.get_state()]))
        return [positions[index] for index in range(count)]

    def _set_position(self, step: int, positions: list[Any], data_iterator: DataIterator) -> None:
        shard, count = self._data_shard
        try:
            if len(positions) == count:
                data_iterator.set_state(positions[shard])
                return
            for _ in range(step):
                next(data_iterator)
        except Exception as error:
            raise CheckpointError(
                f"the data position in the checkpoint of step {step} in {self.directory} does not fit this data:"
                f" {_reason(error)}"
            ) from error
        if jax.process_index() == 0:
            LOGGER.warning(
                "up to step %d the data was loaded in %d shares, now it is in %d: passed over the first %d batches of"
                " the new shares. The order of documents goes on; some of those that were being packed and shuffled"
                " together may come twice, others not at all",
                step,
                len(positions),
                count,
                step,
            )


def _committed_steps(directory: Path) -> list[int]:
    # Until a folder is whole its name has a suffix. One that a kill left half deleted fails the checks of reading.
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal() and path.is_dir())


def _score(step: int, metrics: Mapping[str, float]) -> dict[int, float]:
    value = metrics.get(SCORE, math.nan)
    return {} if math.isnan(value) else {step: value}


def _read_scores(directory: Path) -> dict[int, float]:
    scores: dict[int, float] = {}
    for step in _committed_steps(directory):
        with contextlib.suppress(_DamagedError):
            scores |= _score(step, _read_metadata(directory, step)["metrics"])
    return scores


def _best_first(scores: Mapping[int, float]) -> list[int]:
    return sorted(scores, key=lambda step: (scores[step], -step))


def _flatten(state: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _describe(array: Any) -> dict[str, Any]:
    return {"shape": list(array.shape), "dtype": str(array.dtype)}


def _checksums(arrays: Mapping[str, jax.Array]) -> dict[str, int]:
    # One after the other: on simulated devices, more sums over devices in flight than there are threads wait for each
    # other for ever.
    return {name: int(_checksum(array)) for name, array in arrays.items()}


@in_turn
@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
    # A sum modulo 2^32 does not depend on its order, hence not on the sharding. The bits are mixed first, so that
    # two flipped sign bits do not cancel.
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    bits = (bits ^ (bits >> 16)) * np.uint32(0x45D9F3B)
    bits = (bits ^ (bits >> 16)) * np.uint32(0x45D9F3B)
    return jnp.sum(bits ^ (bits >> 16), dtype=jnp.uint32)


def _with_checksum(content: Mapping[str, Any]) -> dict[str, Any]:
    return {"crc32": zlib.crc32(json.dumps(content, sort_keys=True).encode()), "content": content}


def _read_metadata(directory: Path, step: int) -> dict[str, Any]:
    path = directory / str(step) / "metadata" / "metadata"  # Orbax names a JSON item's file so
    try:
        stored = json.loads(path.read_text())
        intact = stored == _with_checksum(stored["content"])
    except PermissionError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _DamagedError(f"its metadata cannot be read: {_reason(error)}") from error
    if not intact:
        raise _DamagedError("its metadata is not what was saved")
    content = stored["content"]
    if content["format"] != FORMAT:
        raise CheckpointError(f"{path} has checkpoint format {content['format']}, this version reads format {FORMAT}")
    return content


def _read(directory: Path, step: int, expected: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, jax.Array]]:
    """Metadata and expected arrays of one checkpoint, with the same verdict on every host."""
    with together(CheckpointError, _DamagedError):  # before the arrays, which all hosts read together
        content = _read_metadata(directory, step)
    _check_architecture(directory, step, content["arrays"], expected)
    with together(CheckpointError, _DamagedError):
        arrays = _read_arrays(directory / str(step) / "state", expected, content["arrays"])
    return content, arrays


def _check_architecture(
    directory: Path, step: int, found: Mapping[str, Any], expected: Mapping[str, Any], shown: int = 4
) -> None:
    roots = {name.split("/")[0] for name in expected}
    differences = []
    vocabulary = False
    for name in [*expected, *(name for name in found if name not in expected and name.split("/")[0] in roots)]:
        saved = {key: value for key, value in found.get(name, {}).items() if key != "checksum"}
        wanted = _describe(expected[name]) if name in expected else {}
        if saved != wanted:
            differences.append(f"{name}: {_in_words(saved)} in the checkpoint, {_in_words(wanted)} expected")
            vocabulary |= "embed" in name and bool(saved) and bool(wanted)
    if differences:
        more = f"; and {len(differences) - shown} more" if len(differences) > shown else ""
        hint = " (the tokenizer's vocabulary or the model's width differs)" if vocabulary else ""
        raise CheckpointError(
            f"checkpoint of step {step} in {directory} is of another architecture{hint}:"
            f" {'; '.join(differences[:shown])}{more}"
        )


def _in_words(description: Mapping[str, Any]) -> str:
    return f"{description['shape']} {description['dtype']}" if description else "absent"


def _read_arrays(path: Path, expected: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, jax.Array]:
    # An uncommitted array must come back uncommitted, or it cannot meet arrays on other devices; the way there is
    # over the host.
    shardings = {name: x.sharding if getattr(x, "committed", True) else None for name, x in expected.items()}
    structs = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shardings[name]) for name, x in expected.items()}
    restore_args = {
        name: ocp.RestoreArgs(restore_type=np.ndarray)
        if shardings[name] is None
        else ocp.ArrayRestoreArgs(sharding=shardings[name], global_shape=struct.shape, dtype=struct.dtype)
        for name, struct in structs.items()
    }
    try:
        with _without_echoes(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            arrays = reader.restore(
                path, args=ocp.args.PyTreeRestore(structs, restore_args=restore_args, partial_restore=True)
            )
        arrays = {name: jnp.asarray(arrays[name]) for name in expected}
        checksums = _checksums(arrays)
    except Exception as error:
        if _is_of_this_machine(error):
            raise CheckpointError(f"cannot read {path}: {_reason(error)}") from error
        raise _DamagedError(f"its arrays cannot be read: {_reason(error)}") from error
    for name, checksum in checksums.items():
        if checksum != saved[name]["checksum"]:
            raise _DamagedError(f"{name} is not what was saved")
    return arrays


@contextlib.contextmanager
def _without_echoes() -> Iterator[None]:
    """Keep Orbax from printing hundreds of lines about an error that is raised here anyway."""

    def is_news(record: logging.LogRecord) -> bool:
        return record.exc_info is None

    def report(unraisable: Any) -> None:
        # When one array fails, Orbax closes its event loop while others are on their way.
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    before = sys.unraisablehook
    loggers = [logging.getLogger("absl"), logging.getLogger("asyncio")]
    for logger in loggers:
        logger.addFilter(is_news)
    sys.unraisablehook = report
    try:
        yield
    finally:
        sys.unraisablehook = before
        for logger in loggers:
            logger.removeFilter(is_news)


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _is_of_this_machine(error: BaseException) -> bool:
    """Whether reading failed for want of memory or rights, which says nothing against the checkpoint."""
    error = _root(error)
    codes = ("RESOURCE_EXHAUSTED", "PERMISSION_DENIED")
    return isinstance(error, (MemoryError, PermissionError)) or any(code in str(error) for code in codes)


def _reason(error: BaseException, limit: int = 240) -> str:
    # TensorStore appends its whole specification in brackets; the cause is what stands last before them.
    error = _root(error)
    text = re.sub(r" \[[\w ]+='.*", "", " ".join(str(error).split())) or type(error).__name__
    return text if len(text) <= limit else f"...{text[-limit:]}"
