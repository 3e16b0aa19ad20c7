"""What the tiles of the Triton kernels say; their tables are in `tiles.py` of each op."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Tile:
    """Packed query rows by keys, of which a program holds one side and walks along the other."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int
    widest: int = 256  # pieces of a head are at most so wide


@dataclasses.dataclass(frozen=True)
class QueryTile:
    """The packed rows of a few adjacent queries, over the union of the blocks that they selected."""

    rows: int
    num_warps: int
    num_stages: int
    shared: "QueryTile | None" = None  # the tile where neighbours mostly select the same blocks; None: this one


@dataclasses.dataclass(frozen=True)
class BlockTile:
    """Up to `queries` queries that selected one block, `rows` packed rows at a time."""

    rows: int
    queries: int
    num_warps: int
    num_stages: int


@dataclasses.dataclass(frozen=True)
class DecodeTile:
    """`keys` keys at a time, by the few rows of one decoding step."""

    keys: int
    num_warps: int
    chunk: int | None = None  # compressed tokens of a program, a multiple of `keys`; None: by the batch


@dataclasses.dataclass(frozen=True)
class AppendTile:
    """The new tokens of a row, of one K/V head."""

    hidden: int  # entries of the gates' hidden layer that are multiplied at a time
    num_warps: int


@dataclasses.dataclass(frozen=True)
class ProductTile:
    """Numbers of the product of a matrix with one row, by a chunk of the row at a time. All are powers of two."""

    outputs: int  # that a program makes
    num_warps: int
    depth: int  # numbers of the row in a chunk
