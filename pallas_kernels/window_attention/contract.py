"""Sliding window attention: softmax over the last w positions, the query's own included (section 3.3.3).

A query at position t sees positions max(t - w + 1, segment_starts[row], 0) .. t. A query that sees nothing gets zeros,
and zero gradients. Both o and lse carry gradients: see `pallas_kernels.compressed_attention.contract`. Results are the
same bits from run to run.

Sizes read: window (w).
"""

from typing import Protocol

from jaxtyping import Array, Float, Int

from pallas_kernels.contract import Gradients, Sizes


class Forward(Protocol):
    """Attention to the last w positions."""

    def __call__(
        self,
        q: Float[Array, "B Tq H Dk"],
        k: Float[Array, "B T K Dk"],
        v: Float[Array, "B T K Dv"],
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
        k: Float[Array, "B T K Dk"],
        v: Float[Array, "B T K Dv"],
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
