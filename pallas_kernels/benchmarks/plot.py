"""Time against length: the sparse attention and the dense baseline, forward and backward.

`python -m pallas_kernels.benchmarks.plot OUT.png RESULT.json ...` draws recorded results again, several into one.
"""

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from pallas_kernels.palette import COLORS

# What is drawn: an op with a selection, and how a line of it looks.
LINES = {
    ("nsa", "random"): ("NSA, random selection", COLORS[0]),
    ("nsa", "local"): ("NSA, local selection", COLORS[1]),
    ("dense", None): ("dense (cuDNN)", COLORS[2]),
}
STYLES = {"triton": "o-", "mosaic": "s--", "default": "D:", "cudnn": "^--"}  # by the backend


def draw(rows: list[dict[str, Any]], title: str = "") -> Figure:
    """Forward and backward milliseconds of the whole attention and of dense attention, both axes logarithmic.

    Args:
      rows: as the benchmark records them.
      title: what was measured.
    """
    figure = Figure(figsize=(9, 3.9), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    drawn = [{**row, "backend": backend_of(row)} for row in rows if "error" not in row]
    for (op, selection), (label, color) in LINES.items():
        found = sorted((r for r in drawn if (r["op"], r["selection"]) == (op, selection)), key=lambda row: row["T"])
        for backend in dict.fromkeys(row["backend"] for row in found):
            chosen = [row for row in found if row["backend"] == backend]
            lengths = [row["T"] for row in chosen]
            look: dict[str, Any] = {"color": color, "label": f"{label}, {backend}" if op == "nsa" else label}
            panels[0].plot(lengths, [row["forward_ms"]["median"] for row in chosen], STYLES[backend], **look)
            panels[1].plot(lengths, [row["backward_ms"] for row in chosen], STYLES[backend], **look)
    for axes, name in zip(panels, ("forward", "backward"), strict=True):
        axes.set(yscale="log", title=name, xlabel="sequence length (tokens)")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda T, _: f"{T / 1024:g}k" if T >= 1024 else f"{T:g}"))
        axes.grid(True, which="major", alpha=0.4)
        axes.grid(True, which="minor", alpha=0.15)
    panels[0].set_ylabel("time per layer (ms)")
    if panels[0].lines:
        panels[0].legend(frameon=False)
    figure.suptitle(title, fontsize="medium")
    return figure


def backend_of(row: dict[str, Any]) -> str:
    """Which backend a recorded row is of; those without one are from when the benchmark timed Triton's kernels only."""
    return row.get("backend", "cudnn" if row["op"].startswith("dense") else "triton")


def plot(rows: list[dict[str, Any]], path: Path, title: str = "") -> None:
    """Writes `draw`'s picture as a PNG."""
    draw(rows, title).savefig(path, dpi=150, metadata={"Software": None})


def describe(record: dict[str, Any]) -> str:
    """A title from a recorded result: device and shape."""
    shape = record["shape"]
    heads = f"{shape['H']} query heads, {shape['K']} key/value heads of {shape['Dk']}"
    return f"{record['provenance']['device']['kind']}, {heads}, {shape['dtype']}, batch 1"


def main(arguments: list[str]) -> None:
    """Draws the results named on the command line."""
    if len(arguments) < 2:
        raise SystemExit("usage: python -m pallas_kernels.benchmarks.plot OUT.png RESULT.json [RESULT.json ...]")
    records = [json.loads(Path(path).read_text()) for path in arguments[1:]]
    if any(describe(record) != describe(records[0]) for record in records):
        raise SystemExit("the results are of different devices or shapes")
    plot([row for record in records for row in record["rows"]], Path(arguments[0]), describe(records[0]))


if __name__ == "__main__":
    main(sys.argv[1:])
