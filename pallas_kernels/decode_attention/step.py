"""The static facts of one decoding step, and how its work is cut."""

import dataclasses
from typing import Any

from jax.experimental import pallas as pl

from pallas_kernels.compressed_attention.visibility import visible_end
from pallas_kernels.triton.heads import SMALLEST_SIDE
from pallas_kernels.triton.integers import next_power_of_two
from pallas_kernels.triton.problem import Problem
from pallas_kernels.triton.tiles import DecodeTile


@dataclasses.dataclass(frozen=True)
class Step:
    """Static facts of one call."""

    batch: int
    num_queries: int  # m
    num_heads: int  # H
    num_kv_heads: int  # K
    num_blocks: int  # N, of the longest row
    ring: int  # W
    problem: Problem
    tile: DecodeTile
    chunk: int  # compressed tokens of a program

    @property
    def group(self) -> int:
        """Query heads of a K/V head."""
        return self.num_heads // self.num_kv_heads

    @property
    def padded_group(self) -> int:
        """Rows that a query takes in a tile of several queries."""
        return next_power_of_two(self.group)

    @property
    def tile_queries(self) -> int:
        """Queries that a tile of the first kernel holds."""
        most = max(1, 64 // self.padded_group)
        return max(pl.cdiv(SMALLEST_SIDE, self.padded_group), min(next_power_of_two(self.num_queries), most))

    @property
    def per_block(self) -> int:
        """Compressed tokens that start in a block."""
        return self.problem.select_block // self.problem.compress_stride

    @property
    def compressed_splits(self) -> int:
        """Programs along the compressed tokens."""
        return pl.cdiv(self.num_blocks * self.per_block, self.chunk)

    @property
    def window_splits(self) -> int:
        """Programs along the window."""
        return pl.cdiv(self.problem.window + self.tile_queries - 1, self.tile.keys)

    @property
    def selected_splits(self) -> int:
        """Programs along the selected blocks."""
        return pl.cdiv(self.problem.num_selected * next_power_of_two(self.problem.select_block), self.tile.keys)

    def visible(self, position: Any) -> Any:
        """Compressed tokens that a query at `position` sees."""
        return visible_end(position, self.problem, self.num_blocks * self.per_block)
