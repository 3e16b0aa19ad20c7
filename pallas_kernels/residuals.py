"""What the backward passes of the ops need of their forward passes, under a name that remat policies can keep."""

from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

RESIDUALS = "attention_residuals"


def named(results: Any) -> Any:
    """A tree of results that a backward pass needs and that are costly to compute again, called `RESIDUALS`.

    Names mean nothing but to `jax.checkpoint` with such a policy as `nsa_jax.save_attention`.
    """
    return jax.tree.map(lambda x: checkpoint_name(x, RESIDUALS), results)
