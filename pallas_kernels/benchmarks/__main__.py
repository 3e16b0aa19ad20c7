"""Times every op, the whole attention and cuDNN's dense attention; prints a table, writes JSON and a plot.

`python -m pallas_kernels.benchmarks tune --op OP` measures the tiles of an op's kernels instead; see `tune`.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax

from pallas_kernels.benchmarks import tune
from pallas_kernels.benchmarks.cases import Shape, cases
from pallas_kernels.benchmarks.plot import describe, plot
from pallas_kernels.benchmarks.provenance import provenance
from pallas_kernels.benchmarks.timing import measure

COLUMNS = (
    "T",
    "selection",
    "op",
    "forward ms",
    "backward ms",
    "TFLOP/s",
    "GB/s",
    "GiB",
    "dense / forward",
    "/ backward",
)


def main(arguments: list[str]) -> int:
    """Runs the benchmark that the command line asks for."""
    if arguments[:1] == ["tune"]:
        return tune.main(arguments[1:])
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.benchmarks", description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384, 32768, 65536, 131072])
    parser.add_argument("--selection", nargs="+", choices=["random", "local"], default=["random", "local"])
    parser.add_argument("--heads", type=int, default=64, help="query heads")
    parser.add_argument("--kv-heads", type=int, default=4, help="key/value heads")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--v-head-dim", type=int, default=None, help="default: --head-dim")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--ops", nargs="+", default=None, help="only these; default: all")
    parser.add_argument("--out", type=Path, default=None, help="write OUT.json and OUT.png")
    options = parser.parse_args(arguments)
    if jax.default_backend() != "gpu":
        parser.error("no GPU was found; the kernels are timed on one")

    rows: list[dict[str, Any]] = []
    print(" | ".join(COLUMNS), flush=True)
    for T in options.lengths:
        shape = Shape(
            T=T,
            H=options.heads,
            K=options.kv_heads,
            Dk=options.head_dim,
            Dv=options.v_head_dim or options.head_dim,
            dtype=options.dtype,
        )
        for selection in options.selection:
            results = []
            for case in cases(shape, selection):
                depends = case.name in ("selected_attention", "nsa")
                wanted = options.ops is None or case.name in options.ops
                if not wanted or (not depends and selection != options.selection[0]):
                    continue
                try:
                    row = measure(case)
                except Exception as error:  # one op that fails must not lose the others' figures
                    row = {"op": case.name, "error": f"{type(error).__name__}: {error}"[:500]}
                results.append({"T": T, "selection": selection if depends else None, **row})
            rows += results
            dense = next((r for r in rows if r["T"] == T and r["op"] == "dense" and "error" not in r), None)
            for row in results:
                print(_line(row, dense), flush=True)
            if options.out:
                record = _write(options.out, shape, rows)
                plot(rows, options.out.with_suffix(".png"), describe(record))
    return 0


def _line(row: dict[str, Any], dense: dict[str, Any] | None) -> str:
    if "error" in row:
        return f"{row['T']} | {row['selection'] or ''} | {row['op']} | {row['error'][:120]}"
    backward = row.get("backward_ms")
    cells = [
        row["T"],
        row["selection"] or "",
        row["op"],
        f"{row['forward_ms']['median']:.3f}",
        "" if backward is None else f"{backward:.3f}",
        f"{row['forward_tflops']:.0f}",
        f"{row['forward_gbytes_per_s']:.0f}",
        f"{row.get('forward_backward_memory_gib', row['forward_memory_gib']):.2f}",
    ]
    if dense is not None and row["op"] == "nsa":
        cells.append(f"{dense['forward_ms']['median'] / row['forward_ms']['median']:.2f}")
        cells.append(f"{dense['backward_ms'] / row['backward_ms']:.2f}")
    return " | ".join(map(str, cells))


def _write(out: Path, shape: Shape, rows: list[dict[str, Any]]) -> dict[str, Any]:
    record = {
        "provenance": provenance(["python", "-m", "pallas_kernels.benchmarks", *sys.argv[1:]]),
        "shape": {name: value for name, value in dataclasses.asdict(shape).items() if name != "T"},
        "units": "milliseconds per call; backward = forward and backward - forward; memory by the compiler's count",
        "rows": rows,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    return record


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
