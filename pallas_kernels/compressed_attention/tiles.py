"""Tiles of compressed attention, by kernel; see `pallas_kernels.tiles`.

A row is for: compute capability, bytes of an element, head size up to, query heads per K/V head up to.

Milliseconds are of one H100, H 64, K 4, bfloat16: T 65536 for head size 128, and T 32768 for 64, 192 with values of
128, and 256. Float32 products run without tensor cores, on short rows from registers, and are given small tiles. GPUs
with less shared memory than Hopper take shallower pipelines, which are not measured.
"""

from pallas_kernels.mosaic.tiles import IntervalTile, PartialTile, RingTile
from pallas_kernels.tiles import Row, Table
from pallas_kernels.triton.tiles import Tile

FORWARD: Table = (
    Row((8, 0), 4, 256, 64, Tile(32, 32, 4, 1, widest=64)),
    Row((8, 0), 2, 64, 64, Tile(128, 64, 8, 3)),
    Row((8, 0), 2, 128, 64, Tile(128, 64, 8, 2)),
    Row((8, 0), 2, 256, 64, Tile(128, 32, 8, 2)),
    Row((9, 0), 2, 64, 64, Tile(128, 64, 8, 3), "1.52 ms; 4 warps, 2 stages 1.71"),
    Row((9, 0), 2, 128, 64, Tile(128, 64, 8, 3), "4 warps, 2 stages as fast with K 4, 1.3 times as long with K 1"),
    Row((9, 0), 2, 192, 64, Tile(128, 32, 8, 2), "3.89 ms; 64 keys 4.27"),
    Row((9, 0), 2, 256, 64, Tile(128, 64, 8, 2), "5.34 ms; 32 keys 6.68"),
)

QUERY_GRADIENT: Table = (
    Row((8, 0), 4, 256, 64, Tile(32, 32, 4, 1, widest=64)),
    Row((8, 0), 2, 128, 64, Tile(64, 64, 4, 2)),
    Row((8, 0), 2, 256, 64, Tile(64, 32, 4, 2)),
    Row((9, 0), 2, 128, 64, Tile(64, 64, 4, 2), "13.6 ms, T 8192 0.38; 128 x 64, 8 warps, 3 stages 12.9, 0.47"),
    Row((9, 0), 2, 192, 64, Tile(128, 64, 8, 2), "6.22 ms; 32 keys, 3 stages 7.10"),
    Row((9, 0), 2, 256, 64, Tile(128, 32, 8, 3), "7.62 ms; 64 x 64, 4 warps 8.54"),
)

# A program holds the keys and walks along the rows.
KEY_GRADIENT: Table = (
    Row((8, 0), 4, 128, 64, Tile(32, 32, 4, 1, widest=64)),
    Row((8, 0), 4, 192, 64, Tile(32, 32, 4, 2, widest=64), "1 stage: wrong dv on an H100 (JAX 0.11.2)"),
    Row((8, 0), 4, 256, 64, Tile(32, 32, 4, 1, widest=64)),
    Row((8, 0), 2, 128, 64, Tile(64, 128, 8, 2)),
    Row((8, 0), 2, 192, 64, Tile(32, 64, 4, 2)),
    Row((8, 0), 2, 256, 64, Tile(32, 64, 8, 2)),
    Row((9, 0), 2, 128, 64, Tile(64, 128, 8, 3), "16.7 ms; 2 stages 19.8; 64 x 64, 4 warps, 2 stages 22.1"),
    Row((9, 0), 2, 192, 64, Tile(32, 64, 4, 3), "5.75 ms; 2 stages 6.14"),
    Row((9, 0), 2, 256, 64, Tile(64, 64, 8, 2), "18.7 ms; 32 rows 29.7"),
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
    Row((9, 0), 2, 256, 64, PartialTile(4, 512), together=192),
    Row((9, 0), 2, 256, 64, PartialTile(2, 512)),
)
