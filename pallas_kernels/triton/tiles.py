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
