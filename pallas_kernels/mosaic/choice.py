"""Which tile a kernel takes: the caller's or its table's, if shared memory has room for it."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from pallas_kernels.mosaic.launch import SHARED_MEMORY, Scratch, shared_memory
from pallas_kernels.tiles import Key, Table, find_tile

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
