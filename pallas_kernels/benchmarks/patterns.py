"""Block selections to time with: uniform picks per query, and picks that neighbours mostly share."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray

Pattern = Literal["random", "local"]
RUN = 64  # queries over which a local selection stays
RESAMPLED = 0.1  # of a local selection's picks, anew for each query
ROWS = 4096  # queries drawn at a time


@functools.partial(jax.jit, static_argnames=("pattern", "K", "T", "select_block", "num_selected"))
def block_indices(
    key: PRNGKeyArray, *, pattern: Pattern, K: int, T: int, select_block: int, num_selected: int
) -> Int[Array, "1 K T n"]:
    """A causal selection, ascending, -1 at the end, with the first and the last two blocks always in it.

    "random": the other picks are uniform and distinct for each query. "local": they are constant over runs of 64
    queries, except for 10% that are drawn anew for each query.
    """
    blocks = -(-T // select_block)
    rows = min(ROWS, -(-T // RUN) * RUN)
    steps = -(-T // rows)

    def draw(step: Array) -> Array:
        run_key, query_key, which_key = jax.random.split(jax.random.fold_in(key, step), 3)
        score = jax.random.uniform(query_key, (K, rows, blocks))
        if pattern == "local":
            kept = jnp.repeat(jax.random.uniform(run_key, (K, rows // RUN, blocks)), RUN, axis=1)
            score = jnp.where(jax.random.uniform(which_key, score.shape) < RESAMPLED, score, kept)
        own = ((step * rows + jnp.arange(rows)) // select_block)[None, :, None]
        block = jnp.arange(blocks)[None, None, :]
        score = jnp.where((block == 0) | (block > own - 2), 2.0, score)
        score = jnp.where(block <= own, score, -1.0)
        score = jnp.pad(score, ((0, 0), (0, 0), (0, max(0, num_selected - blocks))), constant_values=-1.0)
        best, index = jax.lax.top_k(score, num_selected)
        index = jnp.sort(jnp.where(best >= 0, index, blocks), axis=-1)
        return jnp.where(index == blocks, -1, index).astype(jnp.int32)

    drawn = jax.lax.map(draw, jnp.arange(steps))
    return jnp.moveaxis(drawn, 0, 1).reshape(1, K, steps * rows, num_selected)[:, :, :T]
