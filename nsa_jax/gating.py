"""The gates of the branches (paper, equation 5)."""

import jax
from flax.typing import PrecisionLike
from jaxtyping import Array, Float

from nsa_jax.compression import add_bias
from nsa_jax.precision import wide_dtype


def open_gates(
    product: Float[Array, "B T F"],
    in_bias: Float[Array, " F"],
    out_kernel: Float[Array, "F H 3"],
    out_bias: Float[Array, "H 3"],
    precision: PrecisionLike = None,
) -> Float[Array, "B T H 3"]:
    """sigmoid(silu(product + in_bias) W + out_bias), in float32 at least.

    The product is that of x and the first layer.
    """
    hidden = jax.nn.silu(add_bias(product, in_bias))
    dimensions = (((hidden.ndim - 1,), (0,)), ((), ()))
    logits = jax.lax.dot_general(hidden, out_kernel, dimensions, precision=precision).astype(hidden.dtype)
    return jax.nn.sigmoid(add_bias(logits, out_bias).astype(wide_dtype(hidden.dtype)))
