import json
from pathlib import Path

import pytest

from pallas_kernels.benchmarks import plot
from pallas_kernels.benchmarks.ops import BACKENDS

RESULTS = Path(plot.__file__).parent / "results"
RECORDED = RESULTS / "nsa_h100.json"


def test_recorded_results_are_drawn_into_one_picture(tmp_path):
    record, files = json.loads(RECORDED.read_text()), []
    rows = record["rows"]
    for name in ("short", "long"):
        files.append(str(tmp_path / f"{name}.json"))
        chosen = [row for row in rows if (row["T"] < 65536) == (name == "short")]
        Path(files[-1]).write_text(json.dumps({**record, "rows": chosen}))
    plot.main([str(tmp_path / "all.png"), *files])
    assert (tmp_path / "all.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    forward, backward = plot.draw(rows).axes
    lines = {line.get_label(): line for line in forward.lines}
    assert set(lines) == {"NSA, random selection, default", "NSA, local selection, default", "dense (cuDNN)"}
    dense = lines["dense (cuDNN)"]
    assert list(dense.get_xdata()) == [2**i for i in range(12, 18)]
    recorded = next(row for row in rows if row["op"] == "dense" and row["T"] == 65536)
    assert dense.get_ydata()[4] == recorded["forward_ms"]["median"]
    assert backward.get_xlabel() == "sequence length (tokens)"
    assert forward.get_ylabel() == "time per layer (ms)"


def test_every_backend_has_its_line():
    def row(op, backend, selection, ms):
        figures = {"forward_ms": {"median": ms}, "backward_ms": 2 * ms}
        return {"T": 8192, "op": op, "backend": backend, "selection": selection, **figures}

    rows = [
        row("dense", "cudnn", None, 5.0),
        row("nsa", "triton", "random", 3.0),
        row("nsa", "default", "random", 2.0),
        {
            "T": 8192,
            "op": "nsa",
            "backend": "mosaic",
            "selection": "random",
            "error": "NotImplementedError: heads of 7",
        },
        row("window_attention", "mosaic", None, 1.0),
    ]
    forward, backward = plot.draw(rows).axes
    drawn = {line.get_label(): list(line.get_ydata()) for line in forward.lines}
    assert drawn == {
        "NSA, random selection, triton": [3.0],
        "NSA, random selection, default": [2.0],
        "dense (cuDNN)": [5.0],
    }
    assert [list(line.get_ydata()) for line in backward.lines] == [[6.0], [4.0], [10.0]]
    looks = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in forward.lines}
    assert len(looks) == 3
    assert set(plot.STYLES) == {*BACKENDS, "cudnn"}


def test_results_of_different_shapes_are_not_mixed(tmp_path):
    with pytest.raises(SystemExit, match="different devices or shapes"):
        plot.main([str(tmp_path / "all.png"), str(RECORDED), str(RESULTS / "paper_shape_h100.json")])
    with pytest.raises(SystemExit, match="usage"):
        plot.main([str(tmp_path / "all.png")])
