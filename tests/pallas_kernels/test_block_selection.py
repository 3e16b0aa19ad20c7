"""Block selection at the ends of sequences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from nsa_jax import NSAConfig, num_compressed, reference
from pallas_kernels.block_selection.triton import select_blocks


def test_newest_compressed_token_of_the_last_query_is_scored():
    """It ends with the last query's own token, because d divides T - l."""
    T, config = 192, NSAConfig(num_selected=2, num_local=0)
    Nc = num_compressed(T, config)
    q = jnp.ones((1, T, 1, 32))
    k = jnp.zeros((1, Nc, 1, 32)).at[:, -1].set(1.0).at[:, 5].set(0.1)
    options = {"config": config, "scale": 1.0}
    _, lse = reference.compressed_attention(q, k, k, None, 0, **options)
    expected = reference.select_blocks(q, k, lse, None, 0, **options)
    np.testing.assert_array_equal(expected[0, 0, -1], [0, 2])  # nothing forces block 2 but the newest token's score
    actual = jax.jit(functools.partial(select_blocks, **options, interpret=True), static_argnums=4)(q, k, lse, None, 0)
    np.testing.assert_array_equal(actual, expected)
