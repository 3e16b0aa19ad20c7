"""What a run prints: one progress line in a terminal, plain lines elsewhere."""

import statistics
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from train.selection import skills

PLAIN_SECONDS = 5.0  # between plain lines
SMOOTHING = 0.9  # of the speed shown


class Console:
    """Prints the progress of a run of `steps` steps."""

    def __init__(self, steps: int, *, plain: bool | None = None, silent: bool = False):
        """`plain`: lines instead of a progress line; None: where standard output is no terminal. `silent`: nothing."""
        self._steps = steps
        self._rich = RichConsole(highlight=False, soft_wrap=True, quiet=silent)
        self._progress: Progress | None = None
        if not (silent or (plain if plain is not None else not sys.stdout.isatty())):
            self._progress = Progress(
                TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
                BarColumn(bar_width=20),
                TaskProgressColumn(),
                TextColumn("{task.description}"),
                console=self._rich,
            )
            self._task = self._progress.add_task("compiling", total=steps)
        self._last_printed = -PLAIN_SECONDS
        self._last_update: float | None = None
        self._seconds_per_step: float | None = None
        self._tokens_per_second: float | None = None

    def __enter__(self) -> Self:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def print(self, line: str) -> None:
        """One line of text, as it is."""
        self._rich.print(line, markup=False)

    def update(self, step: int, values: dict[str, float]) -> None:
        """Shows the values of a step."""
        now = time.monotonic()
        if self._last_update is not None:  # the first step compiles and says nothing about speed
            self._seconds_per_step = _smooth(self._seconds_per_step, now - self._last_update)
            self._tokens_per_second = _smooth(self._tokens_per_second, values["tokens_per_second"])
        self._last_update = now
        text = self._describe(step, values)
        if self._progress is not None:
            self._progress.update(self._task, completed=step, description=text)
        elif now - self._last_printed >= PLAIN_SECONDS or step == self._steps:
            self._last_printed = now
            self.print(f"step {step}/{self._steps}  {text}")

    def evaluated(self, step: int, values: dict[str, float]) -> None:
        """Shows a held-out evaluation."""
        self.print(
            f"step {step}/{self._steps}  held out: loss {values['held_out_loss']:.4f}, "
            f"{values['held_out_bits_per_byte']:.4f} bits per byte{_selection(values)}"
        )

    def finished(self, values: dict[str, float], sample: str, files: dict[str, Path]) -> None:
        """Shows what the run leaves."""
        self.print(f"finished after step {self._steps}: {values['held_out_bits_per_byte']:.4f} held-out bits per byte")
        if sample:
            self.print("a sample:\n" + "\n".join(f"    {line}" for line in sample.splitlines()))
        for name, path in files.items():
            self.print(f"{name + ':':<13}{path}")

    def _describe(self, step: int, values: dict[str, float]) -> str:
        parts = [f"loss {values['loss']:.4f}", f"{values['bits_per_byte']:.3f} bits/byte"]
        if "router_load_max" in values:
            parts.append(f"load {values['router_load_max']:.2f}")
        if self._tokens_per_second is not None:
            parts.append(f"{self._tokens_per_second:,.0f} tokens/s")
        if "model_flop_utilisation" in values:
            parts.append(f"{100 * values['model_flop_utilisation']:.1f}% MFU")
        if self._seconds_per_step is not None:
            minutes, seconds = divmod(round(self._seconds_per_step * (self._steps - step)), 60)
            parts.append(f"{minutes // 60}:{minutes % 60:02}:{seconds:02} left")
        return "  ".join(parts)


def _selection(values: dict[str, float]) -> str:
    found = list(skills(values).values())
    return f", selection {statistics.mean(found):.2f} (random 0, best 1)" if found else ""


def _smooth(mean: float | None, value: float) -> float:
    return value if mean is None else SMOOTHING * mean + (1 - SMOOTHING) * value
