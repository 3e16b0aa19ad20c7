"""Rotary position embedding (Su et al., arXiv 2104.09864)."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def apply_rope(x: Float[Array, "B T H D"], positions: Int[Array, "B T"], theta: float) -> Float[Array, "B T H D"]:
    """Rotates the pairs (x_i, x_{i + D/2}) by positions * theta ** (-2 i / D). Computed in float32 at least.

    Raises:
      ValueError: D is odd.
    """
    D = x.shape[-1]
    if D % 2:
        raise ValueError(f"head_dim = {D}: rotary position embedding needs an even head size")
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    frequency = theta ** (-jnp.arange(0, D, 2, dtype=dtype) / D)
    angle = positions.astype(dtype)[:, :, None, None] * frequency[None, None, None, :]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = jnp.split(x.astype(dtype), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
