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

from pallas_kernels.benchmarks import decode
from pallas_kernels.benchmarks.cases import Shape, inputs
from pallas_kernels.benchmarks.ops import PARTS, decode_attention
from pallas_kernels.benchmarks.patterns import Pattern
from pallas_kernels.benchmarks.timing import time_call
from pallas_kernels.devices import current_device
from pallas_kernels.tiles import Key, Row, Table, find_row
from pallas_kernels.triton.tiles import BlockTile, DecodeTile, QueryTile, Tile

# The tables of each op, and the argument of the op that takes a tile of the table.
TABLES = {
    "compressed_attention": {"FORWARD": "tile", "QUERY_GRADIENT": "query_tile", "KEY_GRADIENT": "key_tile"},
    "block_selection": {"SCORE": "tile"},
    "selected_attention": {"FORWARD": "tile", "QUERY_GRADIENT": "query_tile", "KEY_GRADIENT": "key_tile"},
    "window_attention": {"FORWARD": "tile", "QUERY_GRADIENT": "query_tile", "KEY_GRADIENT": "key_tile"},
    "decode_attention": {"STEP": "tile"},
}
LEAST_GAIN = 0.02  # a tile is replaced by one that is faster by more than what a measurement may be off
Measure = Callable[[Any, Callable[..., Any], tuple], float]


def candidates(present: Any) -> Iterator[Any]:
    """Tiles to measure beside the present one; of selected attention's forward pass, both kinds."""
    warps, stages = (4, 8), (2, 3)
    if isinstance(present, Tile):
        sides = itertools.product((32, 64, 128), (32, 64, 128), warps, (1, *stages))
        yield from (Tile(*sizes, widest=present.widest) for sizes in sides)
    elif isinstance(present, DecodeTile):
        yield from itertools.starmap(DecodeTile, itertools.product((16, 32, 64, 128, 256), (2, 4, 8)))
    else:
        yield from itertools.starmap(QueryTile, itertools.product((16, 32, 64), (2, *warps), (1, *stages)))
        yield from itertools.starmap(BlockTile, itertools.product((32, 64, 128), (512, 1024), warps, (1, 2)))


def program(
    op: str, table: str, shape: Shape, pattern: Pattern, batch: int, interpret: bool = False
) -> tuple[Callable[..., Any], tuple]:
    """(a function of a tile that gives a function of arrays, the arrays)."""
    argument = TABLES[op][table]
    options: dict[str, Any] = {"config": shape, "scale": shape.Dk**-0.5, "interpret": interpret}
    if op == "decode_attention":
        arrays = decode.inputs(shape, batch, seed=0)
        return lambda tile: lambda *arrays: decode_attention(*arrays, **options, tile=tile), arrays
    q, keys, gates, block_indices = inputs(shape, pattern)
    if op == "block_selection":
        o, lse = jax.jit(lambda *a: PARTS.compressed_attention(*a, None, 0, **options))(q, *keys[:2])
        return lambda tile: lambda *a: PARTS.select_blocks(*a, None, 0, **options, tile=tile), (q, keys.cmp_k, lse)
    branch = ("compressed_attention", "selected_attention", "window_attention").index(op)
    arrays = (q, *keys[2 * branch : 2 * branch + 2], *([block_indices] if op == "selected_attention" else []))
    forward, backward = getattr(PARTS, op), getattr(PARTS, op + "_backward")
    if table == "FORWARD":
        return lambda tile: lambda *a: forward(*a, None, 0, **options, tile=tile), arrays
    o, lse = jax.jit(lambda *a: forward(*a, None, 0, **options))(*arrays)
    gate = gates[..., branch]

    def gradients(tile: Any) -> Callable[..., Any]:
        return lambda *a: backward(*a[:-1], None, 0, gate=a[-1], **options, **{argument: tile})

    return gradients, (*arrays, o, lse, o, gate)


def milliseconds(tile: Any, function: Callable[..., Any], arrays: tuple) -> float:
    """The median time of a call."""
    return time_call(jax.jit(function).lower(*arrays).compile(), arrays).median


