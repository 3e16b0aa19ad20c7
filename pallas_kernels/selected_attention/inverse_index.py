"""The selection turned round: for each block the queries that chose it, cut into work items of bounded size."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

_MOST_KEYS = 2**31  # that int32 counts


class InverseIndex(NamedTuple):
    """Where in the selection each block occurs. BK runs over batch x K/V head, L = Tq * n.

    Attributes:
      choices: flat indices t * n + slot of the selection, sorted by block and then by query [BK, L].
      block: the block of each work item [BK, items].
      first: the item's first entry in `choices` [BK, items].
      length: how many entries the item has, 0 for an item that is not used [BK, items].
      rank: how many entries of the same block come before the item [BK, items].
      first_query, last_query: of the item's entries; anything for an item that is not used [BK, items]. A program that
        had to look them up in `choices` would read its keys later.
      block_items: the items of block j are block_items[j] to block_items[j + 1] - 1 [BK, blocks + 1].
    """

    choices: Int[Array, "BK L"]
    block: Int[Array, "BK items"]
    first: Int[Array, "BK items"]
    length: Int[Array, "BK items"]
    rank: Int[Array, "BK items"]
    first_query: Int[Array, "BK items"]
    last_query: Int[Array, "BK items"]
    block_items: Int[Array, "BK blocks1"]


def search(sorted_rows: Int[Array, "BK L"], values: Int[Array, " N"]) -> Int[Array, "BK N"]:
    """The left insertion point of each of `values` in each row, unrolled so that it compiles to one fusion."""
    return jax.vmap(lambda row: jnp.searchsorted(row, values, method="scan_unrolled").astype(jnp.int32))(sorted_rows)


def sort_choices(
    block_indices: Int[Array, "BK Tq n"], num_blocks: int
) -> tuple[Int[Array, "BK L"], Int[Array, "BK blocks1"]]:
    """`choices` (see InverseIndex), and where those of each block begin, with the end of the last block's."""
    rows, Tq, n = block_indices.shape
    L = Tq * n
    block = jnp.where(block_indices < 0, num_blocks, block_indices).reshape(rows, L)
    place = jnp.broadcast_to(jnp.arange(L, dtype=jnp.int32)[None, :], (rows, L))
    boundaries = jnp.arange(num_blocks + 1, dtype=jnp.int32)
    if (num_blocks + 1) * L < _MOST_KEYS:  # One key holds both, and a sort of keys alone is the fastest there is.
        keys = lax.sort(block * L + place, dimension=1, is_stable=False)
        return keys % L, search(keys, boundaries * L)
    blocks, choices = lax.sort((block, place), dimension=1, num_keys=1, is_stable=True)
    return choices, search(blocks, boundaries)


def invert(block_indices: Int[Array, "BK Tq n"], num_blocks: int, item_size: int) -> InverseIndex:
    """Inverts a selection. Work items hold at most `item_size` entries, so that popular blocks are shared out."""
    _, Tq, n = block_indices.shape
    L = Tq * n
    choices, starts = sort_choices(block_indices, num_blocks)
    counts = starts[:, 1:] - starts[:, :-1]
    num_items = -(-counts // item_size)
    block_items = jnp.pad(jnp.cumsum(num_items, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))

    max_items = num_blocks + L // item_size
    item = jnp.arange(max_items, dtype=jnp.int32)
    owner = jnp.minimum(search(block_items[:, 1:], item + 1), num_blocks - 1)  # the first block that ends after it
    rank = (item[None, :] - jnp.take_along_axis(block_items, owner, axis=1)) * item_size
    count = jnp.clip(jnp.take_along_axis(counts, owner, axis=1) - rank, 0, item_size)
    first = jnp.take_along_axis(starts, owner, axis=1) + rank
    ends = (jnp.clip(entry, 0, L - 1) for entry in (first, first + count - 1))
    first_query, last_query = (jnp.take_along_axis(choices, entry, axis=1) // n for entry in ends)
    return InverseIndex(choices, owner, first, count, rank, first_query, last_query, block_items)
