"""Who computes what: the backends of every op, the order in which they are asked, and how to add one of your own.

A backend is a set of functions for some of the ops. The built-in ones stand in this order: "mosaic" (Pallas Mosaic
GPU), "triton" (Pallas Triton), "xla" (pure JAX), "reference" (the oracle, only by name). `implementation=None` takes,
for each op and for its backward pass, the first that supports the device and the arguments; a named one never falls
back.

Example:
  >>> import jax
  >>> from nsa_jax import NSAConfig, backends, nsa_attention
  >>> from nsa_jax.testing import random_inputs
  >>> class Mine:
  ...     name = "mine"
  ...
  ...     def window_attention(self, *args, **kwargs):
  ...         return backends.get("xla").window_attention(*args, **kwargs)
  >>> backends.register(Mine(), before="triton")
  >>> q, kv, gates, *_ = random_inputs(jax.random.key(0), NSAConfig(), T=64, num_heads=4, num_kv_heads=2, head_dim=16)
  >>> backends.explain(nsa_attention, q, kv, gates, config=NSAConfig())["window_attention"].backend
  'mine'
  >>> backends.unregister("mine")
"""

from nsa_jax.backends.explanation import Explanation, explain
from nsa_jax.backends.protocol import OPS, Backend
from nsa_jax.backends.registry import get, names, register, unregister

__all__ = ["OPS", "Backend", "Explanation", "explain", "get", "names", "register", "unregister"]
