"""The new tokens of each row written in one Pallas Triton kernel, in place, a row and K/V head per program."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.append_tokens.contract import Places
from pallas_kernels.contract import Sizes
from pallas_kernels.triton.heads import head_pieces
from pallas_kernels.triton.integers import div, iota, next_power_of_two, rem
from pallas_kernels.triton.launch import launch
from pallas_kernels.triton.problem import check_supported
from pallas_kernels.triton.rows import load_rows, program_pair, store_rows


@dataclasses.dataclass(frozen=True)
class Append:
    """Static facts of one call."""

    num_tokens: int  # m
    num_kv_heads: int  # K
    num_blocks: int  # N
    compress_block: int  # l
    compress_stride: int  # d
    select_block: int  # s


def append_tokens(
    pooled_k: Float[Array, "B m K Dk"],
    pooled_v: Float[Array, "B m K Dv"],
    selected_k: Float[Array, "B m K Dk"],
    selected_v: Float[Array, "B m K Dv"],
    window_k: Float[Array, "B m K Dk"],
    window_v: Float[Array, "B m K Dv"],
    finished_k: Float[Array, "B C K Dk"] | None,
    finished_v: Float[Array, "B C K Dv"] | None,
    places: Places,
    lengths: Int[Array, " B"],
    num_tokens: Int[Array, " B"],
    block_tables: Int[Array, "B N"],
    *,
    config: Sizes,
    interpret: bool = False,
) -> Places:
    """The cache with the new tokens; see the contract.

    Raises:
      NotImplementedError: a dtype or head size that the kernel does not take, or a branch that is off.
    """
    check_supported(pooled_k, pooled_k, pooled_v, scale=1.0)
    for name, array in places._asdict().items():
        if array.size == 0:
            raise NotImplementedError(f"{name}: expected places, of all three branches")
        if array.dtype != pooled_k.dtype:
            raise NotImplementedError(f"{name}.dtype = {array.dtype}: expected that of the tokens, {pooled_k.dtype}")
    B, m, K, _ = pooled_k.shape
    step = Append(
        num_tokens=m,
        num_kv_heads=K,
        num_blocks=block_tables.shape[1],
        compress_block=config.compress_block,
        compress_stride=config.compress_stride,
        select_block=config.select_block,
    )
    new = (pooled_k, pooled_v, selected_k, selected_v, window_k, window_v, finished_k, finished_v)
    written = launch(
        functools.partial(_kernel, step=step),
        out_shape=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in places),
        in_place=len(places),
        grid=(1, B * K),
        num_warps=4,
        num_stages=1,
        interpret=interpret,
        name="append_tokens",
    )(*places, *new, lengths, num_tokens, block_tables)
    return Places(*written)


class _Row(NamedTuple):
    """What a program works for, and where."""

    batch: Any
    kv_head: Any
    length: Any  # tokens of the row before the new ones
    end: Any  # and with them
    table_ref: Any


def _kernel(*refs: Any, step: Append) -> None:
    before, new, (length_ref, count_ref, table_ref), after = refs[:8], refs[8:16], refs[16:19], refs[19:]
    pair = program_pair(step.num_kv_heads)
    length = length_ref[pair.batch]
    row = _Row(pair.batch, pair.kv_head, length, length + count_ref[pair.batch], table_ref)
    for kind in (0, 1):  # keys, values
        _append(Places(*before)[4 + kind], new[kind::2], after[kind::2], row, step)


def _append(tail_before: Any, new: Sequence[Any], after: Sequence[Any], row: _Row, step: Append) -> None:
    """Keys, or values, of one row and K/V head. What is written is read nowhere else, so that no barrier is needed."""
    pooled, selected, window, finished = new
    slc, cmp, tail, win = after
    l, d, pieces = step.compress_block, step.compress_stride, head_pieces(slc.shape[-1])  # noqa: E741
    token = iota(next_power_of_two(step.num_tokens))
    position = row.length + token
    there = (token < step.num_tokens) & (position < row.end)

    def tokens_of(ref: Any) -> tuple[Any, ...]:
        return load_rows(ref, (row.batch, token, row.kv_head), pieces, there)

    _store_in_page(slc, position, there, tokens_of(selected), row, step)
    for ring, values in ((tail, pooled), (win, window)):
        slot = jnp.where(there, rem(position, ring.shape[1]), ring.shape[1])
        store_rows(ring, (row.batch, slot, row.kv_head), pieces, tokens_of(values), there)

    def finish(which: int, begin: Any) -> None:
        if finished is None:
            values = _mean(tail_before, pooled, begin, row, step)
        else:
            values = load_rows(finished, (row.batch, iota(1) + np.int32(which), row.kv_head), pieces)
        _store_in_page(cmp, begin + iota(1), iota(1) == 0, values, row, step)

    first = jnp.where(row.length >= l, div(row.length - l, d) + 1, 0)  # the compressed token that is finished next
    for which in range(pl.cdiv(step.num_tokens, d)):
        begin = (first + which) * d
        pl.when(begin + l <= row.end)(functools.partial(finish, which, begin))


def _mean(tail: Any, pooled: Any, begin: Any, row: _Row, step: Append) -> tuple[Any, ...]:
    """The mean of l tokens from position `begin` on: those that the tail holds, and new ones."""
    entry, pieces = iota(next_power_of_two(step.compress_block)), head_pieces(tail.shape[-1])
    position = begin + entry
    held = (entry < step.compress_block) & (position < row.length)
    new = (entry < step.compress_block) & (position >= row.length)
    slot, token = rem(position, tail.shape[1]), jnp.where(new, position - row.length, 0)
    old_rows = load_rows(tail, (row.batch, slot, row.kv_head), pieces, held)
    new_rows = load_rows(pooled, (row.batch, token, row.kv_head), pieces, new)
    sums = (
        jnp.sum(a.astype(jnp.float32) + b.astype(jnp.float32), axis=0) for a, b in zip(old_rows, new_rows, strict=True)
    )
    return tuple(total[None, :] / step.compress_block for total in sums)


def _store_in_page(pool: Any, position: Any, there: Any, values: tuple[Any, ...], row: _Row, step: Append) -> None:
    """Values [rows, D] of what starts at positions [rows], where `there` and where there is a page for it."""
    block, inner = div(position, step.select_block), rem(position, step.select_block)
    there &= block < step.num_blocks
    page = plgpu.load(row.table_ref.at[row.batch, jnp.where(there, block, 0)], mask=there, other=-1)
    there &= page >= 0
    at = (jnp.where(there, page, pool.shape[0]), row.kv_head, div(inner, step.select_block // pool.shape[2]))
    store_rows(pool, at, head_pieces(pool.shape[-1]), values, there)
