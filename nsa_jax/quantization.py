"""Arrays of a cache in 8 bits, see `pallas_kernels.quantized`, written and read in pure JAX."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float

from nsa_jax.precision import wide_dtype
from pallas_kernels.quantized import Quantized, rounded, scale_of


def quantize(x: Float[Array, "*N D"]) -> Quantized:
    """An array in 8 bits."""
    x = x.astype(wide_dtype(x.dtype))
    scale = scale_of(jnp.max(jnp.abs(x), axis=-1, keepdims=True))
    return Quantized(rounded(x, scale), scale)


def quantized_zeros(shape: tuple[int, ...], dtype: DTypeLike) -> Quantized:
    """Zeros in 8 bits, for arrays of a dtype."""
    return Quantized(jnp.zeros(shape, jnp.int8), jnp.zeros((*shape[:-1], 1), wide_dtype(dtype)))


def dequantize(x: Float[Array, "*N D"] | Quantized) -> Float[Array, "*N D"]:
    """The array that is read, in float32 at least; an array that is not in 8 bits as it is."""
    return x.values.astype(x.scale.dtype) * x.scale if isinstance(x, Quantized) else x


def as_held(x: Float[Array, "*N D"], place: Any) -> Any:
    """An array as `place` holds it: in 8 bits if it is `Quantized`, and otherwise in its dtype."""
    return quantize(x) if isinstance(place, Quantized) else x.astype(place.dtype)
