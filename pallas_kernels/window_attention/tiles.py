"""Tiles of window attention, by kernel; see `pallas_kernels.tiles`.

A row is for: compute capability, bytes of an element, head size up to, query heads per K/V head up to.

Milliseconds are of one H100, G 16, head size 128, bfloat16, T 65536.
"""

from pallas_kernels.mosaic.tiles import IntervalTile, PartialTile, RingTile
from pallas_kernels.tiles import Row, Table
from pallas_kernels.triton.tiles import Tile

FORWARD: Table = (
    Row((8, 0), 4, 256, 64, Tile(64, 32, 4, 1)),
    Row((8, 0), 2, 128, 64, Tile(128, 64, 4, 2), "3.39 ms; 8 warps 4.8"),
    Row((8, 0), 2, 192, 64, Tile(128, 64, 8, 2)),
    Row((8, 0), 2, 256, 64, Tile(128, 64, 8, 1)),
)

QUERY_GRADIENT: Table = (
    Row((8, 0), 4, 256, 64, Tile(32, 32, 4, 1)),
    Row((8, 0), 2, 128, 64, Tile(64, 64, 4, 2), "5.1 ms; 128 rows, 8 warps 5.7"),
    Row((8, 0), 2, 192, 64, Tile(128, 64, 8, 2)),
    Row((8, 0), 2, 256, 64, Tile(64, 64, 8, 1)),
)

# A program holds the keys and walks along the rows.
KEY_GRADIENT: Table = (
    Row((8, 0), 4, 256, 64, Tile(32, 32, 4, 1)),
    Row((8, 0), 2, 128, 64, Tile(64, 64, 4, 2), "6.8 ms; 8 warps 11.9"),
    Row((8, 0), 2, 192, 64, Tile(64, 64, 8, 2)),
    Row((8, 0), 2, 256, 64, Tile(64, 64, 8, 1)),
)

# Of Mosaic's kernels; see `pallas_kernels.mosaic.tiles`. They were chosen on an H100.
MOSAIC_FORWARD: Table = (
    Row((9, 0), 2, 128, 64, IntervalTile(3, 64, 4, 2)),
    Row((9, 0), 2, 192, 64, IntervalTile(2, 64, 2, 2)),
    Row((9, 0), 2, 256, 64, IntervalTile(2, 64, 2, 1)),
)

MOSAIC_QUERY_GRADIENT: Table = (Row((9, 0), 2, 256, 64, RingTile(4)),)

# A program holds the keys and walks along the rows.
MOSAIC_KEY_GRADIENT: Table = (
    Row((9, 0), 2, 256, 64, PartialTile(4, None), together=192),
    Row((9, 0), 2, 256, 64, PartialTile(2, None)),
)
