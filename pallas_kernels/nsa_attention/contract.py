"""The whole of Native Sparse Attention: three branches, selection, gated sum (arXiv 2502.11089, equation 5).

    o = g0 o_cmp + g1 o_slc + g2 o_win

where the branches are those of `compressed_attention`, `selected_attention` over what `block_selection` chooses, and
`window_attention`. Gates [B, Tq, H, 3] are in the order compressed, selected, window.

Residuals are the inputs, the branches' outputs, their lse and the indices. The backward pass gates the cotangent inside
the branches' kernels and lets each branch add to the one before's dq, so that neither a gated cotangent nor three
gradients of q are ever in memory. It is as deterministic as the branches are.

Sizes read: all.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Array, Float


class Keys(NamedTuple):
    """Keys and values of the three branches."""

    cmp_k: Float[Array, "B Nc K Dk"]
    cmp_v: Float[Array, "B Nc K Dv"]
    slc_k: Float[Array, "B T K Dk"]
    slc_v: Float[Array, "B T K Dv"]
    win_k: Float[Array, "B S K Dk"]  # S = T, unless the window's keys are others than those selected from
    win_v: Float[Array, "B S K Dv"]


@dataclasses.dataclass(frozen=True)
class Parts:
    """What the fused op is made of: passes of the branches' contracts, each from any backend.

    Hashable, because they ride through `jax.custom_vjp` as a static argument.
    """

    compressed_attention: Callable[..., Any]
    select_blocks: Callable[..., Any]
    selected_attention: Callable[..., Any]
    window_attention: Callable[..., Any]
    compressed_attention_backward: Callable[..., Any]
    selected_attention_backward: Callable[..., Any]
    window_attention_backward: Callable[..., Any]
