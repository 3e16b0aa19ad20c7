"""Tiles of decoding, by kernel; see `pallas_kernels.tiles`.

A row is for: compute capability, bytes of an element, head size up to, query heads per K/V head up to.

Not measured one by one: see `pallas_kernels/benchmarks/results/decode_attention_h100.json` for the whole.
"""

from pallas_kernels.tiles import Row, Table
from pallas_kernels.triton.tiles import DecodeTile

STEP: Table = (
    Row((8, 0), 4, 128, 64, DecodeTile(32, 4)),
    Row((8, 0), 4, 256, 64, DecodeTile(16, 4)),
    Row((8, 0), 2, 128, 64, DecodeTile(128, 4)),
    Row((8, 0), 2, 256, 64, DecodeTile(64, 4)),
)

# Compressed tokens of a program, for up to so many pairs of a row and a K/V head: few pairs need more programs.
CHUNKS = ((16, 128), (128, 256), (65535, 512))
