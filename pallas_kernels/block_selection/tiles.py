"""Tiles of block selection, by kernel; see `pallas_kernels.tiles`.

A row is for: compute capability, bytes of an element, head size up to, query heads per K/V head up to.

Milliseconds are of the whole selection on one H100, H 64, K 4, bfloat16: T 65536 for head size 128, and T 32768 for
192 and 256.
"""

from pallas_kernels.mosaic.tiles import ScoreTile
from pallas_kernels.tiles import Row, Table
from pallas_kernels.triton.tiles import Tile

SCORE: Table = (
    Row((8, 0), 4, 256, 64, Tile(32, 32, 4, 1, widest=64)),
    Row((8, 0), 2, 128, 64, Tile(128, 64, 4, 3), "8.2 ms; 128 x 128, 8 warps, 2 stages 4% more"),
    Row((8, 0), 2, 192, 64, Tile(128, 64, 4, 2), "3.05 ms; 8 warps 5.70"),
    Row((8, 0), 2, 256, 64, Tile(128, 64, 8, 2), "4.43 ms; 4 warps 4.53"),
)

# Of Mosaic's kernel; see `pallas_kernels.mosaic.tiles`.
MOSAIC_SELECTION: Table = (Row((9, 0), 2, 256, 64, ScoreTile(None)),)
