"""The kernels' way to sort out the n best of many blocks, without a sort."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.triton.integers import loop, next_power_of_two

_BEYOND = 1 << 30  # a number past every block


def rank_by_importance(importance: Any, candidate: Any, forced: Any) -> jax.Array:
    """Importance with forced candidates above every other block, and what is no candidate below."""
    return jnp.where(candidate, jnp.where(forced, jnp.inf, importance), -jnp.inf)


def best_blocks(
    importance: Float[Array, "blocks queries"], candidates: Int[Array, " queries"], n: int
) -> Int[Array, "slots queries"]:
    """Blocks of highest importance, ties to the lower: ascending, then -1, in the next power of two of n slots.

    `candidates` says of how many blocks the importance is above -inf. All sides are powers of two.
    """
    queries = importance.shape[1]
    block = lax.broadcasted_iota(jnp.int32, importance.shape, 0)
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
