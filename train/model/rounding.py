"""Gradients of rounded parameters, summed in float32 where a scan uses the parameters again and again."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def widened(rounded: Float[Array, "..."]) -> Float[Array, "..."]:
    """A copy of `rounded`, in float32 at least, that collects its gradient; to be made outside of the scan.

    See `with_gradient_to`. Nothing reads its values, so that the compiler drops them.
    """
    return rounded.astype(jnp.promote_types(rounded.dtype, jnp.float32))


def with_gradient_to(wide: Float[Array, "..."], rounded: Float[Array, "..."]) -> Float[Array, "..."]:
    """`rounded`, for use inside of a scan. Its gradient goes to `wide`, and none to itself.

    A scan sums the gradients of what it closes over in their own dtype, which here is that of `wide`.
    """
    return _swap(wide, jax.lax.stop_gradient(rounded))


@jax.custom_vjp
def _swap(wide: Array, rounded: Array) -> Array:
    return rounded


_swap.defvjp(
    lambda wide, rounded: (rounded, None),
    lambda _, gradient: (widened(gradient), jnp.zeros_like(gradient)),
)
