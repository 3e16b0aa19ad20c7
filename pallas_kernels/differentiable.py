"""A differentiable op from any forward pass and any backward pass of the same contract."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels.contract import Sizes
from pallas_kernels.residuals import named


@dataclasses.dataclass(frozen=True)
class Op:
    """An attention op that is differentiable in q, k and v.

    Called as `forward` is: op(q, k, v, [block_indices,] segment_starts, query_offset, *, config, scale). The backward
    pass is traced only where gradients are asked for.

    Attributes:
      forward: a `Forward` of `pallas_kernels.<op>.contract`.
      backward: a `Backward` of the same contract, of any backend.
      returns_lse: whether the op returns (o, lse), both of which carry gradients, or o alone.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    returns_lse: bool = False

    def __call__(
        self,
        q: Float[Array, "B Tq H Dk"],
        k: Float[Array, "B S K Dk"],
        v: Float[Array, "B S K Dv"],
        *indices_and_positions: Any,
        config: Sizes,
        scale: float,
    ) -> Any:
        """O [B, Tq, H, Dv] in q's dtype, and, if `returns_lse`, lse [B, H, Tq]."""
        *block_indices, segment_starts, query_offset = indices_and_positions
        return _attend(q, k, v, tuple(block_indices), Positions(segment_starts, query_offset), self, config, scale)


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class Positions:
    """Where queries stand (see `pallas_kernels.contract`). An offset that is an int stays one under transformations."""

    segment_starts: Int[Array, "B Tq"] | None
    query_offset: int | Int[Array, ""]

    def tree_flatten(self) -> tuple[tuple[Any, ...], int | None]:
        """Arrays, and the offset if it is an int."""
        if isinstance(self.query_offset, int):
            return (self.segment_starts,), self.query_offset
        return (self.segment_starts, self.query_offset), None

    @classmethod
    def tree_unflatten(cls, known: int | None, arrays: tuple[Any, ...]) -> "Positions":
        """The inverse of `tree_flatten`."""
        segment_starts, *offset = arrays
        return cls(segment_starts, offset[0] if known is None else known)

    def __iter__(self) -> Any:
        return iter((self.segment_starts, self.query_offset))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _attend(
    q: Array, k: Array, v: Array, block_indices: tuple, positions: Positions, op: Op, config: Sizes, scale: float
) -> Any:
    o, lse = op.forward(q, k, v, *block_indices, *positions, config=config, scale=scale)
    return (o, lse) if op.returns_lse else o


def _attend_forward(
    q: Array, k: Array, v: Array, block_indices: tuple, positions: Positions, op: Op, config: Sizes, scale: float
) -> tuple[Any, Any]:
    o, lse = named(op.forward(q, k, v, *block_indices, *positions, config=config, scale=scale))
    return (o, lse) if op.returns_lse else o, (q, k, v, block_indices, positions, o, lse)


def _attend_backward(op: Op, config: Sizes, scale: float, residuals: Any, cotangents: Any) -> tuple[Any, ...]:
    q, k, v, block_indices, positions, o, lse = residuals
    do, dlse = cotangents if op.returns_lse else (cotangents, None)
    options = {} if dlse is None else {"dlse": dlse}
    gradients = op.backward(q, k, v, *block_indices, o, lse, do, *positions, config=config, scale=scale, **options)
    return gradients.dq, gradients.dk, gradients.dv, None, None


_attend.defvjp(_attend_forward, _attend_backward)
