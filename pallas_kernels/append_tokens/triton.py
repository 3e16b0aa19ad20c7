"""The new tokens rotated and written in place, and their gates, in one Pallas Triton kernel.

A program works for a row and K/V head: for the keys, for the values, for the queries or for the gates.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.append_tokens import tiles
from pallas_kernels.append_tokens.contract import Gates, Heads, Places
from pallas_kernels.contract import Sizes
from pallas_kernels.quantized import Quantized, rounded, scale_of
from pallas_kernels.tiles import Key, find_tile
from pallas_kernels.triton.heads import Piece, head_pieces
from pallas_kernels.triton.integers import div, iota, loop, next_power_of_two, rem
from pallas_kernels.triton.launch import launch
from pallas_kernels.triton.problem import LARGEST_GROUP, check_supported
from pallas_kernels.triton.rows import load_rows, program_pair, store_rows
from pallas_kernels.triton.tiles import AppendTile

TOKENS = 6  # arrays of new keys and values: of the compressed, selected and window branch


@dataclasses.dataclass(frozen=True)
class Append:
    """Static facts of one call."""

    num_tokens: int  # m
    num_heads: int  # H
    num_kv_heads: int  # K
    num_blocks: int  # N
    compress_block: int  # l
    compress_stride: int  # d
    select_block: int  # s
    columns: tuple[int, ...]  # where queries, the arrays of new keys and values, and the gates' hidden entries begin
    hidden: int  # entries of the gates that are multiplied at a time


def append_tokens(
    q: Heads | None,
    pooled_k: Heads,
    pooled_v: Heads,
    selected_k: Heads,
    selected_v: Heads,
    window_k: Heads,
    window_v: Heads,
    finished_k: Float[Array, "B C K Dk"] | None,
    finished_v: Float[Array, "B C K Dv"] | None,
    rotation: tuple[Float[Array, "B m Dk/2"], Float[Array, "B m Dk/2"]] | None,
    gates: Gates | None,
    places: Places,
    lengths: Int[Array, " B"],
    num_tokens: Int[Array, " B"],
    block_tables: Int[Array, "B N"],
    *,
    config: Sizes,
    num_heads: int,
    interpret: bool = False,
    tile: AppendTile | None = None,
) -> tuple[Float[Array, "B m H Dk"] | None, Float[Array, "B m H 3"] | None, Places]:
    """Rotated queries, gates, and the cache with the new tokens; see the contract.

    `tile` overrides the table, for tests and tuning.

    Raises:
      NotImplementedError: a dtype, head size or group size that the kernel does not take, or a branch that is off.
    """
    check_supported(places.tail_k, places.tail_k, places.tail_v, scale=1.0)
    (B, m, _), (K, Dk) = pooled_k.array.shape, places.tail_k.shape[2:]
    if num_heads > K * LARGEST_GROUP:
        raise NotImplementedError(f"query heads per K/V head = {num_heads // K}: expected at most {LARGEST_GROUP}")
    for name, array in places._asdict().items():
        if 0 in array.shape:
            raise NotImplementedError(f"{name}: expected places, of all three branches")
    new = (pooled_k, pooled_v, selected_k, selected_v, window_k, window_v)
    columns = [each for each in (q, *new, None if gates is None else gates.hidden)]
    exact = (array for array in places if not isinstance(array, Quantized))
    for array in (*exact, *(each.array for each in columns if each is not None)):
        if array.dtype != places.tail_k.dtype:
            raise NotImplementedError(f"{array.dtype} beside {places.tail_k.dtype}: expected one dtype")
    Dv = places.tail_v.shape[3]
    key = Key(places.tail_k.dtype.itemsize, max(Dk, Dv), num_heads // K, Dk + Dv)
    tile = tile or find_tile(tiles.APPEND, key)
    step = Append(
        num_tokens=m,
        num_heads=num_heads,
        num_kv_heads=K,
        num_blocks=block_tables.shape[1],
        compress_block=config.compress_block,
        compress_stride=config.compress_stride,
        select_block=config.select_block,
        columns=tuple(0 if each is None else each.column for each in columns),
        hidden=tile.hidden,
    )
    held, structure = jax.tree.flatten(places)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in held]
    if q is not None:
        shapes.append(jax.ShapeDtypeStruct((B, m, num_heads, Dk), q.array.dtype))
    if gates is not None:
        shapes.append(jax.ShapeDtypeStruct((B, m, num_heads, 3), jnp.float32))
    results = launch(
        functools.partial(_kernel, step=step),
        out_shape=tuple(shapes),
        in_place=len(held),
        grid=(len(shapes) - len(held) + 2, B * K),
        num_warps=tile.num_warps,
        num_stages=1,
        interpret=interpret,
        name="append_tokens",
    )(
        *places,
        *(None if each is None else each.array for each in columns),
        *((None,) * 3 if gates is None else gates[1:]),
        finished_k,
        finished_v,
        *(rotation or (None, None)),
        lengths,
        num_tokens,
        block_tables,
    )
    rotated = None if q is None else results[len(held)]
    return rotated, None if gates is None else results[-1], jax.tree.unflatten(structure, results[: len(held)])


class _Row(NamedTuple):
    """What a program works for, and where."""

    batch: Any
    kv_head: Any
    length: Any  # tokens of the row before the new ones
    end: Any  # and with them
    rotation: Any  # references to cos and sin; None
    table_ref: Any


class _Cut(NamedTuple):
    """Heads [rows, D] in pieces of columns."""

    pieces: tuple[Piece, ...]
    values: tuple[Any, ...]


def _kernel(*refs: Any, step: Append) -> None:
    before, rest = Places(*refs[: len(Places._fields)]), refs[len(Places._fields) :]
    q, *new = rest[: 1 + TOKENS]
    hidden, in_bias, out_kernel, out_bias, *finished = rest[1 + TOKENS : 7 + TOKENS]
    cos, sin, length_ref, count_ref, table_ref, *after = rest[7 + TOKENS :]
    pair = program_pair(step.num_kv_heads)
    length = length_ref[pair.batch]
    rotation = None if cos is None else (cos, sin)
    row = _Row(pair.batch, pair.kv_head, length, length + count_ref[pair.batch], rotation, table_ref)
    held, structure = jax.tree.flatten(before)
    written, of_queries = jax.tree.unflatten(structure, after[: len(held)]), after[len(held) :]
    columns = step.columns[1 : 1 + TOKENS]
    parts = [
        functools.partial(
            _append, kind == 0, tail, new[kind::2], columns[kind::2], finished[kind], written[kind::2], row, step
        )
        for kind, tail in enumerate((before.tail_k, before.tail_v))
    ]
    if q is not None:
        parts.append(functools.partial(_rotate_queries, q, of_queries[0], row, step))
    if hidden is not None:
        parts.append(functools.partial(_open_gates, hidden, in_bias, out_kernel, out_bias, of_queries[-1], row, step))
    for number, part in enumerate(parts):
        pl.when(pl.program_id(0) == number)(part)


def _open_gates(
    hidden: Any, in_bias: Any, out_kernel: Any, out_bias: Any, opened: Any, row: _Row, step: Append
) -> None:
    """The gates of the query heads of one row and K/V head."""
    group, F = step.num_heads // step.num_kv_heads, in_bias.shape[0]
    group_head = iota(next_power_of_two(group))
    has_head = group_head < group
    head = jnp.where(has_head, row.kv_head * group + group_head, step.num_heads)

    def load(ref: Any, at: tuple[Any, ...], mask: Any) -> Any:
        return plgpu.load(ref.at[at], mask=mask, other=0).astype(jnp.float32)

    def of_token(token: Any, done: Any) -> Any:
        def add(chunk: Any, logits: Any) -> Any:
            f = chunk * step.hidden + iota(step.hidden)
            x = load(hidden, (row.batch, token, step.columns[-1] + f), f < F) + load(in_bias, (f,), f < F)
            x = x / (1 + jnp.exp(-x))
            there = (f < F)[:, None] & has_head[None, :]
            kernels = (load(out_kernel, (f[:, None], head[None, :], gate), there) for gate in range(3))
            return tuple(y + jnp.sum(x[:, None] * w, axis=0) for y, w in zip(logits, kernels, strict=True))

        logits = loop(0, pl.cdiv(F, step.hidden), add, (jnp.zeros(head.shape, jnp.float32),) * 3)
        for gate, logit in enumerate(logits):
            opening = 1 / (1 + jnp.exp(-logit - load(out_bias, (head, gate), has_head)))
            plgpu.store(opened.at[row.batch, token, head, gate], opening, mask=has_head)
        return done

    loop(0, step.num_tokens, of_token, np.int32(0))


def _rotate_queries(q: Any, rotated: Any, row: _Row, step: Append) -> None:
    """The query heads of one row and K/V head."""
    group, D = step.num_heads // step.num_kv_heads, rotated.shape[-1]
    padded = next_power_of_two(group)
    packed = iota(next_power_of_two(step.num_tokens) * padded)
    token, group_head = div(packed, padded), rem(packed, padded)
    there = (token < step.num_tokens) & (group_head < group)
    head = row.kv_head * group + group_head
    cut = _load(q, step.columns[0] + head * D, token, there, D, row)
    store_rows(rotated, (row.batch, token, jnp.where(there, head, step.num_heads)), cut.pieces, cut.values, there)


def _append(
    rotates: bool,
    tail_before: Any,
    new: Sequence[Any],
    columns: Sequence[int],
    finished: Any,
    after: Sequence[Any],
    row: _Row,
    step: Append,
) -> None:
    """Keys, or values, of one row and K/V head. What is written is read nowhere else, so that no barrier is needed."""
    slc, cmp, tail, win = after
    l, d, D = step.compress_block, step.compress_stride, slc.shape[-1]  # noqa: E741
    token = iota(next_power_of_two(step.num_tokens))
    position = row.length + token
    there = (token < step.num_tokens) & (position < row.end)
    of_row = row if rotates else row._replace(rotation=None)
    pooled, selected, window = (
        _load(ref, column + row.kv_head * D + 0 * token, token, there, D, of_row)
        for ref, column in zip(new, columns, strict=True)
    )
    _store_in_page(slc, position, there, selected, row, step)
    for ring, cut in ((tail, pooled), (win, window)):
        slot = jnp.where(there, rem(position, ring.shape[1]), ring.shape[1])
        store_rows(ring, (row.batch, slot, row.kv_head), cut.pieces, cut.values, there)

    def finish(which: int, begin: Any) -> None:
        if finished is None:
            cut = _mean(tail_before, pooled, position, there, begin, row, step)
        else:
            pieces = head_pieces(D)
            cut = _Cut(pieces, load_rows(finished, (row.batch, iota(1) + np.int32(which), row.kv_head), pieces))
        _store_in_page(cmp, begin + iota(1), iota(1) == 0, cut, row, step)

    first = jnp.where(row.length >= l, div(row.length - l, d) + 1, 0)  # the compressed token that is finished next
    for which in range(pl.cdiv(step.num_tokens, d)):
        begin = (first + which) * d
        pl.when(begin + l <= row.end)(functools.partial(finish, which, begin))


def _load(ref: Any, column: Any, token: Any, there: Any, head_dim: int, row: _Row) -> _Cut:
    """The heads [rows, D] that begin at a column of each token, rotated if the row has a rotation; zeros elsewhere."""

    def load(array: Any, first: Any, piece: Piece) -> Any:
        inside = there[:, None] & (iota(piece.width) < piece.used)[None, :]
        at = first[:, None] + np.int32(piece.start) + iota(piece.width)[None, :]
        return plgpu.load(array.at[row.batch, token[:, None], at], mask=inside, other=0)

    if row.rotation is None:
        pieces = head_pieces(head_dim)
        return _Cut(pieces, tuple(load(ref, column, piece) for piece in pieces))
    half = np.int32(head_dim // 2)
    low, high = [], []
    for piece in head_pieces(head_dim // 2):
        x, y = (load(ref, begin, piece).astype(jnp.float32) for begin in (column, column + half))
        cos, sin = (load(array, 0 * token, piece) for array in row.rotation)
        # Rounded as they are stored, for the means.
        low.append((piece, (x * cos - y * sin).astype(ref.dtype)))
        high.append((piece._replace(start=piece.start + head_dim // 2), (y * cos + x * sin).astype(ref.dtype)))
    return _Cut(*zip(*low, *high, strict=True))


def _mean(tail: Any, new: _Cut, position: Any, there: Any, begin: Any, row: _Row, step: Append) -> _Cut:
    """The mean of l tokens from position `begin` on: those that the tail holds, and new ones."""
    entry = iota(next_power_of_two(step.compress_block))
    old_position = begin + entry
    held = (entry < step.compress_block) & (old_position < row.length)
    index = (row.batch, rem(old_position, tail.shape[1]), row.kv_head)
    old = load_rows(tail, index, new.pieces, held)
    counts = there & (position >= begin) & (position < begin + step.compress_block)
    sums = (
        jnp.sum(a.astype(jnp.float32), axis=0) + jnp.sum(jnp.where(counts[:, None], b.astype(jnp.float32), 0), axis=0)
        for a, b in zip(old, new.values, strict=True)
    )
    return _Cut(new.pieces, tuple(total[None, :] / step.compress_block for total in sums))


def _store_in_page(pool: Any, position: Any, there: Any, cut: _Cut, row: _Row, step: Append) -> None:
    """What starts at positions [rows], where `there` and where there is a page for it."""
    block, inner = div(position, step.select_block), rem(position, step.select_block)
    there &= block < step.num_blocks
    page = plgpu.load(row.table_ref.at[row.batch, jnp.where(there, block, 0)], mask=there, other=-1)
    there &= page >= 0
    at = (jnp.where(there, page, pool.shape[0]), row.kv_head, div(inner, step.select_block // pool.shape[2]))
    values, values_ref = cut.values, pool
    if isinstance(pool, Quantized):
        values_ref, scale_ref = cast(Any, pool)
        values, scale = _quantized(values)
        plgpu.store(scale_ref.at[(*at, 0)], scale, mask=there)
    store_rows(values_ref, at, cut.pieces, values, there)


def _quantized(values: Sequence[Any]) -> tuple[tuple[Any, ...], Any]:
    """Heads [rows, D] in pieces as int8 numbers, and the factor of each row. Columns that no head has are zeros."""
    wide = [x.astype(jnp.float32) for x in values]
    scale = scale_of(functools.reduce(jnp.maximum, (jnp.max(jnp.abs(x), axis=1) for x in wide)))
    return tuple(rounded(x, scale[:, None]) for x in wide), scale
