"""Gradients of rounded parameters, summed in float32 where a scan uses the parameters again and again."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def widened(rounded: Float[Array, "..."]) -> Float[Array, "..."]:
    """What sums the gradient of `rounded` in `with_gradient_to`, outside of the scan: float32 at least.

    Nothing reads its values, so that the compiler drops them.
    """
    return rounded.astype(jnp.promote_types(rounded.dtype, jnp.float32))


def with_gradient_to(wide: Float[Array, "..."], rounded: Float[Array, "..."]) -> Float[Array, "..."]:
    """`rounded`, to be used inside of a scan; what it gets of gradient goes to `wide`, and none to itself.

    A scan sums the gradients of what it closes over in their own dtype, here that of `wide`.
    """
    return _swap(wide, jax.lax.stop_gradient(rounded))


@jax.custom_vjp
def _swap(wide: Array, rounded: Array) -> Array:
    return rounded


_swap.defvjp(
    lambda wide, rounded: (rounded, None),
    lambda _, gradient: (widened(gradient), jnp.zeros_like(gradient)),
)