def tune(
    op: str,
    table: str,
    shape: Shape,
    pattern: Pattern,
    batch: int = 1,
    measure: Measure = milliseconds,
    interpret: bool = False,
) -> tuple[Table, dict[Any, float]]:
    """The op's table with the fastest tile for this shape on this device, and what every tile took.

    With the pattern "local", the tile that is found is the one for selections that neighbours share, where the present
    tile has one. Tiles that do not compile or run are left out.
    """
    rows: Table = getattr(importlib.import_module(f"pallas_kernels.{op}.tiles"), table)
    key = Key(jax.numpy.dtype(shape.dtype).itemsize, max(shape.Dk, shape.Dv), shape.H // shape.K)
    row = find_row(rows, key)
    shared = pattern == "local" and getattr(row.tile, "shared", None) is not None
    present = row.tile.shared if shared else row.tile
    alone = dataclasses.replace(present, shared=None) if isinstance(present, QueryTile) else present
    kinds = (QueryTile, BlockTile) if op == "selected_attention" and table == "FORWARD" else type(alone)
    kinds = QueryTile if shared else kinds
    make, arrays = program(op, table, shape, pattern, batch, interpret)
    times: dict[Any, float] = {}
    for tile in dict.fromkeys([alone, *(tile for tile in candidates(alone) if isinstance(tile, kinds))]):
        try:
            times[tile] = measure(tile, make(tile), arrays)
        except Exception as error:  # too much shared memory, mostly: the next tile may fit
            print(f"{tile}: {type(error).__name__}: {str(error)[:100]}", flush=True)
        else:
            print(f"{tile}: {times[tile]:.4g} ms", flush=True)
    best = min(times, key=lambda tile: times[tile])
    if alone in times and times[best] > (1 - LEAST_GAIN) * times[alone]:
        return rows, times
    before = f"; {source(alone)} {times[alone]:.4g}" if alone in times else ""
    device = current_device()
    assert device.compute_capability is not None
    note = f"{device.device_kind}, T {shape.T}, {shape.H}/{shape.K} heads: {times[best]:.4g} ms{before}"
    if shared:
        best = dataclasses.replace(row.tile, shared=best)
    elif isinstance(best, QueryTile) and isinstance(row.tile, QueryTile):
        best = dataclasses.replace(best, shared=row.tile.shared)
    return replaced(
        rows, row, dataclasses.replace(row, capability=device.compute_capability, tile=best, measured=note)
    ), times


def replaced(rows: Table, row: Row, new: Row) -> Table:
    """The table with `new` for `row`, or beside it if they are for different devices, in order."""
    kept = [x for x in rows if x is not row or row.capability != new.capability]
    return tuple(sorted([*kept, new], key=lambda x: (x.capability, -x.itemsize, x.head_dim, x.group)))


def source(value: Any) -> str:
    """A tile or a row as it is written in `tiles.py`: what is a default is left out."""
    if not dataclasses.is_dataclass(value):
        return f'"{value}"' if isinstance(value, str) else repr(value)
    parts = []
    for field in dataclasses.fields(value):
        part = getattr(value, field.name)
        if field.default is dataclasses.MISSING or (isinstance(value, Row) and part != field.default):
            parts.append(source(part))
        elif part != field.default:
            parts.append(f"{field.name}={source(part)}")
    return f"{type(value).__name__}({', '.join(parts)})"


def render(table: str, rows: Table) -> str:
    """The assignment of a table, as `ruff format` leaves it."""
    lines = [f"{table}: Table = ("]
    for row in rows:
        line = f"    {source(row)},"
        if len(line) > 120:
            *fields, measured = (source(getattr(row, field.name)) for field in dataclasses.fields(row))
            one = " " * 8 + ", ".join([*fields, measured])
            inner = [one] if len(one) <= 120 else [f"{' ' * 8}{part}," for part in (*fields, measured)]
            line = "\n".join(["    Row(", *inner, "    ),"])
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
    parser.add_argument("--tables", nargs="+", default=None, help="only these of the op's tables; default: all")
    parser.add_argument("--length", type=int, default=65536)
    parser.add_argument("--selection", choices=["random", "local"], default="random")
    parser.add_argument("--batch", type=int, default=1, help="rows of a decoding step")
    parser.add_argument("--heads", type=int, default=64, help="query heads")
    parser.add_argument("--kv-heads", type=int, default=4, help="key/value heads")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--v-head-dim", type=int, default=None, help="default: --head-dim")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--dry-run", action="store_true", help="print, and write nothing")
    options = parser.parse_args(arguments)
    unknown = set(options.tables or ()) - set(TABLES[options.op])
    if unknown:
        parser.error(f"--tables {' '.join(sorted(unknown))}: expected some of {' '.join(TABLES[options.op])}")
    if current_device().compute_capability is None:
        parser.error("no NVIDIA GPU of a known compute capability was found; the kernels are timed on one")
    shape = Shape(
        T=options.length,
        H=options.heads,
        K=options.kv_heads,
        Dk=options.head_dim,
        Dv=options.v_head_dim or options.head_dim,
        dtype=options.dtype,
    )
    module = importlib.import_module(f"pallas_kernels.{options.op}.tiles")
    for table in options.tables or TABLES[options.op]:
        print(f"{options.op} {table}", flush=True)
        rows, _ = tune(options.op, table, shape, options.selection, options.batch)
        if rows == getattr(module, table):
            print("kept", flush=True)
            continue
        print(render(table, rows), flush=True)
        if not options.dry_run:
            write(Path(str(module.__file__)), table, rows)
    return 0
