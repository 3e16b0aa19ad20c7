"""Times every op and the whole attention by one or several backends, and cuDNN's dense attention.

Prints a table, writes JSON and a plot.

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
from pallas_kernels.benchmarks.cases import Shape, cases, dense_cases, inputs, lse_of, selection
from pallas_kernels.benchmarks.ops import BACKENDS, DEFAULT
from pallas_kernels.benchmarks.plot import describe, plot
from pallas_kernels.benchmarks.provenance import provenance
from pallas_kernels.benchmarks.timing import measure

COLUMNS = (
    "T",
    "selection",
    "op",
    "backend",
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
    parser.add_argument(
        "--backends",
        nargs="+",
        choices=BACKENDS,
        default=[DEFAULT],
        help="whose kernels; default: of each pass those that implementation=None takes. Tables made of OUT.json show "
        "the first one",
    )
    parser.add_argument("--ops", nargs="+", default=None, help="only these; default: all")
    parser.add_argument("--out", type=Path, default=None, help="write OUT.json and OUT.png")
    options = parser.parse_args(arguments)
    if jax.default_backend() != "gpu":
        parser.error("no GPU was found; the kernels are timed on one")

    origin = provenance(["python", "-m", "pallas_kernels.benchmarks", *arguments])
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
        arrays = inputs(shape, options.selection[0])
        selections = {pattern: selection(shape, pattern) for pattern in options.selection}
        lse = lse_of(shape, arrays)
        timed = [case for backend in options.backends for case in cases(shape, backend, arrays, selections, lse)]
        timed = [
            case for case in (*dense_cases(shape, arrays), *timed) if options.ops is None or case.name in options.ops
        ]
        dense = None
        for found in measure(timed):
            row = {"T": T, **found}
            rows.append(row)
            if row["op"] == "dense":
                dense = row
            print(_line(row, dense), flush=True)
            if options.out:
                _write(options.out, origin, shape, rows)
        if options.out:
            record = _write(options.out, origin, shape, rows)
            plot(rows, options.out.with_suffix(".png"), describe(record))
    return 0


def _line(row: dict[str, Any], dense: dict[str, Any] | None) -> str:
    named = [row["T"], row["selection"] or "", row["op"], row["backend"]]
    if "error" in row:
        return " | ".join(map(str, [*named, row["error"][:120]]))
    backward = row.get("backward_ms")
    cells = [
        *named,
        f"{row['forward_ms']['median']:.3f}",
        "" if backward is None else f"{backward:.3f}",
        f"{row['forward_tflops']:.0f}",
        f"{row['forward_gbytes_per_s']:.0f}",
        f"{row.get('forward_backward_memory_gib', row['forward_memory_gib']):.2f}",
    ]
    if dense is not None and "error" not in dense and row["op"] == "nsa":
        cells.append(f"{dense['forward_ms']['median'] / row['forward_ms']['median']:.2f}")
        cells.append(f"{dense['backward_ms'] / row['backward_ms']:.2f}")
    return " | ".join(map(str, cells))


def _write(out: Path, origin: dict[str, Any], shape: Shape, rows: list[dict[str, Any]]) -> dict[str, Any]:
    record = {
        "provenance": origin,
        "shape": {name: value for name, value in dataclasses.asdict(shape).items() if name != "T"},
        "units": "milliseconds per call; backward = forward and backward - forward; memory by the compiler's count",
        "rows": rows,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    return record


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
