"""What `jax.checkpoint` keeps of attention."""

from typing import Any

import jax

from pallas_kernels.residuals import RESIDUALS

_NAMED = jax.checkpoint_policies.save_only_these_names(RESIDUALS)
_CUDNN = "dot_product_attention_fwd"  # begins the names of the primitives behind `jax.nn.dot_product_attention`


def save_attention(primitive: Any, *avals: Any, **params: Any) -> Any:
    """A policy of `jax.checkpoint`: keep what attention computed, and compute everything else again.

    Of every op of this package that runs on kernels the outputs of its branches, the logarithms of its softmax sums and
    the selected blocks are kept: 3 Dv numbers of the dtype for each query head and token, 3 in float32, and n int32
    for each K/V head. So the backward pass runs no attention forward again. Of `jax.nn.dot_product_attention` on cuDNN
    the output and the statistics are kept. Pure JAX implementations compute everything again.

    Combine it with others by `jax.checkpoint_policies.save_from_both_policies`.

    Example:
      >>> import functools, jax, jax.numpy as jnp
      >>> from nsa_jax import NSAConfig, window_attention
      >>> attend = functools.partial(window_attention, config=NSAConfig())
      >>> attend = jax.checkpoint(attend, policy=save_attention)
      >>> q, k, v = jnp.ones((1, 100, 4, 16)), jnp.ones((1, 100, 2, 16)), jnp.ones((1, 100, 2, 16))
      >>> jax.jit(jax.grad(lambda q: attend(q, k, v).sum()))(q).shape
      (1, 100, 4, 16)

    Args:
      primitive, avals, params: as `jax.checkpoint` gives them to its policies.
    """
    return str(primitive.name).startswith(_CUDNN) or _NAMED(primitive, *avals, **params)
