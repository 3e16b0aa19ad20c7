"""y = W x of one row x, [D], with what a decoder does before and after it. W is [F, D]: what makes one number of the
result lies together.

With a `norm`, x is x / rms(x) * scale instead, rounded to the dtype of x: RMSNorm (arXiv 1910.07467), with its
statistics in float32. If `counted` is false, x is zeros, whatever it holds.

If the product is `gated`, y is silu(W_1 x) * W_2 x, [F/2], with the two halves of W's rows (SwiGLU, arXiv
2002.05202). With a `residual` of the shape of y, y is added to it.

Products are added in float32, and y is rounded to the dtype of x at the end. Not differentiable.
"""

from typing import NamedTuple

from jaxtyping import Array, Float


class Norm(NamedTuple):
    """RMSNorm of rows."""

    scale: Float[Array, " D"]
    epsilon: float  # added to the mean square
