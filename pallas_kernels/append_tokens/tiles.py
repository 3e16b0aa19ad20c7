"""Tiles of new tokens; see `pallas_kernels.tiles`.

A row is for: compute capability, bytes of an element, head size up to, query heads per K/V head up to.

Not measured one by one.
"""

from pallas_kernels.tiles import Row, Table
from pallas_kernels.triton.tiles import AppendTile

APPEND: Table = (
    Row((8, 0), 4, 256, 64, AppendTile(128, 4)),
    Row((8, 0), 2, 256, 64, AppendTile(128, 4)),
)
