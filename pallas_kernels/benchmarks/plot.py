"""Time against length: the sparse attention and the dense baseline, forward and backward."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LABELS = {
    ("nsa", "random"): "NSA, random selection",
    ("nsa", "local"): "NSA, local selection",
    ("dense", None): "dense",
}


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws forward and backward milliseconds of the whole attention and of dense attention, both axes logarithmic."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for (op, selection), label in LABELS.items():
        chosen = [r for r in rows if r["op"] == op and r["selection"] == selection and "error" not in r]
        if not chosen:
            continue
        lengths = [r["T"] for r in chosen]
        style = "k--" if op == "dense" else "o-"
        axes[0].plot(lengths, [r["forward_ms"]["median"] for r in chosen], style, label=label)
        axes[1].plot(lengths, [r["backward_ms"] for r in chosen], style, label=label)
    for axis, title in zip(axes, ("forward", "backward"), strict=True):
        axis.set(xscale="log", yscale="log", title=title, xlabel="tokens")
        axis.set_xscale("log", base=2)
        axis.grid(True, which="both", alpha=0.3)
    axes[0].set_ylabel("milliseconds")
    if axes[0].lines:
        axes[0].legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
