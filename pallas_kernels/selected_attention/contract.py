"""Selected attention: softmax over the tokens of the blocks that each query selected (section 3.3.2).

The G heads of a group share the selection. `block_indices` are ascending, without duplicates, -1 at the end where fewer
than n blocks are selected, and none lies past the query's own block. A query at position t sees the tokens of its
blocks at positions segment_starts[row] .. t. A query that sees nothing gets zeros, and zero gradients. The indices
carry no gradient, o and lse do: see `pallas_kernels.compressed_attention.contract`. Results are the same bits from run
to run.

Sizes read: select_block (s). n, any number from 1 on, is the last axis of block_indices, and not config.num_selected.
"""

from typing import Protocol

from jaxtyping import Array, Float, Int

from pallas_kernels.contract import Gradients, Sizes


class Forward(Protocol):
    """Attention to the tokens of the selected blocks up to the query's own position."""

    def __call__(
        self,
        q: Float[Array, "B Tq H Dk"],
        k: Float[Array, "B T K Dk"],
        v: Float[Array, "B T K Dv"],
        block_indices: Int[Array, "B K Tq n"],
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
        block_indices: Int[Array, "B K Tq n"],
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
