"""Pictures of runs: their curves, the loads of their experts, their loss by position.

A run is its folder, or its metrics file alone.
"""

import statistics
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from pallas_kernels.palette import COLORS
from train.evaluate import read_positions
from train.metrics import read_metrics
from train.run_folder import holds_run, read_config
from train.selection import skills
from train.tasks.haystack import read_scores

LINE_COLORS = [COLORS[i] for i in (0, 2, 3, 5, 4)]  # blue and orange first, no green, yellow last
STYLES = ("o-", "s--", "^:", "D-.")


def draw_curves(runs: dict[str, Path], tokens_per_step: int | None = None) -> Figure:
    """Training and held-out bits per byte over tokens, or over steps where their number of tokens is not known.

    Args:
      runs: run folders, or metrics files, by the name they get in the legend.
      tokens_per_step: of all runs; None: what the configs in their folders say.

    Raises:
      ValueError: a run holds no metrics.
    """
    sizes = {name: tokens_per_step or _tokens_per_step(run) for name, run in runs.items()}
    over_tokens = None not in sizes.values()
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    low, high = float("inf"), 0.0
    for index, (name, run) in enumerate(runs.items()):
        entries = _entries(run)
        if not entries:
            raise ValueError(f"{run}: no metrics to draw")
        color, style = LINE_COLORS[index % len(LINE_COLORS)], STYLES[index % len(STYLES)]
        unit = (sizes[name] or 1) / 1e6 if over_tokens else 1
        steps, train = _curve(entries, "bits_per_byte")
        axes.plot([step * unit for step in steps], train, color=color, alpha=0.3, lw=0.8, label=f"{name}, training")
        steps, held_out = _curve(entries, "held_out_bits_per_byte")
        axes.plot([step * unit for step in steps], held_out, style, color=color, label=f"{name}, held out")
        values = sorted(train + held_out)
        low, high = min(low, values[0]), max(high, values[int(0.97 * (len(values) - 1))])
    # The first few steps are far off and would squash the rest.
    axes.set(ylabel="loss (bits per byte)", ylim=(low - 0.1, high + 0.1))
    axes.set_xlabel("training tokens (millions)" if over_tokens else "step")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def plot_curves(runs: dict[str, Path], path: Path, tokens_per_step: int | None = None) -> None:
    """Writes `draw_curves`' picture as a PNG."""
    draw_curves(runs, tokens_per_step).savefig(path, dpi=120, metadata={"Software": None})


def _tokens_per_step(run: Path) -> int | None:
    if not holds_run(run):
        return None
    data = read_config(run, "runs").data
    return data.batch_size * data.sequence_length


def plot_loads(runs: dict[str, Path], path: Path) -> None:
    """The largest load of an expert over the mean load, averaged over layers, as a PNG; for runs see `draw_curves`.

    Raises:
      ValueError: a run holds no metrics of experts.
    """
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for index, (name, run) in enumerate(runs.items()):
        steps, loads = _curve(_entries(run), "router_load_mean")
        if not steps:
            raise ValueError(f"{run}: no loads of experts to draw")
        axes.plot(steps, loads, color=LINE_COLORS[index % len(LINE_COLORS)], label=name)
    axes.axhline(1.0, color="black", linewidth=1, linestyle=":", label="even")
    axes.set(xlabel="step", ylabel="largest load / mean load, mean over layers", ylim=(0, None))
    _finish(figure, path)


def plot_selections(runs: dict[str, Path], path: Path) -> None:
    """How well each layer selects over the steps, a panel for each run, as a PNG; for runs see `draw_curves`.

    0 is as good as random blocks, 1 the best possible. The mean over K/V heads.

    Raises:
      ValueError: a run holds no measurement of the selection.
    """
    figure = Figure(figsize=(1 + 4 * len(runs), 4), layout="constrained")
    colors = matplotlib.colormaps["cividis"]
    for axes, (name, run) in zip(figure.subplots(1, len(runs), squeeze=False)[0], runs.items(), strict=True):
        measured = {entry["step"]: found for entry in _entries(run) if (found := skills(entry))}
        if not measured:
            raise ValueError(f"{run}: no measurement of the selection to draw")
        layers = sorted({layer for found in measured.values() for layer, _ in found})
        for layer in layers:
            points = {
                step: statistics.mean(skill for (at, _), skill in found.items() if at == layer)
                for step, found in measured.items()
                if any(at == layer for at, _ in found)
            }
            color = colors(layer / max(1, layers[-1]))
            axes.plot(list(points), list(points.values()), "o-", color=color, markersize=4, label=f"layer {layer}")
        axes.axhline(0, color="black", linewidth=1, linestyle=":")
        axes.set(title=name, xlabel="step", ylabel="(chosen - random) / (best - random)")
    _finish(figure, path)


def plot_positions(files: dict[str, Path], path: Path) -> None:
    """Held-out bits per byte by position in the sequence, one line for each file, as a PNG.

    Args:
      files: of `python -m train positions --out`, by the name they get in the legend.
      path: of the picture.

    Raises:
      ValueError: a file was not written by that command.
    """
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for index, (name, file) in enumerate(files.items()):
        buckets = read_positions(file)
        centres = [(bucket.begin + bucket.end - 1) / 2 for bucket in buckets]
        color, style = LINE_COLORS[index % len(LINE_COLORS)], STYLES[index % len(STYLES)]
        axes.plot(centres, [bucket.bits_per_byte for bucket in buckets], style, color=color, markersize=4, label=name)
    axes.set(xlabel="position in the sequence (tokens before)", ylabel="held-out bits per byte", xlim=(0, None))
    _finish(figure, path)


def plot_tasks(files: dict[str, Path], path: Path) -> None:
    """The share of problems solved by length and depth, one map for each file, as a PNG.

    Args:
      files: of `python -m train evaluate --out`, by the name they get as a title.
      path: of the picture.

    Raises:
      ValueError: a file was not written by that command.
    """
    figure = Figure(figsize=(1.5 + 3 * len(files), 3.5), layout="constrained")
    row = figure.subplots(1, len(files), squeeze=False)[0]
    for axes, (name, file) in zip(row, files.items(), strict=True):
        scores = read_scores(file)
        lengths, depths = (sorted(set(places)) for places in zip(*scores, strict=True))
        shares = [
            [scores[length, depth].solved / scores[length, depth].problems for length in lengths] for depth in depths
        ]
        image = axes.imshow(shares, vmin=0, vmax=1, cmap="cividis", aspect="auto")
        axes.set_xticks(range(len(lengths)), [str(length) for length in lengths])
        axes.set_yticks(range(len(depths)), [f"{depth:.2f}" for depth in depths])
        axes.set(title=name, xlabel="tokens", ylabel="depth")
    figure.colorbar(image, ax=row, label="share of problems solved")
    figure.savefig(path, dpi=120, metadata={"Software": None})


def _finish(figure: Figure, path: Path) -> None:
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120, metadata={"Software": None})


def _entries(run: Path) -> list[dict[str, Any]]:
    return read_metrics(run if run.is_file() else run / "metrics.jsonl")


def _curve(entries: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    points = [(entry["step"], entry[name]) for entry in entries if name in entry]
    return [step for step, _ in points], [value for _, value in points]
