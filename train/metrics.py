"""Where the figures of a run are logged: JSON lines always, TensorBoard and Weights & Biases on request."""

import json
import os
from pathlib import Path
from typing import IO, Any

from train.config import TrainConfig


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The dicts of a metrics file, oldest first. A last line that was cut off in writing is left out."""
    if not path.exists():
        return []
    entries = []
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n"):
            entries.append(json.loads(line))
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
        self._file: IO[str] | None = None
        self._tensorboard = self._wandb = None
        if silent:
            return
        self._tensorboard = _open_tensorboard(config) if config.tensorboard else None
        self._wandb = _open_wandb(config) if config.wandb is not None else None
        kept = [entry for entry in read_metrics(self.path) if entry["step"] < first_step]
        rewritten = self.path.with_suffix(".tmp")
        rewritten.write_text("".join(json.dumps(entry) + "\n" for entry in kept))
        os.replace(rewritten, self.path)
        self._file = self.path.open("a")

    def write(self, step: int, values: dict[str, float]) -> None:
        """Logs the values of a step; they are handed to the file system before it returns."""
        if self._file is not None:
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def close(self) -> None:
        """Ends the log."""
        if self._file is not None:
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
