"""A policy for `jax.checkpoint` that keeps the results of attention."""

from typing import Any

import jax

from pallas_kernels.residuals import RESIDUALS

_NAMED = jax.checkpoint_policies.save_only_these_names(RESIDUALS)
_CUDNN = "dot_product_attention_fwd"  # how the names of the primitives behind `jax.nn.dot_product_attention` begin


def save_attention(primitive: Any, *avals: Any, **params: Any) -> Any:
    """A policy of `jax.checkpoint` that rematerialises everything except attention.

    It keeps what the ops of this package computed if they run on kernels: the outputs of the branches, the logarithms
    of their softmax sums, and the selected blocks. These are 3 Dv numbers in the inputs' dtype and 3 in float32 for
    each query head and token, and n int32 for each K/V head and token. The backward pass then runs no attention forward
    again. It also keeps the output and the statistics of `jax.nn.dot_product_attention` on cuDNN. Implementations in
    pure JAX are rematerialised in full.

    `jax.checkpoint_policies.save_from_both_policies` combines it with other policies.

    Example:
      >>> import functools, jax, jax.numpy as jnp
      >>> from nsa_jax import NSAConfig, window_attention
      >>> attend = functools.partial(window_attention, config=NSAConfig())
      >>> attend = jax.checkpoint(attend, policy=save_attention)
      >>> q, k, v = jnp.ones((1, 100, 4, 16)), jnp.ones((1, 100, 2, 16)), jnp.ones((1, 100, 2, 16))
      >>> jax.jit(jax.grad(lambda q: attend(q, k, v).sum()))(q).shape
      (1, 100, 4, 16)

    Args:
      primitive, avals, params: what `jax.checkpoint` passes to its policies.
    """
    return str(primitive.name).startswith(_CUDNN) or _NAMED(primitive, *avals, **params)
