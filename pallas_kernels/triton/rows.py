"""Which query heads the rows of a tile hold, and how rows of arrays are loaded and stored.

The G heads of a group share their keys, so that a tile packs them. Packed row r is head r % stride of the group and
query r // stride. With stride = G nothing is padded, but a query may lie in two tiles. With a power of two as stride, a
tile holds whole queries, and heads from G on are padding.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.triton.heads import Piece
from pallas_kernels.triton.integers import div, iota, rem


class Pair(NamedTuple):
    """The batch entry and K/V head that a program works for: program id 1 of every grid."""

    index: Any  # batch entry x K + K/V head
    batch: Any
    kv_head: Any


def program_pair(num_kv_heads: int) -> Pair:
    """The pair of this program."""
    index = pl.program_id(1)
    return Pair(index, div(index, num_kv_heads), rem(index, num_kv_heads))


class Rows(NamedTuple):
    """Query heads of the rows of a tile, int32 [rows] each. Padding has indices out of bounds."""

    query: Any
    head: Any  # among all H
    group_head: Any  # among the G of the group
    real: Any  # whether the row is no padding; None where there is none

    def valid(self, condition: Any) -> Any:
        """`condition` where the row is no padding."""
        return condition if self.real is None else condition & self.real


def packed_rows(first_row: Any, num_rows: int, stride: int, pair: Pair, num_heads: int, num_kv_heads: int) -> Rows:
    """Rows first_row .. first_row + num_rows - 1, where a query takes `stride` of them."""
    group = num_heads // num_kv_heads
    row = first_row + iota(num_rows)
    query, group_head = div(row, stride), rem(row, stride)
    head = pair.kv_head * group + group_head
    if stride == group:
        return Rows(query, head, group_head, None)
    real = group_head < group
    return Rows(query, jnp.where(real, head, num_heads), jnp.where(real, group_head, group), real)


def load_starts(starts_ref: Any, batch: Any, query: Any, valid: Any) -> Any:
    """First token of each query's segment, 0 where not `valid`; None where there are no segments."""
    return None if starts_ref is None else plgpu.load(starts_ref.at[batch, query], mask=valid, other=0)


def where_all(conditions: Sequence[Any], x: Any) -> Any:
    """`x`, and 0 where one of the conditions does not hold."""
    for condition in conditions:
        x = jnp.where(condition, x, 0)
    return x


def _at(ref: Any, index: tuple[Any, ...], piece: Piece, num_rows: int, valid: Any) -> tuple[Any, Any]:
    """The reference to one piece, and its mask.

    Every index that is not a scalar is an array, contiguous in the last axis: this lowers to vector loads, and also
    runs interpreted.
    """
    column = piece.start + iota(piece.width)
    mask = None if valid is None else jnp.broadcast_to(valid[:, None], (num_rows, piece.width))
    if piece.used < piece.width:
        inside = jnp.broadcast_to((iota(piece.width) < piece.used)[None, :], (num_rows, piece.width))
        mask = inside if mask is None else mask & inside
    return ref.at[(*(i[:, None] if jnp.ndim(i) else i for i in index), column[None, :])], mask


def load_rows(ref: Any, index: tuple[Any, ...], pieces: Sequence[Piece], valid: Any = None) -> tuple[Any, ...]:
    """`ref[*index, :]` in pieces [rows, width]. Entries of `index` are scalars or int32 [rows], of which one at least.

    Rows that are not `valid` are zeros; None: all are.
    """
    num_rows = next(i.shape[0] for i in index if jnp.ndim(i))
    loaded = []
    for piece in pieces:
        at, mask = _at(ref, index, piece, num_rows, valid)
        loaded.append(plgpu.load(at) if mask is None else plgpu.load(at, mask=mask, other=0))
    return tuple(loaded)


def store_rows(
    ref: Any, index: tuple[Any, ...], pieces: Sequence[Piece], values: Sequence[Any], valid: Any = None
) -> None:
    """The reverse of `load_rows`. Rows that are not `valid` have an index out of bounds or a value of their own."""
    for piece, value in zip(pieces, values, strict=True):
        at, mask = _at(ref, index, piece, value.shape[0], valid)
        plgpu.store(at, value.astype(ref.dtype), mask=mask)
