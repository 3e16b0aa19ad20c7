"""What the compressed branch's kernels share: packed rows, visible ranges, head-size pieces, tile sizes.

The G query heads of a group share their keys, so a tile of `rows` packs them: row r of the flattened [Tq, G] axis is
head r % G of query r // G. No group size needs padding.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.triton.problem import Problem

LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453
# A finite floor for the running maximum: exp2(-inf - FLOOR) is 0 where exp2(-inf + inf) would be NaN.
FLOOR = -1e30

Range = tuple[Any, Any, bool]


@dataclasses.dataclass(frozen=True)
class Tile:
    """Tile of one kernel: packed query rows by compressed keys, and how it is compiled."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


def head_pieces(head_size: int, dtype: Any) -> tuple[tuple[int, int, int], ...]:
    """Splits a head size into (start, width, used) pieces whose widths are powers of two of at least 16.

    192 becomes 128 + 64: a tile padded to 256 would waste a quarter of the tensor cores' time. IEEE float32 products
    run on the ordinary cores from registers, which hold short rows only.
    """
    widest = 64 if jnp.dtype(dtype) == jnp.float32 else 256
    pieces: list[tuple[int, int, int]] = []
    start = 0
    while start < head_size:
        left = head_size - start
        width = min(widest, 1 << (left.bit_length() - 1))
        if pieces and width < left and left < widest:  # at most one short piece: what is left is padded
            width = pl.next_power_of_2(left)
        width = max(width, 16)
        pieces.append((start, width, min(width, left)))
        start += width
    return tuple(pieces)


def dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Product of two tiles over axis `contract[0]` of `a` and `contract[1]` of `b`, IEEE for float32 operands."""
    return lax.dot_general(
        a,
        b,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def dot_pieces(a: Sequence[jax.Array], b: Sequence[jax.Array]) -> jax.Array:
    """a b^T where both are lists of pieces along the head size."""
    total = dot(a[0], b[0], (1, 1))
    for a_piece, b_piece in zip(a[1:], b[1:], strict=True):
        total += dot(a_piece, b_piece, (1, 1))
    return total


def positive_div(x: Any, y: int) -> Any:
    """x // y for x >= 0, without the sign fix-up of `//`."""
    return lax.div(x, jnp.int32(y))


def positive_cdiv(x: Any, y: int) -> Any:
    """ceil(x / y) for x >= 0."""
    return lax.div(x + jnp.int32(y - 1), jnp.int32(y))


def visible_end(position: Any, problem: Problem, num_keys: int) -> Any:
    """One past the last compressed token that ends at or before `position`: i d + l - 1 <= position."""
    ahead = problem.compress_stride + 1 - problem.compress_block
    whole = positive_div(jnp.maximum(position + jnp.int32(ahead), 0), problem.compress_stride)
    return jnp.minimum(whole, num_keys)


def first_visible(start: Any, problem: Problem) -> Any:
    """First compressed token whose first token is at `start` or later: i d >= start."""
    return positive_cdiv(start, problem.compress_stride)


def packed_rows(first_row: Any, rows: int, group: int) -> tuple[jax.Array, jax.Array]:
    """Query and head-in-group, int32 [rows], of the packed rows from `first_row` on."""
    row = first_row + lax.broadcasted_iota(jnp.int32, (rows,), 0)
    return positive_div(row, group), lax.rem(row, jnp.int32(group))


