"""Tiles of the product of one row; see `pallas_kernels.tiles`.

A row is for: compute capability, bytes of an element, numbers of x up to. Longer ones are more than the registers of a
warp hold.

Times are of bfloat16 on an H100, for 2560 x 1024, 1024 x 2048, 6144 x 1024 (gated) and 1024 x 3072; see
docs/experiments.md.
"""

from pallas_kernels.tiles import MatrixRow, Table
from pallas_kernels.triton.tiles import ProductTile

PRODUCT: Table = (
    MatrixRow((8, 0), 4, 4096, ProductTile(1, 1, 1024)),
    MatrixRow((8, 0), 4, None, ProductTile(2, 4, 1024)),
    MatrixRow((8, 0), 2, 4096, ProductTile(1, 1, 1024), "3.9, 3.2, 6.2, 4.3 us"),
    MatrixRow((8, 0), 2, None, ProductTile(2, 4, 1024), "3.7, 3.3, 6.9, 4.0 us"),
)
