"""Keys and values in 8 bits: each head of a token is int8 numbers times a factor of its own.

With m the largest magnitude of a head x, the factor is m / 127, and a number is x over the factor, rounded to the
nearest integer. What is read, number times factor, is then within half a factor of x. A head that holds NaN or infinity
gets a factor that is not finite, so that all that is read of it is not finite either.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

MOST = 127  # the largest number; -128 is not used


class Quantized(NamedTuple):
    """An array [..., D] in 8 bits. It has the shape and the dtype of its numbers."""

    values: Int8[Array, "*N D"]
    scale: Float[Array, "*N 1"]  # the factors, in float32 at least

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the array."""
        return self.values.shape

    @property
    def dtype(self) -> jnp.dtype:
        """Int8."""
        return self.values.dtype


def head_bytes(head_dim: int) -> int:
    """Bytes of a head in 8 bits, with its factor."""
    return head_dim + 4


def scale_of(largest: Any) -> Any:
    """The factors of heads with these largest magnitudes."""
    return largest / MOST


def rounded(x: Any, scale: Any) -> Any:
    """The int8 numbers that stand for x."""
    usable = (scale > 0) & (scale < jnp.inf)
    # Half of a factor is added and cut off, as Triton has no operation that rounds.
    return jnp.floor(jnp.where(usable, x / jnp.where(usable, scale, 1), 0) + 0.5).astype(jnp.int8)
