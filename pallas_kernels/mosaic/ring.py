"""What a persistent program works through, and how its warpgroups hand shared memory to each other."""

import dataclasses
import functools
from typing import Any

from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic.products import i32


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Every tile of every pair, shared out among the programs: tiles from the last on, and pairs side by side.

    The last tiles of a causal sequence are the longest and go first, so that the short ones fill the end of the run.
    Pair by pair, the keys that programs read at a time are those of few pairs, which the L2 cache holds.
    """

    tiles: int
    batch: int
    num_kv_heads: int
    programs: int
    pair_by_pair: bool = False

    @property
    def pairs(self) -> int:
        """Of a batch entry and a K/V head."""
        return self.batch * self.num_kv_heads

    def count(self) -> Any:
        """Tiles of this program."""
        left = i32(self.tiles * self.pairs + self.programs - 1) - lax.axis_index("program")
        return lax.div(left, i32(self.programs))

    def item(self, i: Any) -> tuple[Any, Any, Any]:
        """(batch entry, K/V head, tile) of this program's i-th tile."""
        number = lax.axis_index("program") + i * i32(self.programs)
        if self.pair_by_pair:
            pair, turn = lax.div(number, i32(self.tiles)), lax.rem(number, i32(self.tiles))
        else:
            turn, pair = lax.div(number, i32(self.pairs)), lax.rem(number, i32(self.pairs))
        tile = i32(self.tiles - 1) - turn
        return lax.div(pair, i32(self.num_kv_heads)), lax.rem(pair, i32(self.num_kv_heads)), tile

    def pair(self, batch: Any, head: Any) -> Any:
        """The number of a pair."""
        return batch * i32(self.num_kv_heads) + head


@dataclasses.dataclass(frozen=True)
class Ring:
    """Slots of shared memory. What is counted is what has been filled since the program began."""

    full_barriers: Any
    free_barriers: Any
    slots: int
    first: Any = 0  # number of the first slot, where several rings lie one after the other

    def slot(self, count: Any) -> Any:
        """The slot of the count-th filling."""
        return self.first + lax.rem(count, i32(self.slots))

    def wait_free(self, count: Any) -> Any:
        """For the producer: the slot, once every consumer has left it."""
        slot = self.slot(count)
        pl.when(count >= i32(self.slots))(lambda: plgpu.barrier_wait(self.free_barriers.at[slot]))
        return slot

    def fill(self, count: Any, source: Any, shared: Any) -> None:
        """For the producer: copies `source` to the slot once that is free."""
        slot = self.wait_free(count)
        plgpu.copy_gmem_to_smem(source, shared.at[slot], self.full_barriers.at[slot])

    def drain(self, count: Any) -> None:
        """For the producer: waits until all that was filled is free again, as every phase of a barrier must be seen."""
        for slot in range(self.slots):
            last = functools.partial(plgpu.barrier_wait, self.free_barriers.at[self.first + slot])
            pl.when(count > i32(slot))(last)

    def wait_full(self, count: Any) -> Any:
        """For a consumer: the slot, once it is filled."""
        slot = self.slot(count)
        plgpu.barrier_wait(self.full_barriers.at[slot])
        return slot

    def free(self, count: Any) -> None:
        """For a consumer: it has left the slot."""
        plgpu.barrier_arrive(self.free_barriers.at[self.slot(count)])
