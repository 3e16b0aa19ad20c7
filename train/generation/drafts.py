"""Drafts of the next tokens, which the model verifies in one step (speculative decoding, arXiv 2211.17192)."""

import jax.numpy as jnp
from jaxtyping import Array, Int

LONGEST_MATCH = 3  # tokens


def repeat(history: Int[Array, "B L"], lengths: Int[Array, " B"], count: int) -> Int[Array, "B count"]:
    """The tokens that followed where each row's last tokens stood before, or any tokens if they never did.

    Of all places that end in the row's last token, this takes the one before which most of the last `LONGEST_MATCH`
    tokens agree, and of several the latest.

    Args:
      history: int32 [B, L], the tokens of each row. What is beyond its length may be anything.
      lengths: int32 [B], at least 1.
      count: drafts.
    """
    L = history.shape[1]
    place = jnp.arange(L, dtype=jnp.int32)[None, :]
    agrees, matched = place < lengths[:, None] - 1, jnp.zeros(history.shape, jnp.int32)
    for back in range(LONGEST_MATCH):
        last = jnp.take_along_axis(history, jnp.maximum(lengths - 1 - back, 0)[:, None], axis=1)
        shifted = jnp.pad(history, ((0, 0), (back, 0)))[:, :L]
        agrees &= (shifted == last) & (place >= back) & (lengths[:, None] > back)
        matched += agrees
    best = jnp.argmax(matched * L + place * (matched > 0), axis=1).astype(jnp.int32)
    following = best[:, None] + 1 + jnp.arange(count, dtype=jnp.int32)[None, :]
    return jnp.take_along_axis(history, jnp.minimum(following, L - 1), axis=1)
