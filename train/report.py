"""Pictures of finished runs: `python -m train.report [--loads] picture.png name=run_dir ...` draws several into one.

With files of `python -m train positions --out` instead of folders, held-out loss by position.
"""

import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed
import matplotlib.pyplot as plt

from train.metrics import read_metrics
from train.positions import read_positions


def plot_curves(runs: dict[str, Path], path: Path) -> None:
    """Training and held-out bits per byte over steps, for one run or several, as a PNG.

    Args:
      runs: run folders by the name they get in the legend.
      path: of the picture.

    Raises:
      ValueError: a folder holds no metrics.
    """
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    low, high = float("inf"), 0.0
    for index, (name, run_dir) in enumerate(runs.items()):
        entries = read_metrics(run_dir / "metrics.jsonl")
        if not entries:
            raise ValueError(f"{run_dir}: no metrics to draw")
        color = f"C{index}"
        steps, train = _curve(entries, "bits_per_byte")
        axes.plot(steps, train, color=color, alpha=0.35, linewidth=1, label=f"{name}, training")
        held_out_steps, held_out = _curve(entries, "held_out_bits_per_byte")
        axes.plot(held_out_steps, held_out, color=color, marker="o", label=f"{name}, held out")
        values = sorted(train + held_out)
        low, high = min(low, values[0]), max(high, values[int(0.97 * (len(values) - 1))])
    # The first few steps are far off and would squash the rest.
    axes.set(xlabel="step", ylabel="bits per byte", ylim=(low - 0.1, high + 0.1))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)


def plot_loads(runs: dict[str, Path], path: Path) -> None:
    """The largest load of an expert over the mean load, averaged over layers, as a PNG; arguments as `plot_curves`.

    Raises:
      ValueError: a folder holds no metrics of experts.
    """
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for name, run_dir in runs.items():
        steps, loads = _curve(read_metrics(run_dir / "metrics.jsonl"), "router_load_mean")
        if not steps:
            raise ValueError(f"{run_dir}: no loads of experts to draw")
        axes.plot(steps, loads, label=name)
    axes.axhline(1.0, color="black", linewidth=1, linestyle=":", label="even")
    axes.set(xlabel="step", ylabel="largest load / mean load, mean over layers", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)


def plot_positions(files: dict[str, Path], path: Path) -> None:
    """Held-out bits per byte by position in the sequence, one line for each file, as a PNG.

    Args:
      files: of `python -m train positions --out`, by the name they get in the legend.
      path: of the picture.

    Raises:
      ValueError: a file is no such file.
    """
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for name, file in files.items():
        buckets = read_positions(file)
        centres = [(bucket.begin + bucket.end - 1) / 2 for bucket in buckets]
        axes.plot(centres, [bucket.bits_per_byte for bucket in buckets], marker="o", markersize=3, label=name)
    axes.set(xlabel="position in the sequence (tokens before)", ylabel="held-out bits per byte", xlim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)


def _curve(entries: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    points = [(entry["step"], entry[name]) for entry in entries if name in entry]
    return [step for step, _ in points], [value for _, value in points]


def main(arguments: list[str]) -> None:
    """Draws the runs named on the command line."""
    plot = plot_loads if arguments[:1] == ["--loads"] else plot_curves
    arguments = arguments[1:] if plot is plot_loads else arguments
    if len(arguments) < 2 or not all("=" in run for run in arguments[1:]):
        raise SystemExit(
            "usage: python -m train.report [--loads] picture.png name=run_dir [name=run_dir ...]\n"
            "   or: python -m train.report picture.png name=positions.json [name=positions.json ...]"
        )
    runs = {name: Path(path) for name, path in (run.split("=", 1) for run in arguments[1:])}
    draw = plot_positions if all(path.suffix == ".json" for path in runs.values()) else plot
    draw(runs, Path(arguments[0]))


if __name__ == "__main__":
    main(sys.argv[1:])
