import json
from pathlib import Path

import pytest

from pallas_kernels.benchmarks import plot

RESULTS = Path(plot.__file__).parent / "results"
SAME_SHAPE = [str(RESULTS / f"nsa{name}_h100.json") for name in ("", "_128k", "_256k")]


def test_recorded_results_are_drawn_into_one_picture(tmp_path):
    plot.main([str(tmp_path / "all.png"), *SAME_SHAPE])
    assert (tmp_path / "all.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    rows = [row for path in SAME_SHAPE for row in json.loads(Path(path).read_text())["rows"]]
    forward, backward = plot.draw(rows).axes
    lines = {line.get_label(): line for line in forward.lines}
    assert set(lines) == {"NSA, random selection", "NSA, local selection", "dense (cuDNN)"}
    dense = lines["dense (cuDNN)"]
    assert list(dense.get_xdata()) == [2**i for i in range(12, 18)]
    recorded = next(row for row in rows if row["op"] == "dense" and row["T"] == 65536)
    assert dense.get_ydata()[4] == recorded["forward_ms"]["median"]
    assert backward.get_xlabel() == "sequence length (tokens)"
    assert forward.get_ylabel() == "time per layer (ms)"


def test_results_of_different_shapes_are_not_mixed(tmp_path):
    with pytest.raises(SystemExit, match="different devices or shapes"):
        plot.main([str(tmp_path / "all.png"), SAME_SHAPE[0], str(RESULTS / "paper_shape_h100.json")])
    with pytest.raises(SystemExit, match="usage"):
        plot.main([str(tmp_path / "all.png")])
