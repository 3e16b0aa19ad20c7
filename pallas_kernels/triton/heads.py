"""Heads of any size in pieces of power-of-two width, and products of matrices that are cut so."""

import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.triton.integers import next_power_of_two

SMALLEST_SIDE = 16  # of a matrix that Triton multiplies


class Piece(NamedTuple):
    """Columns start .. start + width - 1 of a head, of which the first `used` are there."""

    start: int
    width: int
    used: int


def head_pieces(head_dim: int, widest: int = 256) -> tuple[Piece, ...]:
    """Cuts a head into pieces at most `widest` wide: 192 is 128 + 64, 80 is 64 + 16, 112 is 64 + 64 of which 48 used.

    A matrix padded from 192 to 256 would waste a quarter of the tensor cores' time. There is at most one piece of
    another width than those before it: what is left after it is padding, which costs less than a third product.
    """
    pieces: list[Piece] = []
    start = 0
    while start < head_dim:
        left = head_dim - start
        width = min(widest, 1 << (left.bit_length() - 1))
        if pieces and width < left < widest:
            width = next_power_of_two(left)
        width = max(width, SMALLEST_SIDE)
        pieces.append(Piece(start, width, min(width, left)))
        start += width
    return tuple(pieces)


def zeros(rows: int, pieces: Sequence[Piece]) -> tuple[jax.Array, ...]:
    """Float32 accumulators."""
    return tuple(jnp.zeros((rows, piece.width), jnp.float32) for piece in pieces)


def dot(a: Any, b: Any, trans_b: bool = False) -> jax.Array:
    """a @ b or a @ b.T in float32. Float32 inputs are multiplied in IEEE precision, not TF32."""
    contracted = (((1,), (1 if trans_b else 0,)), ((), ()))
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, contracted, precision=precision, preferred_element_type=jnp.float32)


def dot_pieces(a: Sequence[Any], b: Sequence[Any]) -> jax.Array:
    """a @ b.T where both are cut along the head."""
    total = dot(a[0], b[0], trans_b=True)
    for x, y in zip(a[1:], b[1:], strict=True):
        total += dot(x, y, trans_b=True)
    return total


def row_products(a: Sequence[Any], b: Sequence[Any]) -> jax.Array:
    """The dot product of each row of a with the same row of b, in float32."""
    products = [jnp.sum(x.astype(jnp.float32) * y.astype(jnp.float32), axis=1) for x, y in zip(a, b, strict=True)]
    return functools.reduce(jnp.add, products)


def accumulate(
    accumulators: Sequence[Any], weights: Any, values: Sequence[Any], decay: Any = None, factor: float | None = None
) -> tuple[jax.Array, ...]:
    """acc * decay + weights @ values * factor, piece by piece."""
    weights = weights.astype(values[0].dtype)
    if decay is not None:
        accumulators = tuple(acc * decay[:, None] for acc in accumulators)
    products: Iterable[Any] = (dot(weights, value) for value in values)
    if factor is not None:
        products = (product * factor for product in products)
    return tuple(acc + product for acc, product in zip(accumulators, products, strict=True))


def scaled(pieces: Sequence[Any], factor: Any) -> tuple[Any, ...]:
    """Every piece times a number, or times a column of numbers."""
    return tuple(piece * factor for piece in pieces)
