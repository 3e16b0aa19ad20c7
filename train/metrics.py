"""Where the figures of a run are logged: JSON lines always, TensorBoard and Weights & Biases on request."""

import json
import logging
from pathlib import Path
from typing import Any, BinaryIO

from train.config import TrainConfig
from train.run_folder import write

LOGGER = logging.getLogger(__name__)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The dicts of a metrics file, oldest first.

    A last line that was cut off in writing is left out. So is, with a warning, one that is no JSON object.
    """
    if not path.exists():
        return []
    entries = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            entry = json.loads(line)
            entries.append(entry | {"step": int(entry["step"])})
        except (ValueError, KeyError, TypeError):
            LOGGER.warning("%s, line %d: expected a JSON object with a step, passed over", path, number)
    return entries


class MetricsLog:
    """Appends one dict per step to `run_dir/metrics.jsonl`, and to the services that the config asks for."""

    def __init__(self, config: TrainConfig, *, first_step: int, silent: bool = False):
        """Opens the log of a run that goes on at `first_step`; what an earlier process logged from there on is dropped.

        `silent`: writes nothing; for every process except the first.

        Raises:
          ImportError: TensorBoard or Weights & Biases is asked for but not installed; says which extra brings it.
        """
        self.path = config.run_dir / "metrics.jsonl"
        self._file: BinaryIO | None = None
        self._waiting = b""  # for room on the disk
        self._tensorboard = self._wandb = None
        if silent:
            return
        self._tensorboard = _open_tensorboard(config) if config.tensorboard else None
        self._wandb = _open_wandb(config) if config.wandb is not None else None
        kept = [entry for entry in read_metrics(self.path) if entry["step"] < first_step]
        write(self.path, "".join(json.dumps(entry) + "\n" for entry in kept))
        self._file = self.path.open("ab", buffering=0)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Logs the values of a step; they are handed to the file system before it returns.

        Where that has no room, the values wait for the next call, and a warning says so.
        """
        self._append(json.dumps({"step": step, **values}) + "\n")
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def _append(self, text: str) -> None:
        if self._file is None:
            return
        waited = bool(self._waiting)
        self._waiting += text.encode()
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            if not waited:
                LOGGER.warning("cannot write %s: %s; its lines wait in memory", self.path, error.strerror)

    def close(self) -> None:
        """Ends the log."""
        if self._file is not None:
            self._append("")
            if self._waiting:
                LOGGER.error("%s lacks its last %d lines", self.path, self._waiting.count(b"\n"))
            self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def _open_tensorboard(config: TrainConfig) -> Any:
    try:
        from tensorboard.summary import Writer
    except ImportError as error:
        raise ImportError("tensorboard = True: TensorBoard is missing; install nsa-jax[tensorboard]") from error
    return Writer(str(config.run_dir / "tensorboard"))


def _open_wandb(config: TrainConfig) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ImportError(f"wandb = {config.wandb}: Weights & Biases is missing; install nsa-jax[wandb]") from error
    # The same id for the same folder, so that a resumed run goes on in its own curve.
    return wandb.init(project=config.wandb, name=config.run_dir.name, id=config.run_dir.name, resume="allow")
