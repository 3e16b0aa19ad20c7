"""Dense attention as JAX's own function computes it, on CPUs too."""

import jax
import jax.numpy as jnp
import pytest

from nsa_jax.dense import dense_attention
from nsa_jax.testing import normwise_error
from nsa_jax.xla import masked_attention


@pytest.mark.parametrize(("Dk", "Dv"), [(4, 8), (8, 4), (4, 4)])
def test_jax_gets_heads_of_one_size_and_returns_those_of_two(Dk, Dv, monkeypatch):
    """JAX's binding of cuDNN takes no others. On a CPU they would pass unseen."""
    B, T, H, K = 9, 5, 4, 2  # more rows than a head has numbers
    given, attention = [], jax.nn.dot_product_attention

    def recorded(q, k, v, **options):
        given.append((q.shape, k.shape, v.shape))
        return attention(q, k, v, **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", recorded)
    shapes = ((B, T, H, Dk), (B, T, K, Dk), (B, T, K, Dv))
    q, k, v = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes))
    o = jax.jit(lambda q, k, v: dense_attention(q, k, v, is_causal=True))(q, k, v)
    D = max(Dk, Dv)
    assert given == [((B, T, H, D), (B, T, K, D), (B, T, K, D))]
    expected, _ = jax.jit(masked_attention)(q, k, v, jnp.tri(T, dtype=bool)[None, None], Dk**-0.5)
    assert normwise_error(o, expected) < 1e-6
