"""What the tiles of the Mosaic GPU kernels say; their tables are in `tiles.py` of each op, and begin with MOSAIC.

Where a tile does not say how many, a program has two consumers, and 64 keys are a step.
"""

import dataclasses
from typing import Any

# Registers of each thread of the consumers and of the producer, by the number of consumers: all 65536 of a
# multiprocessor.
REGISTERS = {2: (240, 24), 3: (160, 32)}


@dataclasses.dataclass(frozen=True)
class IntervalTile:
    """Queries over the interval of keys that they see, which pass by in a ring."""

    warpgroups: int  # consumers, of 64 packed rows each
    keys: int  # of a step
    slots: int  # of the ring of keys and values
    buffers: int  # of the queries: with two, the next tile's are copied while this one's are used

    def __post_init__(self) -> None:
        """Refuses sizes that the kernel is not made for."""
        _check(self, "warpgroups", self.warpgroups in REGISTERS, "2 or 3")
        _check(self, "keys", self.keys in (64, 128), "64 or 128")
        _check(self, "slots", self.slots >= 1, "at least 1")
        _check(self, "buffers", self.buffers in (1, 2), "1 or 2")


@dataclasses.dataclass(frozen=True)
class UnionTile:
    """Queries over the union of the blocks that they selected, which pass by in a ring, two at a time."""

    slots: int  # of the ring of keys and values
    buffers: int  # of the queries: with two, the next tile's are copied while this one's are used

    def __post_init__(self) -> None:
        """Refuses sizes that the kernel is not made for."""
        _check(self, "slots", self.slots >= 1, "at least 1")
        _check(self, "buffers", self.buffers in (1, 2), "1 or 2")


@dataclasses.dataclass(frozen=True)
class RingTile:
    """Queries, while their keys pass by in a ring."""

    slots: int  # of the ring

    def __post_init__(self) -> None:
        """Refuses sizes that the kernel is not made for."""
        _check(self, "slots", self.slots >= 1, "at least 1")


@dataclasses.dataclass(frozen=True)
class PartialTile:
    """Keys and values, while queries pass by in a ring, whose gradients are partial sums."""

    slots: int  # of the ring of queries and their gradients
    queries: int | None  # of a partial sum; None: there is one sum, of all queries

    def __post_init__(self) -> None:
        """Refuses sizes that the kernel is not made for."""
        _check(self, "slots", self.slots >= 1, "at least 1")
        _check(self, "queries", self.queries is None or self.queries >= 1, "at least 1, or None")


@dataclasses.dataclass(frozen=True)
class ScoreTile:
    """Queries by the keys of 64 blocks at a time, which pass by in a ring."""

    slots: int | None  # of the ring; None: as many as the scores leave shared memory for, and at most 5

    def __post_init__(self) -> None:
        """Refuses sizes that the kernel is not made for."""
        _check(self, "slots", self.slots is None or self.slots >= 2, "at least 2, or None")


def _check(tile: Any, name: str, holds: bool, expected: str) -> None:
    if not holds:
        raise ValueError(f"{type(tile).__name__}.{name} = {getattr(tile, name)}: expected {expected}")
