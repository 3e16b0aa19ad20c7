"""The dtypes in which statistics and sums are computed."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import DTypeLike


def wide_dtype(dtype: DTypeLike) -> jnp.dtype:
    """Float32, or float64 for float64."""
    return jnp.dtype(jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32)


def widened(tree: Any) -> Any:
    """A tree of arrays in float32, or in float64 where they are."""
    return jax.tree.map(lambda x: x.astype(wide_dtype(x.dtype)), tree)
