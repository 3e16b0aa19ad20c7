"""Pictures of runs: `python -m train report picture.png name=run ...` draws several into one."""

import dataclasses
from pathlib import Path

from tyro.conf import Positional

from train.commands.output import check_output
from train.plot import plot_curves, plot_loads, plot_positions, plot_selections, plot_tasks
from train.tasks.haystack import holds_scores


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Draws the training and held-out loss of runs.

    With --loads, draws how evenly experts are used; with --selection, how well layers select. With files of
    `python -m train positions --out` instead of runs, draws held-out loss by position; with files of
    `python -m train evaluate --out`, the share of problems solved.
    """

    picture: Positional[Path]  # the PNG to write
    runs: Positional[tuple[str, ...]]  # name=run, each with the folder of a run or its metrics file
    loads: bool = False  # draw how evenly experts are used
    selection: bool = False  # draw how well the layers select
    tokens_per_step: int | None = None  # where there is a metrics file only


def report(arguments: Arguments) -> None:
    """Draws the runs.

    Raises:
      ValueError: no run is given, one has no name, or one holds nothing to draw.
    """
    if not arguments.runs or not all("=" in run for run in arguments.runs):
        raise ValueError(f"runs = {' '.join(arguments.runs)}: every run is given as name=run")
    runs = {name: Path(path) for name, path in (run.split("=", 1) for run in arguments.runs)}
    for name, path in runs.items():
        if not path.exists():
            raise ValueError(f"runs = {name}={path}: expected the folder or the file of a run")
    check_output("picture", arguments.picture)
    if arguments.loads:
        plot_loads(runs, arguments.picture)
    elif arguments.selection:
        plot_selections(runs, arguments.picture)
    elif all(path.suffix == ".json" and holds_scores(path) for path in runs.values()):
        plot_tasks(runs, arguments.picture)
    elif all(path.suffix == ".json" for path in runs.values()):
        plot_positions(runs, arguments.picture)
    else:
        plot_curves(runs, arguments.picture, arguments.tokens_per_step)
