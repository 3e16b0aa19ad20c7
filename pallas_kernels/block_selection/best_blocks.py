"""The kernels' way to sort out the n best of many blocks, without a sort."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.triton.integers import div, loop, next_power_of_two
from pallas_kernels.triton.problem import Problem

_BEYOND = 1 << 30  # a number past every block


def best_blocks(
    importance: Float[Array, "blocks queries"],
    first: Int[Array, " queries"],
    position: Int[Array, " queries"],
    num_blocks: int,
    problem: Problem,
) -> Int[Array, "slots queries"]:
    """The chosen blocks (see the contract): ascending, then -1, in the next power of two of n slots.

    `first` is the first block of a query's segment. All sides are powers of two, and blocks from `num_blocks` on are
    none.
    """
    n = problem.num_selected
    block = lax.broadcasted_iota(jnp.int32, importance.shape, 0)
    last = jnp.minimum(div(position, problem.select_block), num_blocks - 1)
    candidate = (block >= first[None, :]) & (block <= last[None, :])
    forced = (block < first[None, :] + problem.num_init) | (block > last[None, :] - problem.num_local)
    candidates = last - first + 1
    if not problem.select_in_window:
        candidate &= forced | (block * problem.select_block <= position[None, :] - problem.window)
        candidates = jnp.sum(candidate.astype(jnp.int32), axis=0, dtype=jnp.int32)
    importance = jnp.where(candidate, jnp.where(forced, jnp.inf, importance), -jnp.inf)
    queries = importance.shape[1]
    # A slot past the last candidate holds a number beyond every block, to be sorted to the end.
    slots = (next_power_of_two(n), queries)
    slot = lax.broadcasted_iota(jnp.int32, slots, 0)

    def take(i: Any, carry: Any) -> Any:
        importance, chosen = carry
        best = lax.argmax(importance, 0, jnp.int32)
        available = i < candidates
        chosen = jnp.where((slot == i) & available[None, :], best[None, :], chosen)
        return jnp.where(block == best[None, :], -jnp.inf, importance), chosen

    _, chosen = loop(0, n, take, (importance, _BEYOND + slot))
    rank = jnp.sum((chosen[:, None, :] < chosen[None, :, :]).astype(jnp.int32), axis=0, dtype=jnp.int32)
    placed = rank[:, None, :] == lax.broadcasted_iota(jnp.int32, (slots[0], slots[0], queries), 1)
    ascending = jnp.sum(jnp.where(placed, chosen[:, None, :], 0), axis=0, dtype=jnp.int32)
    return jnp.where(ascending >= _BEYOND, -1, ascending)
