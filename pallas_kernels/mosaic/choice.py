"""Which tile a kernel takes: the caller's or its table's, if shared memory has room for it."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax

from pallas_kernels.mosaic.launch import SHARED_MEMORY, Scratch, shared_memory
from pallas_kernels.mosaic.packing import Packing
from pallas_kernels.tiles import Key, Table, find_tile, key_of

Tile = TypeVar("Tile")


def choose_tile(
    name: str, tile: Tile | None, table: Table, key: Key, scratch_of: Callable[[Tile], Sequence[Scratch]]
) -> Tile:
    """The argument `tile` of this name, or the table's tile where it is None. `scratch_of` says what a tile takes.

    Raises:
      ValueError: the argument is another kernel's tile, or needs more shared memory than there is.
      NotImplementedError: the table's tile does.
    """
    default: Tile = find_tile(table, key)
    chosen = default if tile is None else tile
    if not isinstance(chosen, type(default)):
        raise ValueError(f"{name} = {chosen}: expected {type(default).__name__}")
    used = shared_memory(scratch_of(chosen))
    if used > SHARED_MEMORY:
        refusal: Any = NotImplementedError if tile is None else ValueError
        raise refusal(f"{name} = {chosen}: {used} bytes of shared memory; expected at most {SHARED_MEMORY}")
    return chosen


def choose_gradient_tile(
    name: str,
    tile: Tile | None,
    table: Table,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    gated: bool,
    scratch: Callable[[Tile, Packing, Any, int, int, int], Sequence[Scratch]],
) -> Tile:
    """`choose_tile` of a backward pass, for arrays as the contracts have them.

    `scratch` takes the tile, how rows are packed, the dtype, the head sizes, and what is known of each row: lse, delta
    and, if the pass is gated, the gate.
    """
    packing = Packing(q.shape[2] // k.shape[2])

    def scratch_of(tile: Tile) -> Sequence[Scratch]:
        return scratch(tile, packing, q.dtype, q.shape[3], v.shape[3], 2 + gated)

    return choose_tile(name, tile, table, key_of(q, k, v), scratch_of)
