"""Checkpoints on Orbax: parameters, optimiser, step, random state and data position, committed together or not at all.

What lies in a checkpoint's folder is described in `train.checkpoints.storage`.
"""

import contextlib
import itertools
import logging
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from train.checkpoints.errors import CheckpointError, DamagedError, reason_of, release, without_echoes
from train.checkpoints.storage import (
    FORMAT,
    best_first,
    checksums_of,
    committed_steps,
    described,
    flatten,
    read_checkpoint,
    read_scores,
    score_of,
    with_checksum,
)
from train.config import CheckpointConfig
from train.parallel.distributed import gather, together

LOGGER = logging.getLogger(__name__)


class DataIterator(Protocol):
    """A data iterator whose position can be saved, as those of Grain can."""

    def __next__(self) -> Any:
        """Return the next batch, which is that of one step."""

    def get_state(self) -> Any:
        """Return the position as a value that JSON can hold."""

    def set_state(self, state: Any, /) -> None:
        """Go to a position that `get_state` returned."""


class _KeepLastAndBest:
    """Orbax's preservation policy: which checkpoints to keep, asked while a new one is being written."""

    def __init__(self, keep_last: int, keep_best: int):
        self.keep_last = keep_last
        self.keep_best = keep_best
        self.scores: Mapping[int, float] = {}

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        steps = sorted(checkpoint.step for checkpoint in checkpoints)
        best = best_first({step: score for step, score in self.scores.items() if step in steps})
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
        return max(committed_steps(self.directory), default=None)

    @property
    def best_step(self) -> int | None:
        """The step on disk with the lowest held-out bits per byte; of equal ones the newest."""
        return next(iter(best_first(read_scores(self.directory))), None)

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
        if step in committed_steps(self.directory):
            return
        arrays = flatten(state)
        checksums = checksums_of(arrays)
        content: dict[str, Any] = {
            "format": FORMAT,
            "step": step,
            "metrics": {name: float(value) for name, value in (metrics or {}).items()},
            "arrays": {name: described(arrays[name]) | {"checksum": checksums[name]} for name in arrays},
            "data": self._gather_positions(data_iterator),
        }
        try:
            manager = self._open()
            self._policy.scores = read_scores(self.directory) | score_of(step, content["metrics"])
            manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(arrays), metadata=ocp.args.JsonSave(with_checksum(content))
                ),
                force=True,
            )
        except Exception as error:
            raise self._failed_to_save(step, error) from error
        self._pending = step

    def restore_latest(self, abstract_state: Any, data_iterator: DataIterator) -> tuple[int, Any] | None:
        """Read the newest undamaged checkpoint and put the data iterator where it was.

        Newer, damaged ones are named in a warning and moved to `<directory>/damaged`, never deleted. If the data was
        divided into another number of shares, there is no saved position for this one. Then as many batches are read
        as the saved step had used, which is as far in the same order of documents, and a warning says so.

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
        for step in sorted(committed_steps(self.directory), reverse=True):
            try:
                content, arrays = read_checkpoint(self.directory, step, flatten(abstract_state))
            except DamagedError as error:
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
        steps = sorted(committed_steps(self.directory), reverse=True)
        if not steps:
            raise CheckpointError(f"no checkpoint in {self.directory}")
        if step is not None and step not in steps:
            raise CheckpointError(f"no checkpoint of step {step} in {self.directory}, only of {sorted(steps)}")
        damaged = []
        for candidate in steps if step is None else [step]:
            try:
                _, arrays = read_checkpoint(self.directory, candidate, flatten({"params": abstract_parameters}))
            except DamagedError as error:
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
        """Wait, then end the writer's threads."""
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
            self._quiet.enter_context(without_echoes())
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
        # The writer is abandoned, because what it knows of the folder is no longer true; a later save opens another.
        if self._manager is not None:
            with contextlib.suppress(Exception):
                self._manager.close()
            self._manager = None
        if jax.process_index() == 0:
            self._clear_away(step)
        release(error)
        self._quiet.close()
        latest = self.latest_step
        remains = (
            f"the last good checkpoint is step {latest} and remains" if latest is not None else "there is no other"
        )
        return CheckpointError(
            f"could not save the checkpoint of step {step} in {self.directory}: {reason_of(error)}; {remains}"
        )

    def _clear_away(self, step: int, attempts: int = 20) -> None:
        """Free the space on the disk; writes that are still under way may prevent it for a moment."""
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
        # Processes that load the same rows are at the same position. This copy does not change as the iterator goes on.
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
                f" {reason_of(error)}"
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
