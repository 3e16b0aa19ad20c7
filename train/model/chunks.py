"""Tokens in chunks, for what holds a number for every token and every entry of the vocabulary."""

import jax.numpy as jnp
from jaxtyping import Array

from nsa_jax.sharding import devices_along, reshape
from train.parallel.sharding import RULES, logical

# Such numbers that exist at a time on a device.
CHUNK_ELEMENTS = 1 << 26


def in_chunks(arrays: tuple[Array, ...], vocab_rows: int, *, chunk_elements: int = CHUNK_ELEMENTS) -> tuple[Array, ...]:
    """Arrays [B, T, ...] as [chunks, D, rows, C, chunk, ...], to be scanned over.

    D devices split the rows and C the tokens. Each of them cuts up its own `rows` by T / C tokens, so that nothing is
    sent. Where they are no whole number of chunks, zeros follow.

    Args:
      arrays: of the same B and T, which D and C divide.
      vocab_rows: the size of the vocabulary on all devices together.
      chunk_elements: the most numbers of a chunk on a device, with one for each of its tokens and each entry of the
        device's part of the vocabulary. A chunk is one token of each row at least.
    """
    B, T = arrays[0].shape[:2]
    rules = dict(RULES)
    D, C, vocab = (devices_along(rules[name]) for name in ("batch", "sequence", "vocab"))
    rows, tokens = B // D, T // C  # of a device
    chunk = min(tokens, max(1, chunk_elements * vocab // (max(rows, 1) * vocab_rows)))
    chunks = -(-tokens // chunk)

    def cut(x: Array) -> Array:
        rest = x.shape[2:]
        x = reshape(x, (D, rows, C, tokens, *rest), logical("batch", None, "sequence", None, *[None] * len(rest)))
        x = jnp.pad(x, ((0, 0),) * 3 + ((0, chunks * chunk - tokens),) + ((0, 0),) * len(rest))
        return jnp.moveaxis(x.reshape(D, rows, C, chunks, chunk, *rest), 3, 0)

    return tuple(map(cut, arrays))
