"""NaN and infinity, kept from every query that does not see them.

A mask gives an unseen key the weight 0, but 0 times NaN is NaN, in products forward and backward. So `reference` and
`xla` multiply finite parts alone. Before the mask, a key that is not finite, in itself or in its value, gets a score of
NaN instead: the output of a query that sees it is NaN. Such a query sends no gradient.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def finite_part(x: Float[Array, "*N"]) -> Float[Array, "*N"]:
    """`x` with zeros in place of NaN and infinity. The gradient of these places is zero."""
    return jnp.where(jnp.isfinite(x), x, 0)


def is_finite(x: Float[Array, "*N D"]) -> Bool[Array, "*N"]:
    """Whether all numbers along the last axis are finite."""
    return jnp.isfinite(x).all(axis=-1)
