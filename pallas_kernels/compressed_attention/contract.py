"""Attention over compressed tokens (arXiv 2502.11089, section 3.3.1), forward and backward.

A query of group k at position t sees compressed token i, which stands for tokens [i d, i d + l), iff
i d >= segment_starts[row] and i d + l - 1 <= t:

    lse[h, t]  = log sum_i exp(scale q[t, h] . k[i, k])
    p[h, t, i] = exp(scale q[t, h] . k[i, k] - lse[h, t])
    o[t, h]    = sum_i p[h, t, i] v[i, k]

over the visible i. With dp = do v^T and delta = rowsum(do * o) - dlse, ds = p (dp - delta): both o and lse carry
gradients. Results are the same bits from run to run.

Sizes read: compress_block (l), compress_stride (d).
"""

from typing import Protocol

from jaxtyping import Array, Float, Int

from pallas_kernels.contract import Gradients, Sizes


class Forward(Protocol):
    """Attention to the compressed tokens that end at or before each query."""

    def __call__(
        self,
        q: Float[Array, "B Tq H Dk"],
        k: Float[Array, "B Nc K Dk"],
        v: Float[Array, "B Nc K Dv"],
        segment_starts: Int[Array, "B Tq"] | None,
        query_offset: int | Int[Array, ""],
        *,
        config: Sizes,
        scale: float,
    ) -> tuple[Float[Array, "B Tq H Dv"], Float[Array, "B H Tq"]]:
        """(o, lse)."""


class Backward(Protocol):
    """Gradients of gate * o and of lse."""

    def __call__(
        self,
        q: Float[Array, "B Tq H Dk"],
        k: Float[Array, "B Nc K Dk"],
        v: Float[Array, "B Nc K Dv"],
        o: Float[Array, "B Tq H Dv"],
        lse: Float[Array, "B H Tq"],
        do: Float[Array, "B Tq H Dv"],
        segment_starts: Int[Array, "B Tq"] | None,
        query_offset: int | Int[Array, ""],
        *,
        config: Sizes,
        scale: float,
        dlse: Float[Array, "B H Tq"] | None = None,  # cotangent of lse; None: zeros
        gate: Float[Array, "B Tq H"] | None = None,  # float32 factor of o whose product do is the cotangent of; None: 1
        dq: Float[Array, "B Tq H Dk"] | None = None,  # what other branches gave q, to be added to; None: zeros
    ) -> Gradients:
        """(dq, dk, dv, delta). With a gate, dlse is None."""
