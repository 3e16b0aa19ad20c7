"""The queries that chose each block, as the work items of the Mosaic GPU kernel that gathers them.

A block's list, by position, is cut into items from its end: all items but the first have the same size. The longest are
worked off first, of equal ones those nearest to the ends of the lists. They are dealt out back and forth, so that who
gets the longest of one round gets the shortest of the next, and all have done about the same work in the end.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.mosaic.intervals import Intervals
from pallas_kernels.selected_attention.inverse_index import search, sort_choices

FIELDS = 8  # of an item; those that are not used make a row 32 bytes


class Items(NamedTuple):
    """Where in the selection each block occurs. BK runs over batch x K/V head.

    Attributes:
      queries: the queries that chose each block, sorted by block and then by query, and `spare` more numbers
        [BK, Tq n + spare].
      table: what an item is, the first to be worked off last [BK, items, FIELDS]: its block; its first entry in
        `queries`; how many entries it has, 0 for an item that is not used; inner and outer, where in steps
        inner .. outer - 1 every query sees every key of the block; its place among the items, block by block.
      block_items: the items of block j have places block_items[j] .. block_items[j + 1] - 1 [BK, blocks + 1].
    """

    queries: jax.Array
    table: jax.Array
    block_items: jax.Array


def cut_into_items(
    block_indices: jax.Array,
    keys: Intervals,
    segments: bool,
    block: int,
    num_blocks: int,
    size: int,
    step: int,
    workers: int,
    spare: int,
) -> Items:
    """The items, of at most `size` entries, of queries that see `keys` of the blocks they chose, int32 [B, K, Tq, n].

    A kernel takes `step` entries at a time, and `workers` take the items one by one. Without `segments` every query's
    keys begin with the first.
    """
    B, K, Tq, n = block_indices.shape
    L = Tq * n
    choices, starts = sort_choices(block_indices.reshape(B * K, Tq, n).astype(jnp.int32), num_blocks)
    counts = starts[:, 1:] - starts[:, :-1]
    pieces = -(-counts // size)
    block_items = jnp.pad(jnp.cumsum(pieces, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))

    place = jnp.arange(num_blocks + L // size, dtype=jnp.int32)
    owner = jnp.minimum(search(block_items[:, 1:], place + 1), num_blocks - 1)  # the first block that ends after it

    def of_owner(x: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x, owner, axis=1)

    piece = place[None, :] - of_owner(block_items)
    later = of_owner(pieces) - 1 - piece
    used = later >= 0
    before = jnp.maximum(of_owner(counts) - (later + 1) * size, 0)  # entries of the block
    end = jnp.where(used, of_owner(counts) - later * size, 0)
    length = jnp.where(used, end - before, 0)
    first = of_owner(starts) + before
    # A list begins with the block's own queries, of which there are at most as many as keys, and ends with those of
    # segments that begin within the block.
    whole = of_owner(_before_segments(choices, starts, keys, block, n, K)) if segments else end
    n_steps = -(-length // step)
    inner = jnp.clip(-(-(block - before) // step), 0, n_steps)
    outer = jnp.clip(jnp.minimum(length, whole - before) // step, inner, n_steps)

    fields = (owner, first, length, inner, outer, jnp.broadcast_to(place, owner.shape))
    table = jnp.stack((*fields, *(jnp.zeros_like(owner),) * (FIELDS - len(fields))), axis=-1).astype(jnp.int32)
    keys_of_order = (-length, later, jnp.broadcast_to(place, later.shape))
    *_, order = lax.sort(keys_of_order, dimension=1, num_keys=2, is_stable=True)
    order = order[:, _back_and_forth(len(place), workers)]
    table = jnp.take_along_axis(table, order[:, ::-1, None], axis=1)
    return Items(jnp.pad(choices // n, ((0, 0), (0, spare))), table, block_items)


def _back_and_forth(number: int, workers: int) -> np.ndarray:
    """0 .. number - 1 in rounds of `workers`, of which every second one is turned round."""
    place = np.arange(number)
    round_, turn = np.divmod(place, workers)
    last = np.minimum((round_ + 1) * workers, number) - 1
    return np.where(round_ % 2 == 1, last - turn, place)


def _before_segments(
    choices: jax.Array, starts: jax.Array, keys: Intervals, block: int, num_selected: int, num_kv_heads: int
) -> jax.Array:
    """How many entries of each block's list have keys that begin at the block or before it [BK, blocks]."""
    num_blocks = starts.shape[1] - 1
    first_key = jnp.arange(num_blocks, dtype=jnp.int32) * block
    query = jax.vmap(lambda begin: jnp.searchsorted(begin, first_key, side="right").astype(jnp.int32))(keys.begin)
    value = jnp.repeat(query * num_selected, num_kv_heads, axis=0)
    low, high = starts[:, :-1], starts[:, 1:]
    for _ in range(choices.shape[1].bit_length()):  # unrolled, so that it compiles to one fusion
        middle = (low + high) // 2
        less = jnp.take_along_axis(choices, jnp.minimum(middle, choices.shape[1] - 1), axis=1) < value
        low, high = jnp.where(less & (low < high), middle + 1, low), jnp.where(less, high, middle)
    return low - starts[:, :-1]
