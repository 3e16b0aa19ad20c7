"""NaN and infinity, kept from every query that does not see them.

A mask gives an unseen key the weight 0, but 0 times NaN is NaN, in products forward and backward. So `reference` and
`xla` multiply with `finite_part` alone. A key that `is_finite` does not hold for, in itself or in its value, gets a score
of NaN instead, before the mask: a query that sees it has an output of NaN. Such a query sends no gradient.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def finite_part(x: Float[Array, "*N"]) -> Float[Array, "*N"]:
    """`x` with zeros in place of NaN and infinity. The gradient of these places is zero."""
    return jnp.where(jnp.isfinite(x), x, 0)


def is_finite(x: Float[Array, "*N D"]) -> Bool[Array, "*N"]:
    """Whether all numbers along the last axis are finite."""
    return jnp.isfinite(x).all(axis=-1)
