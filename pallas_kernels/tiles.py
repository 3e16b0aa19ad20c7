"""Tables of tiles, and the rule that finds a kernel's tile in its table.

Tables are data: `tiles.py` of each op, which `python -m pallas_kernels.benchmarks tune` measures and writes. What a
tile says is in `triton/tiles.py` and `mosaic/tiles.py`.
"""

import dataclasses
import sys
from typing import Any

import jax

from pallas_kernels.devices import Capability, current_device, shared_memory_kib


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a table: for which calls a tile is, and what was measured when it was chosen."""

    capability: Capability  # of the device that it was chosen for
    itemsize: int  # bytes of an element
    head_dim: int  # the larger head size is at most this
    group: int  # query heads per K/V head are at most this
    tile: Any
    measured: str = ""
    together: int = 512  # the head sizes of keys and values are together at most this

    @property
    def order(self) -> tuple[int, ...]:
        """By which rows of one capability and dtype ascend."""
        return self.head_dim, self.together, self.group


@dataclasses.dataclass(frozen=True)
class MatrixRow:
    """One row of a table of products with a matrix."""

    capability: Capability  # of the device that it was chosen for
    itemsize: int  # bytes of an element
    longest: int | None  # the numbers of a row of the matrix are at most so many; None: any number
    tile: Any
    measured: str = ""

    @property
    def order(self) -> tuple[int, ...]:
        """By which rows of one capability and dtype ascend."""
        return (sys.maxsize if self.longest is None else self.longest,)


Table = tuple[Any, ...]  # of rows of one kind


@dataclasses.dataclass(frozen=True)
class Key:
    """What a tile is looked up by."""

    itemsize: int
    head_dim: int  # the larger one
    group: int
    together: int  # the head sizes of keys and values; of keys alone where there are no values

    def matches(self, row: Row) -> bool:
        """Whether the row is for such calls."""
        sizes = (self.head_dim, row.head_dim), (self.group, row.group), (self.together, row.together)
        return self.itemsize == row.itemsize and all(size <= most for size, most in sizes)


@dataclasses.dataclass(frozen=True)
class MatrixKey:
    """What the tile of a product with a matrix is looked up by."""

    itemsize: int
    length: int  # of a row of the matrix

    def matches(self, row: MatrixRow) -> bool:
        """Whether the row is for such calls."""
        return self.itemsize == row.itemsize and (self.length,) <= row.order


def key_of(q: jax.Array, k: jax.Array, v: jax.Array | None = None) -> Key:
    """The key of a call: q [..., H, Dk], k [..., K, Dk], v [..., K, Dv]."""
    head_dims = [x.shape[-1] for x in (k, v) if x is not None]
    return Key(q.dtype.itemsize, max(head_dims), q.shape[-2] // k.shape[-2], sum(head_dims))


def find_row(table: Table, key: Key | MatrixKey) -> Any:
    """The row of a table for calls with this key on the device that is traced for.

    Of the rows that match the key, those count that were chosen for the highest compute capability which is at most the
    device's and has no more shared memory than the device; where there is none, those for the least shared memory. The
    first of them is the row: tables begin with what the fewest calls match. Where kernels are interpreted, rows for the
    highest capability are taken.

    Raises:
      LookupError: no row of the table matches the key.
    """
    rows = [row for row in table if key.matches(row)]
    if not rows:
        raise LookupError(f"no tile for {key}")
    device = current_device()
    if device.platform != "gpu":
        chosen = max(row.capability for row in rows)
    else:
        known = device.compute_capability or (0, 0)
        memory = shared_memory_kib(known)
        fitting = [row.capability for row in rows if row.capability <= known and _memory(row) <= memory]
        chosen = max(fitting) if fitting else min(rows, key=lambda row: (_memory(row), row.capability)).capability
    return next(row for row in rows if row.capability == chosen)


def _memory(row: Row | MatrixRow) -> int:
    return shared_memory_kib(row.capability)


def find_tile(table: Table, key: Key | MatrixKey) -> Any:
    """The tile of `find_row`."""
    return find_row(table, key).tile
