"""Measures the tiles of a kernel on the GPU at hand and writes the fastest into the op's `tiles.py`."""

import argparse
import ast
import dataclasses
import importlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from pallas_kernels.benchmarks.cases import Shape
from pallas_kernels.benchmarks.programs import Problem, program
from pallas_kernels.benchmarks.timing import time_call
from pallas_kernels.devices import current_device
from pallas_kernels.kernels import MOSAIC, TRITON
from pallas_kernels.mosaic.tiles import IntervalTile, PartialTile, RingTile, ScoreTile, UnionTile
from pallas_kernels.tiles import Key, MatrixKey, Table, find_row
from pallas_kernels.triton.tiles import AppendTile, BlockTile, DecodeTile, ProductTile, QueryTile, Tile

BACKENDS = {kernels.name: kernels for kernels in (TRITON, MOSAIC)}
ATTENTION = {
    **{"FORWARD": "tile", "QUERY_GRADIENT": "query_tile", "KEY_GRADIENT": "key_tile"},
    **{"MOSAIC_FORWARD": "tile", "MOSAIC_QUERY_GRADIENT": "query_tile", "MOSAIC_KEY_GRADIENT": "key_tile"},
}
# The tables of each op, and the argument of the op that takes a tile of the table.
TABLES = {
    "compressed_attention": ATTENTION,
    "block_selection": {"SCORE": "tile", "MOSAIC_SELECTION": "tile"},
    "selected_attention": ATTENTION,
    "window_attention": ATTENTION,
    "decode_attention": {"STEP": "tile"},
    "append_tokens": {"APPEND": "tile"},
    "one_row_product": {"PRODUCT": "tile"},
}
LEAST_GAIN = 0.02  # a tile is replaced by one that is faster by more than what a measurement may be off
LINE = 120  # characters
Measure = Callable[[Any, Callable[..., Any], tuple], float]


def backend_of(table: str) -> str:
    """Whose kernel takes the tiles of a table."""
    return MOSAIC.name if table.startswith("MOSAIC") else TRITON.name


def candidates(present: Any) -> Iterator[Any]:
    """Tiles to measure beside the present one; of selected attention's forward pass on Triton, both kinds."""
    warps, stages, slots = (4, 8), (2, 3), (1, 2, 3, 4, 5)
    if isinstance(present, Tile):
        sides = itertools.product((32, 64, 128), (32, 64, 128), warps, (1, *stages))
        yield from (Tile(*sizes, widest=present.widest) for sizes in sides)
        return
    sizes: dict[Any, tuple[tuple[Any, ...], ...]] = {
        QueryTile: ((16, 32, 64), (2, *warps), (1, *stages)),
        BlockTile: ((32, 64, 128), (512, 1024), warps, (1, 2)),
        DecodeTile: ((16, 32, 64, 128, 256), (2, *warps)),
        AppendTile: ((32, 64, 128, 256), (1, 2, *warps)),
        ProductTile: ((1, 2, 4, 8), (1, 2, *warps), (256, 512, 1024, 2048)),
        IntervalTile: ((2, 3), (64, 128), slots, (1, 2)),
        UnionTile: (slots, (1, 2)),
        RingTile: (slots,),
        PartialTile: (slots, (None, 256, 512, 1024)),
        ScoreTile: (slots[1:],),
    }
    for kind in (QueryTile, BlockTile) if isinstance(present, QueryTile | BlockTile) else (type(present),):
        yield from itertools.starmap(kind, itertools.product(*sizes[kind]))


