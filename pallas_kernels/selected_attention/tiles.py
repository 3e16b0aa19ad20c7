"""Tiles of selected attention, by kernel; see `pallas_kernels.tiles`.

A row is for: compute capability, bytes of an element, head size up to, query heads per K/V head up to.

Milliseconds are of one H100, head size 128, bfloat16, T 65536.
"""

from pallas_kernels.mosaic.tiles import PartialTile, RingTile, UnionTile
from pallas_kernels.tiles import Row, Table
from pallas_kernels.triton.tiles import BlockTile, QueryTile

# Query-major, or block-major for small groups.
FORWARD: Table = (
    Row((8, 0), 4, 256, 64, QueryTile(16, 4, 1)),
    Row((8, 0), 2, 128, 4, BlockTile(128, 512, 4, 2), "G 1, 2, 4: 2.1, 3.3, 5.9 ms; query-major 14.7 at best"),
    Row((8, 0), 2, 128, 8, QueryTile(16, 2, 2)),
    Row((8, 0), 2, 128, 16, QueryTile(32, 2, 2, shared=QueryTile(64, 4, 3)), "G 16: 17.2 ms, random; 9.6, local"),
    Row((8, 0), 2, 256, 64, QueryTile(16, 4, 2)),
)

QUERY_GRADIENT: Table = (
    Row((8, 0), 4, 256, 64, QueryTile(16, 4, 1)),
    Row((8, 0), 2, 128, 8, QueryTile(16, 4, 2)),
    Row((8, 0), 2, 128, 16, QueryTile(16, 4, 2, shared=QueryTile(64, 4, 2)), "G 16: 18.9 ms, random; 10.7, local"),
    Row((8, 0), 2, 256, 64, QueryTile(16, 4, 2)),
)

KEY_GRADIENT: Table = (
    Row((8, 0), 4, 256, 64, BlockTile(16, 512, 4, 1)),
    Row((8, 0), 2, 128, 64, BlockTile(64, 1024, 4, 2), "G 16: 12.6 ms; 512 queries 13.2; 8 warps 23.4; 128 rows 20.7"),
    Row((8, 0), 2, 256, 64, BlockTile(64, 1024, 8, 2)),
)

# Of Mosaic's kernels; see `pallas_kernels.mosaic.tiles`. They were chosen on an H100.
MOSAIC_FORWARD: Table = (
    Row((9, 0), 2, 128, 64, UnionTile(2, 2)),
    Row((9, 0), 2, 192, 64, UnionTile(2, 1), together=256),
    Row((9, 0), 2, 256, 64, UnionTile(1, 1)),
)

MOSAIC_QUERY_GRADIENT: Table = (
    Row((9, 0), 2, 256, 64, RingTile(4), together=256),
    Row((9, 0), 2, 256, 64, RingTile(3), together=320),
    Row((9, 0), 2, 256, 64, RingTile(2), together=384),
    Row((9, 0), 2, 256, 64, RingTile(1)),
)

# Above 256 for keys and values together, two consumers share a ring.
MOSAIC_KEY_GRADIENT: Table = (
    Row((9, 0), 2, 256, 64, PartialTile(4, 512), together=128),
    Row((9, 0), 2, 256, 64, PartialTile(3, 512), together=192),
    Row((9, 0), 2, 256, 64, PartialTile(2, 512), together=256),
    Row((9, 0), 2, 256, 64, PartialTile(4, 512), together=320),
    Row((9, 0), 2, 256, 64, PartialTile(3, 512), together=384),
    Row((9, 0), 2, 256, 64, PartialTile(2, 512)),
)