def row_indices(query: jax.Array, head: jax.Array, start: int, width: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Index arrays [rows, width] of one piece of packed rows in a [Tq, G, D] array."""
    shape = (query.shape[0], width)
    column = start + lax.broadcasted_iota(jnp.int32, shape, 1)
    return lax.broadcast_in_dim(query, shape, (0,)), lax.broadcast_in_dim(head, shape, (0,)), column


def _piece_mask(shape: tuple[int, int], valid: jax.Array | None, piece: tuple[int, int, int]) -> jax.Array | None:
    _, width, used = piece
    mask = None if valid is None else lax.broadcast_in_dim(valid, shape, (0,))
    if used < width:
        inside = lax.broadcasted_iota(jnp.int32, shape, 1) < used
        mask = inside if mask is None else mask & inside
    return mask


def load_rows(ref: Any, query: jax.Array, head: jax.Array, valid: jax.Array | None, pieces: Any) -> list[jax.Array]:
    """Packed rows of a [Tq, G, D] array, as pieces [rows, width]; rows that are not `valid` read as zeros."""
    loaded = []
    for piece in pieces:
        start, width, _ = piece
        mask = _piece_mask((query.shape[0], width), valid, piece)
        index = row_indices(query, head, start, width)
        loaded.append(plgpu.load(ref.at[index], mask=mask, other=None if mask is None else 0.0))
    return loaded


def store_rows(
    ref: Any, query: jax.Array, head: jax.Array, valid: jax.Array, pieces: Any, values: Sequence[jax.Array]
) -> None:
    """Writes pieces [rows, width] to the packed rows of a [Tq, G, D] array, where `valid`."""
    for piece, value in zip(pieces, values, strict=True):
        start, width, _ = piece
        mask = _piece_mask((query.shape[0], width), valid, piece)
        plgpu.store(ref.at[row_indices(query, head, start, width)], value.astype(ref.dtype), mask=mask)


def _key_index(first_key: Any, keys: int, piece: tuple[int, int, int]) -> tuple[Any, Any]:
    """One piece of `keys` rows of a [Nc, D] array: slices, or index arrays where a slice would reach past D."""
    start, width, used = piece
    if used == width:
        return pl.ds(first_key, keys), pl.ds(start, width)
    row, column = (lax.broadcasted_iota(jnp.int32, (keys, width), axis) for axis in (0, 1))
    return first_key + row, start + column


def load_keys(ref: Any, first_key: Any, keys: int, num_keys: int | None, pieces: Any) -> list[jax.Array]:
    """Rows first_key .. first_key + keys - 1 of a [Nc, D] array as pieces; those from `num_keys` on read as zeros."""
    valid = None if num_keys is None else first_key + lax.broadcasted_iota(jnp.int32, (keys,), 0) < num_keys
    loaded = []
    for piece in pieces:
        mask = _piece_mask((keys, piece[1]), valid, piece)
        where = ref.at[_key_index(first_key, keys, piece)]
        loaded.append(plgpu.load(where, mask=mask, other=None if mask is None else 0.0))
    return loaded


def store_keys(ref: Any, first_key: Any, num_keys: int | None, pieces: Any, values: Sequence[jax.Array]) -> None:
    """Writes pieces [keys, width] to rows first_key .. of a [Nc, D] array, those before `num_keys`."""
    for piece, value in zip(pieces, values, strict=True):
        keys, width = value.shape
        valid = None if num_keys is None else first_key + lax.broadcasted_iota(jnp.int32, (keys,), 0) < num_keys
        where = ref.at[_key_index(first_key, keys, piece)]
        plgpu.store(where, value.astype(ref.dtype), mask=_piece_mask((keys, width), valid, piece))


def key_ranges(
    first_query: Any,
    last_query: Any,
    offset: Any,
    starts_ref: Any,
    problem: Problem,
    num_keys: int,
    keys: int,
) -> list[Range]:
    """Ranges (begin, end, masked) of key tiles that a tile of queries walks: only tiles with a visible key.

    Tiles that every query of the tile sees whole need no mask. `starts` never decreases, so the tile's first and last
    query bound it.
    """
    end = positive_cdiv(visible_end(offset + last_query, problem, num_keys), keys)
    full_end = positive_div(visible_end(offset + first_query, problem, num_keys), keys)
    if starts_ref is None:
        return [(0, full_end, False), (full_end, end, True)]
    begin = jnp.minimum(positive_div(first_visible(starts_ref[first_query], problem), keys), end)
    full_begin = jnp.clip(positive_cdiv(first_visible(starts_ref[last_query], problem), keys), begin, end)
    full_end = jnp.clip(full_end, full_begin, end)
    return [(begin, full_begin, True), (full_begin, full_end, False), (full_end, end, True)]


def visible(key: jax.Array, query: jax.Array, offset: Any, starts_ref: Any, problem: Problem, num_keys: int, axis: int):
    """Mask of a score tile whose axis `axis` holds the rows `query` and whose other axis holds the keys `key`."""
    shape = (query.shape[0], key.shape[0]) if axis == 0 else (key.shape[0], query.shape[0])
    end = visible_end(offset + query, problem, num_keys)
    column = lax.broadcast_in_dim(key, shape, (1 - axis,))
    mask = column < lax.broadcast_in_dim(end, shape, (axis,))
    if starts_ref is not None:
        limit = num_queries_of(starts_ref)
        start = plgpu.load(starts_ref.at[query], mask=query < limit, other=0)
        mask &= column >= lax.broadcast_in_dim(first_visible(start, problem), shape, (axis,))
    return mask


def num_queries_of(starts_ref: Any) -> int:
    """Number of queries, the length of the row of `starts` that a program sees."""
    return starts_ref.shape[0]


def walk(ranges: Sequence[Range], body: Callable[[bool], Callable[[Any, Any], Any]], carry: Any) -> Any:
    """Runs `body(masked)` over each range in turn."""
    for begin, end, masked in ranges:
        carry = lax.fori_loop(jnp.asarray(begin, jnp.int32), end, body(masked), carry)
    return carry


def query_spec(num_queries: int, num_key_heads: int, group: int, size: int) -> pl.BlockSpec:
    """One batch entry and group of a [B, Tq, K, G, D] array, for a grid (tiles, B K)."""
    block = (None, num_queries, None, group, size)
    return pl.BlockSpec(block, lambda i, y: (lax.div(y, num_key_heads), 0, lax.rem(y, num_key_heads), 0, 0))


def gate_spec(num_queries: int, num_key_heads: int, group: int) -> pl.BlockSpec:
    """One batch entry and group of a [B, Tq, K, G] array, for a grid (tiles, B K)."""
    block = (None, num_queries, None, group)
    return pl.BlockSpec(block, lambda i, y: (lax.div(y, num_key_heads), 0, lax.rem(y, num_key_heads), 0))


def key_spec(num_keys: int, num_key_heads: int, size: int) -> pl.BlockSpec:
    """One batch entry and head of a [B, Nc, K, D] array, for a grid (tiles, B K)."""
    block = (None, num_keys, None, size)
    return pl.BlockSpec(block, lambda i, y: (lax.div(y, num_key_heads), 0, lax.rem(y, num_key_heads), 0))


def specs_qkv(num_queries: int, group: int, num_key_heads: int, num_keys: int, key_size: int, value_size: int) -> Any:
    """Block specs of q, k and v."""
    return (
        query_spec(num_queries, num_key_heads, group, key_size),
        key_spec(num_keys, num_key_heads, key_size),
        key_spec(num_keys, num_key_heads, value_size),
    )


# Tile sizes. Milliseconds: one H100, H 64, K 4, bfloat16, at T 65536 for head size 128 and T 32768 for the others
# (64, Dk 192 with Dv 128, 256). `head_size` is the larger of Dk and Dv. float32 products run without tensor cores and
# are given small tiles. GPUs with less shared memory than Hopper take shallower pipelines; those are not measured.
_FLOAT32 = Tile(rows=32, keys=32, num_warps=4, num_stages=1)


def forward_tile(head_size: int, dtype: Any) -> Tile:
    """Tile of the forward kernel."""
    if jnp.dtype(dtype) == jnp.float32:
        return _FLOAT32
    if head_size <= 64:
        return Tile(rows=128, keys=64, num_warps=8, num_stages=3)  # 1.52; 4 warps, 2 stages 1.71
    if head_size <= 128:
        # 4 warps, 2 stages are as fast with 4 K/V heads, but with 1 they take 1.3 times as long.
        return Tile(rows=128, keys=64, num_warps=8, num_stages=3 if has_hopper_memory() else 2)
    if head_size <= 192 or not has_hopper_memory():
        return Tile(rows=128, keys=32, num_warps=8, num_stages=2)  # 3.89; 64 keys 4.27
    return Tile(rows=128, keys=64, num_warps=8, num_stages=2)  # 5.34; 32 keys 6.68


def query_gradient_tile(head_size: int, dtype: Any) -> Tile:
    """Tile of the dq kernel."""
    if jnp.dtype(dtype) == jnp.float32:
        return _FLOAT32
    if head_size <= 128:
        # 13.6 at 65536, 3.58 at 32768, 0.38 at 8192; 128 x 64, 8 warps, 3 stages: 12.9, 3.84, 0.47.
        return Tile(rows=64, keys=64, num_warps=4, num_stages=2)
    if not has_hopper_memory():
        return Tile(rows=64, keys=32, num_warps=4, num_stages=2)
    if head_size <= 192:
        return Tile(rows=128, keys=64, num_warps=8, num_stages=2)  # 6.22; 32 keys, 3 stages 7.10
    return Tile(rows=128, keys=32, num_warps=8, num_stages=3)  # 7.62; 64 x 64, 4 warps 8.54


def key_gradient_tile(head_size: int, dtype: Any) -> Tile:
    """Tile of the dk/dv kernel; `keys` are what a program owns and `rows` what it reads a step."""
    if jnp.dtype(dtype) == jnp.float32:
        return _FLOAT32
    if head_size <= 128:
        # 16.7; 2 stages 19.8; 64 x 64, 4 warps, 2 stages 22.1
        return Tile(rows=64, keys=128, num_warps=8, num_stages=3 if has_hopper_memory() else 2)
    if head_size <= 192:
        return Tile(rows=32, keys=64, num_warps=4, num_stages=3 if has_hopper_memory() else 2)  # 5.75; 2 stages 6.14
    if has_hopper_memory():
        return Tile(rows=64, keys=64, num_warps=8, num_stages=2)  # 18.7; 32 rows 29.7
    return Tile(rows=32, keys=64, num_warps=8, num_stages=2)


def has_hopper_memory() -> bool:
    """Whether a block may use Hopper's 227 KiB of shared memory, on the device that is traced for."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    kind = device.device_kind if device is not None else jax.devices()[0].device_kind
    return not any(name in kind for name in ("A100", "A10", "A30", "A40", "L4", "RTX", "T4"))