def key_for(op: str, problem: Problem) -> Key | MatrixKey:
    """What the op looks its tile up by."""
    shape, itemsize = problem.shape, jax.numpy.dtype(problem.shape.dtype).itemsize
    if op == "one_row_product":
        return MatrixKey(itemsize, problem.matrix[1])
    head_dims = (shape.Dk,) if op == "block_selection" else (shape.Dk, shape.Dv)
    return Key(itemsize, max(head_dims), shape.H // shape.K, sum(head_dims))


def milliseconds(tile: Any, function: Callable[..., Any], arrays: tuple) -> float:
    """The median time of a call."""
    return time_call(jax.jit(function).lower(*arrays).compile(), arrays).median


def tune(
    op: str, table: str, problem: Problem, measure: Measure = milliseconds, interpret: bool = False
) -> tuple[Table, dict[Any, float]]:
    """The op's table with the fastest tile for this problem on this device, and what every tile took.

    With the pattern "local", the tile that is found is the one for selections that neighbours share, where the present
    tile has one. Tiles that do not compile or run are left out.
    """
    rows: Table = getattr(importlib.import_module(f"pallas_kernels.{op}.tiles"), table)
    row = find_row(rows, key_for(op, problem))
    shared = problem.pattern == "local" and getattr(row.tile, "shared", None) is not None
    present = row.tile.shared if shared else row.tile
    alone = dataclasses.replace(present, shared=None) if isinstance(present, QueryTile) else present
    kinds = (QueryTile, BlockTile) if (op, table) == ("selected_attention", "FORWARD") else type(alone)
    kinds = QueryTile if shared else kinds
    timed = program(op, backend_of(table), TABLES[op][table], problem, interpret)
    times: dict[Any, float] = {}
    for tile in dict.fromkeys([alone, *(tile for tile in candidates(alone) if isinstance(tile, kinds))]):
        try:
            times[tile] = measure(tile, timed.function(tile), timed.arrays) / timed.calls
        except Exception as error:  # too much shared memory, mostly: the next tile may fit
            print(f"{tile}: {type(error).__name__}: {str(error)[:100]}", flush=True)
        else:
            print(f"{tile}: {times[tile]:.4g} ms", flush=True)
    if not times:
        return rows, times
    best = min(times, key=lambda tile: times[tile])
    if alone in times and times[best] > (1 - LEAST_GAIN) * times[alone]:
        return rows, times
    before = f"; {source(alone)} {times[alone]:.4g}" if alone in times else ""
    device = current_device()
    assert device.compute_capability is not None
    size = " x ".join(map(str, problem.matrix)) if op == "one_row_product" else problem
    note = f"{device.device_kind}, {size}: {times[best]:.4g} ms{before}"
    if shared:
        best = dataclasses.replace(row.tile, shared=best)
    elif isinstance(best, QueryTile) and isinstance(row.tile, QueryTile):
        best = dataclasses.replace(best, shared=row.tile.shared)
    return replaced(
        rows, row, dataclasses.replace(row, capability=device.compute_capability, tile=best, measured=note)
    ), times


def replaced(rows: Table, row: Any, new: Any) -> Table:
    """The table with `new` for `row`, or beside it if they are for different devices, in order."""
    kept = [x for x in rows if x is not row or row.capability != new.capability]
    return tuple(sorted([*kept, new], key=lambda x: (x.capability, -x.itemsize, *x.order)))


def source(value: Any) -> str:
    """A tile or a row as it is written in `tiles.py`: what is a default is left out."""
    if not dataclasses.is_dataclass(value):
        return f'"{value}"' if isinstance(value, str) else repr(value)
    return f"{type(value).__name__}({', '.join(_arguments(value))})"


def _arguments(value: Any) -> list[str]:
    parts = []
    for field in dataclasses.fields(value):
        part = getattr(value, field.name)
        if part != field.default:
            required = field.default is dataclasses.MISSING or field.name == "measured"
            parts.append(source(part) if required else f"{field.name}={source(part)}")
    return parts


def render(table: str, rows: Table) -> str:
    """The assignment of a table, as `ruff format` leaves it."""
    one = f"{table}: Table = ({source(rows[0])},)"
    if len(rows) == 1 and len(one) <= LINE:
        return one
    lines = [f"{table}: Table = ("]
    for row in rows:
        line = f"    {source(row)},"
        if len(line) > LINE:
            together = " " * 8 + ", ".join(_arguments(row))
            inner = [together] if len(together) <= LINE else [f"{' ' * 8}{part}," for part in _arguments(row)]
            line = "\n".join([f"    {type(row).__name__}(", *inner, "    ),"])
        lines.append(line)
    return "\n".join([*lines, ")"])


def write(path: Path, table: str, rows: Table) -> None:
    """Puts a table in place of the one of that name in a `tiles.py`, whose other lines stay as they are."""
    text = path.read_text()
    found = next(
        node
        for node in ast.parse(text).body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == table
    )
    lines = text.split("\n")
    lines[found.lineno - 1 : found.end_lineno] = render(table, rows).split("\n")
    path.write_text("\n".join(lines))


def main(arguments: list[str]) -> int:
    """Tunes what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.benchmarks tune", description=__doc__)
    parser.add_argument("--op", choices=TABLES, required=True)
    parser.add_argument("--backend", choices=BACKENDS, default=TRITON.name, help="whose tiles")
    parser.add_argument("--tables", nargs="+", default=None, help="only these of the backend's tables; default: all")
    parser.add_argument("--length", type=int, default=65536)
    parser.add_argument("--selection", choices=["random", "local"], default="random")
    parser.add_argument("--batch", type=int, default=1, help="rows of a decoding step")
    parser.add_argument("--heads", type=int, default=64, help="query heads")
    parser.add_argument("--kv-heads", type=int, default=4, help="key/value heads")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--v-head-dim", type=int, default=None, help="default: --head-dim")
    parser.add_argument(
        "--matrix", type=int, nargs=2, default=[2560, 1024], metavar=("ROWS", "COLUMNS"), help="of one_row_product"
    )
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--dry-run", action="store_true", help="print, and write nothing")
    options = parser.parse_args(arguments)
    tables = [table for table in TABLES[options.op] if backend_of(table) == options.backend]
    if not tables:
        parser.error(f"--backend {options.backend}: has no kernel of {options.op}")
    unknown = set(options.tables or ()) - set(tables)
    if unknown:
        parser.error(f"--tables {' '.join(sorted(unknown))}: expected some of {' '.join(tables)}")
    device = current_device()
    if device.compute_capability is None:
        parser.error("no NVIDIA GPU of a known compute capability was found; the kernels are timed on one")
    try:
        BACKENDS[options.backend].check_capability(device)
    except NotImplementedError as refusal:
        parser.error(f"--backend {options.backend}: {refusal}")
    shape = Shape(
        T=options.length,
        H=options.heads,
        K=options.kv_heads,
        Dk=options.head_dim,
        Dv=options.v_head_dim or options.head_dim,
        dtype=options.dtype,
    )
    problem = Problem(shape, options.selection, options.batch, tuple(options.matrix))
    module = importlib.import_module(f"pallas_kernels.{options.op}.tiles")
    for table in options.tables or tables:
        print(f"{options.op} {table}", flush=True)
        rows, _ = tune(options.op, table, problem)
        if rows == getattr(module, table):
            print("kept", flush=True)
            continue
        print(render(table, rows), flush=True)
        if not options.dry_run:
            write(Path(str(module.__file__)), table, rows)
    return 0
