"""How many warpgroups, keys and slots of a ring the kernels take, by head size: data, chosen on an H100."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Tile:
    """What the consumers of a program compute together."""

    warpgroups: int  # consumers, of 64 packed rows each
    keys: int  # of a step
    slots: int  # of the ring of keys and values
    buffers: int  # of the queries: with two, the next tile's are copied while this one's are used


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a table: for which head sizes a tile is."""

    key_dim: int  # at most
    value_dim: int  # at most
    tile: Tile


# Registers of each thread of the consumers and of the producer, by the number of consumers: all 65536 of a
# multiprocessor.
REGISTERS = {2: (240, 24), 3: (160, 32)}

FORWARD = (
    Row(128, 128, Tile(3, 64, 4, 2)),
    Row(192, 192, Tile(2, 64, 2, 2)),
    Row(256, 256, Tile(2, 64, 2, 1)),
)


def find_tile(table: tuple[Row, ...], key_dim: int, value_dim: int) -> Tile:
    """The tile of the first row for these head sizes."""
    return next(row.tile for row in table if key_dim <= row.key_dim and value_dim <= row.value_dim)
