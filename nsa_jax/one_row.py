"""Products with joined parameters, which a decoding step is made of: on a GPU, of one row by a kernel of their own.

XLA makes a product of one row a reduction of elementwise products, in several kernels. Of several rows it makes a
product of matrices, which needs no kernel of ours.
"""

import contextlib
import math

import jax
import jax.numpy as jnp
from flax.typing import PrecisionLike
from jax.export import is_symbolic_dim
from jaxtyping import Array, Bool, Float

from nsa_jax.explicit import in_explicit_mesh
from nsa_jax.precision import wide_dtype
from pallas_kernels.devices import current_device
from pallas_kernels.kernels import TRITON
from pallas_kernels.one_row_product.contract import Norm


def multiply_rows(
    x: Float[Array, "*B D"],
    weight: Float[Array, " F *D"],
    *,
    norm: Norm | None = None,
    counted: Bool[Array, "*B"] | None = None,
    gated: bool = False,
    residual: Float[Array, "*B F"] | None = None,
    precision: PrecisionLike = None,
) -> Float[Array, "*B F"]:
    """The product of x with a parameter that nothing else adapts, and what a decoder does before and after it.

    Args:
      x: [..., D], or as many dimensions in place of D as the parameter has after F.
      weight: the parameter, in the dtype of x. What makes one number of the result lies together, as one row wants it.
      norm: RMSNorm of x before the product; None: there is none.
      counted: which rows count; the others are taken for zeros. None: all.
      gated: whether the result is silu(x W_1) * x W_2 with the two halves of the parameter's rows.
      residual: what is added to the result. The result is split over a mesh as this is.
      precision: of the product.

    Returns:
      [..., F], or [..., F/2] if it is `gated`, in the dtype of x.
    """
    given = x.shape[: x.ndim - weight.ndim + 1]
    if precision is None and is_one_row_on_a_gpu(x, weight):
        with contextlib.suppress(NotImplementedError):
            y = TRITON.function("one_row_product")(
                x.reshape(-1),
                weight.reshape(weight.shape[0], -1),
                norm=norm,
                counted=None if counted is None else counted.reshape(()),
                gated=gated,
                residual=None if residual is None else residual.reshape(-1),
            )
            return y.reshape(*given, -1)
    if norm is not None:
        x = rms_norm(x, norm)
    if counted is not None:
        x = jnp.where(jax.lax.broadcast_in_dim(counted, x.shape, range(counted.ndim)), x, 0)
    dimensions = (tuple(range(len(given), x.ndim)), tuple(range(1, weight.ndim)))
    sharding = None if residual is None else jax.typeof(residual).sharding
    y = jax.lax.dot_general(x, weight, (dimensions, ((), ())), precision=precision, out_sharding=sharding)
    y = y.astype(x.dtype)
    if gated:
        gate, up = jnp.split(y, 2, axis=-1)
        y = jax.nn.silu(gate) * up
    return y if residual is None else residual + y


def is_one_row_on_a_gpu(x: Float[Array, "*B D"], weight: Float[Array, " F *D"]) -> bool:
    """Whether a product is one of a single row of 16-bit numbers on a single GPU that runs Triton kernels."""
    given = x.shape[: x.ndim - weight.ndim + 1]
    if any(map(is_symbolic_dim, given)) or math.prod(given) != 1:
        return False
    if x.dtype != weight.dtype or x.dtype.itemsize != 2:
        return False
    if jax.sharding.get_abstract_mesh().size > 1 or in_explicit_mesh():  # a kernel takes arrays that nothing splits
        return False
    try:
        return TRITON.supports("one_row_product", current_device())
    except NotImplementedError:
        return False


def rms_norm(x: Float[Array, "*B D"], norm: Norm) -> Float[Array, "*B D"]:
    """x / rms(x) times a scale, with the statistics in float32 at least, in the dtype of x (arXiv 1910.07467)."""
    wide = x.astype(wide_dtype(x.dtype))
    mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    scale = norm.scale.astype(wide.dtype)[(None,) * (x.ndim - 1)]
    return (wide * jax.lax.rsqrt(mean_square + norm.epsilon) * scale).astype(x.dtype)
