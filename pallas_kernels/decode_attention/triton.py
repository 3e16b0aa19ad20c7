"""One decoding step through Pallas Triton, in five kernels that are split along the keys, so that few rows fill a GPU.

1. Scores and partial sums of the compressed tokens and of the window, a chunk of keys per program.
2. Importance from these scores, a slab of blocks per program.
3. The best blocks, a query and K/V head per program.
4. Partial sums of the selected blocks, a tile of keys per program.
5. The partial sums of each branch joined, and the branches added with their gates.

A partial sum is (m, total, acc): the largest score of a query head over some keys, the sum of its weights relative to
that, and the weighted values.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.block_selection.triton import best_blocks
from pallas_kernels.contract import Sizes
from pallas_kernels.tiles import (
    LEAST,
    LOG2_E,
    NEVER,
    accumulate,
    dot_pieces,
    exp2,
    launch,
    load_rows,
    next_power_of_two,
    softmax_step,
    store_rows,
    zeros,
)
from pallas_kernels.triton.problem import check_supported

MOST_BLOCKS = 32768
LEAST_ROWS = 16  # of a tile that a matrix unit multiplies
SLAB = 64  # blocks whose importance a program sums


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How the work is cut."""

    num_keys: int  # of a tile
    chunk: int  # compressed tokens of a program, a multiple of `num_keys`
    num_warps: int


@dataclasses.dataclass(frozen=True)
class Step:
    """Static facts of one call."""

    batch: int
    num_queries: int  # m
    num_heads: int  # H
    num_kv_heads: int  # K
    num_blocks: int  # N, of the longest row
    ring: int  # W
    compress_block: int
    compress_stride: int
    select_block: int
    num_selected: int
    num_init: int
    num_local: int
    window: int
    scale: float
    interpret: bool
    tiling: Tiling

    @property
    def group(self) -> int:
        """Query heads of a K/V head."""
        return self.num_heads // self.num_kv_heads

    @property
    def padded_group(self) -> int:
        """Rows that a query takes in a tile of several queries."""
        return next_power_of_two(self.group)

    @property
    def tile_queries(self) -> int:
        """Queries that a tile of the first kernel holds."""
        most = max(1, 64 // self.padded_group)
        return max(pl.cdiv(LEAST_ROWS, self.padded_group), min(next_power_of_two(self.num_queries), most))

    @property
    def per_block(self) -> int:
        """Compressed tokens that start in a block."""
        return self.select_block // self.compress_stride

    @property
    def compressed_splits(self) -> int:
        """Programs along the compressed tokens."""
        return pl.cdiv(self.num_blocks * self.per_block, self.tiling.chunk)

    @property
    def window_splits(self) -> int:
        """Programs along the window."""
        return pl.cdiv(self.window + self.tile_queries - 1, self.tiling.num_keys)

    @property
    def selected_splits(self) -> int:
        """Programs along the selected blocks."""
        return pl.cdiv(self.num_selected * next_power_of_two(self.select_block), self.tiling.num_keys)

    def visible(self, position: Any) -> Any:
        """Compressed tokens that a query at `position` sees."""
        after = position + 1 - self.compress_block
        seen = lax.div(after, jnp.int32(self.compress_stride)) + 1
        return jnp.where(after >= 0, jnp.minimum(seen, self.num_blocks * self.per_block), 0)


def choose_tiling(pairs: int, num_compressed: int, head_dim: int, itemsize: int) -> Tiling:
    """The tiling for `pairs` of a row and a K/V head, by the compressed tokens of the longest row and the head size."""
    if itemsize == 4:
        num_keys, num_warps = (32, 4) if head_dim <= 128 else (16, 4)
    else:
        num_keys, num_warps = (128, 4) if head_dim <= 128 else (64, 4)
    chunk = 128 if pairs <= 16 else 256 if pairs <= 128 else 512
    return Tiling(num_keys, max(chunk, next_power_of_two(pl.cdiv(num_compressed, 128))), num_warps)


def decode_attention(
    q: Float[Array, "B m H Dk"],
    cmp_k: Float[Array, "P K s/d Dk"],
    cmp_v: Float[Array, "P K s/d Dv"],
    slc_k: Float[Array, "P K s Dk"],
    slc_v: Float[Array, "P K s Dv"],
    win_k: Float[Array, "B W K Dk"],
    win_v: Float[Array, "B W K Dv"],
    gates: Float[Array, "B m H 3"],
    query_offsets: Int[Array, " B"],
    block_tables: Int[Array, "B N"],
    *,
    config: Sizes,
    scale: float,
    interpret: bool = False,
    tile: Tiling | None = None,
) -> tuple[Float[Array, "B m H Dv"], Int[Array, "B K m n"]]:
    """All branches of one decoding step; see the contract. `tile` overrides the table, for tests and tuning.

    Raises:
      NotImplementedError: a dtype, head size, group size, scale or number of blocks that the kernels do not take.
    """
    check_supported(q, win_k, win_v, scale=scale)
    (B, m, H, Dk), (K, s, Dv), N = q.shape, slc_v.shape[1:], block_tables.shape[1]
    if N > MOST_BLOCKS:
        raise NotImplementedError(f"columns of block_tables = {N}: expected at most {MOST_BLOCKS}")
    step = Step(
        batch=B,
        num_queries=m,
        num_heads=H,
        num_kv_heads=K,
        num_blocks=N,
        ring=win_k.shape[1],
        compress_block=config.compress_block,
        compress_stride=config.compress_stride,
        select_block=config.select_block,
        num_selected=config.num_selected,
        num_init=config.num_init,
        num_local=config.num_local,
        window=config.window,
        scale=float(scale),
        interpret=interpret,
        tiling=tile or choose_tiling(B * K, N * s // config.compress_stride, max(Dk, Dv), q.dtype.itemsize),
    )
    q = q.reshape(B * m * H, Dk)
    cmp_k, cmp_v, slc_k, slc_v = (x.reshape(-1, x.shape[3]) for x in (cmp_k, cmp_v, slc_k, slc_v))
    first, scores = _first_partials(q, cmp_k, cmp_v, win_k, win_v, query_offsets, block_tables, step)
    indices = _choose(first, scores, query_offsets, step)
    second = _selected_partials(q, slc_k, slc_v, indices, query_offsets, block_tables, step)
    o = _join(first, second, gates.reshape(B * m * H, 3), query_offsets, q.dtype, step)
    return o.reshape(B, m, H, Dv), indices.reshape(B, K, m, config.num_selected)


def _partials_shape(splits: int, head_dim: int, step: Step) -> tuple[jax.ShapeDtypeStruct, ...]:
    rows = step.batch * step.num_queries * step.num_heads
    shapes = ((splits, rows), (splits, rows), (splits, rows, head_dim))
    return tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)


def _store_partials(refs: Any, split: Any, row: Any, valid: Any, m: Any, total: Any, acc: Any) -> None:
    m_ref, total_ref, acc_ref = refs
    plgpu.store(m_ref.at[split, row], m, mask=valid)
    plgpu.store(total_ref.at[split, row], total, mask=valid)
    store_rows(acc_ref, (split,), row, None, acc_ref.shape[-1], acc, valid)


def _nothing(num_rows: int, head_dim: int) -> tuple[Any, Any, Any]:
    """Running maximum, sum and values of the online softmax, before any key."""
    return jnp.full((num_rows,), LEAST, jnp.float32), jnp.zeros((num_rows,), jnp.float32), zeros(num_rows, head_dim)


def _attend(carry: Any, s: Any, visible: Any, values: Any, step: Step) -> tuple[Any, Any, Any]:
    """One step of the online softmax of the scores s over the values of the keys that are visible."""
    m, total, acc = carry
    s = jnp.where(visible, s, -jnp.inf)
    p, m, total, decay = softmax_step(s, m, total, step.scale * LOG2_E, step.interpret)
    return m, total, accumulate(acc, p, values, decay)


def _rows(b: Any, kv_head: Any, query: Any, g: Any, step: Step) -> tuple[Any, Any]:
    """(row of the flattened [B, m, H], whether there is such a query and head)."""
    valid = (query < step.num_queries) & (g < step.group)
    row = (b * step.num_queries + query) * step.num_heads + kv_head * step.group + g
    return jnp.where(valid, row, step.batch * step.num_queries * step.num_heads), valid


def _first_kernel(
    q_ref,
    cmp_k_ref,
    cmp_v_ref,
    win_k_ref,
    win_v_ref,
    offset_ref,
    table_ref,
    m_ref,
    total_ref,
    acc_ref,
    score_ref,
    *,
    step: Step,
):
    split, bk, part = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    Dk, Dv, num_keys = q_ref.shape[-1], cmp_v_ref.shape[-1], step.tiling.num_keys
    b, kv_head = lax.div(bk, jnp.int32(step.num_kv_heads)), lax.rem(bk, jnp.int32(step.num_kv_heads))
    num_rows = step.tile_queries * step.padded_group
    tile_row = jnp.arange(num_rows, dtype=jnp.int32)
    first_query = part * step.tile_queries
    query = first_query + lax.div(tile_row, jnp.int32(step.padded_group))
    row, valid = _rows(b, kv_head, query, lax.rem(tile_row, jnp.int32(step.padded_group)), step)
    offset = offset_ref[b]
    position = offset + query
    last = offset + jnp.minimum(first_query + step.tile_queries, step.num_queries) - 1
    key = jnp.arange(num_keys, dtype=jnp.int32)
    refs = (m_ref, total_ref, acc_ref)
    begin = split * step.tiling.chunk
    end = jnp.minimum(step.visible(last), begin + step.tiling.chunk)
    per_block = jnp.int32(step.per_block)
    score_columns = score_ref.shape[1] // step.per_block

    @pl.when((split < step.compressed_splits) & (begin < end))
    def _compressed():
        q = load_rows(q_ref, (), row, None, Dk, valid)
        seen = step.visible(position)

        def walk(i, carry):
            index = begin + i * num_keys + key
            exists = index < end
            block, inner = lax.div(index, per_block), lax.rem(index, per_block)
            page = plgpu.load(table_ref.at[b, block], mask=exists, other=0)
            at = (jnp.maximum(page, 0) * step.num_kv_heads + kv_head) * step.per_block + inner
            k = load_rows(cmp_k_ref, (), at, None, Dk, exists)
            v = load_rows(cmp_v_ref, (), at, None, Dv, exists)
            s = dot_pieces(q, k)
            visible = index[None, :] < seen[:, None]
            column = jnp.where(exists, inner * score_columns + block, score_ref.shape[1])
            plgpu.store(score_ref.at[row[:, None], column[None, :]], s, mask=visible & valid[:, None])
            return _attend(carry, s, visible, v, step)

        carry = lax.fori_loop(0, pl.cdiv(end - begin, num_keys), walk, _nothing(num_rows, Dv))
        _store_partials(refs, split, row, valid, *carry)

    @pl.when(split >= step.compressed_splits)
    def _window():
        q = load_rows(q_ref, (), row, None, Dk, valid)
        lowest = offset + first_query - step.window + 1
        at = lowest + (split - step.compressed_splits) * num_keys + key
        exists = (at >= 0) & (at <= last)
        slot = lax.rem(jnp.maximum(at, 0), jnp.int32(step.ring))
        k = load_rows(win_k_ref, (b,), slot, kv_head, Dk, exists)
        v = load_rows(win_v_ref, (b,), slot, kv_head, Dv, exists)
        visible = (at[None, :] <= position[:, None]) & (at[None, :] > position[:, None] - step.window)
        carry = _attend(_nothing(num_rows, Dv), dot_pieces(q, k), visible & exists[None, :], v, step)
        _store_partials(refs, split, row, valid, *carry)


def _first_partials(q, cmp_k, cmp_v, win_k, win_v, offsets, tables, step: Step):
    """Partial sums of the compressed tokens and the window, and scores [rows, per block x blocks] of the former.

    Splits beyond a row's last compressed token, and scores that it does not see, are not written.
    """
    columns = step.per_block * next_power_of_two(step.num_blocks)
    splits = step.compressed_splits + step.window_splits
    *partials, scores = launch(
        functools.partial(_first_kernel, step=step),
        out_shape=(
            *_partials_shape(splits, cmp_v.shape[-1], step),
            jax.ShapeDtypeStruct((q.shape[0], columns), jnp.float32),
        ),
        grid=(splits, step.batch * step.num_kv_heads, pl.cdiv(step.num_queries, step.tile_queries)),
        num_warps=step.tiling.num_warps,
        num_stages=2,
        interpret=step.interpret,
        name="decode_attention_first",
    )(q, cmp_k, cmp_v, win_k, win_v, offsets, tables)
    return tuple(partials), scores


def _importance_kernel(m_ref, total_ref, score_ref, offset_ref, importance_ref, *, step: Step):
    slab, bk, query = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    b, kv_head = lax.div(bk, jnp.int32(step.num_kv_heads)), lax.rem(bk, jnp.int32(step.num_kv_heads))
    position = offset_ref[b] + query
    seen = step.visible(position)
    c = step.scale * LOG2_E

    @pl.when(slab * SLAB <= lax.div(position, jnp.int32(step.select_block)))
    def _sum():
        row, valid = _rows(b, kv_head, query, jnp.arange(step.padded_group, dtype=jnp.int32), step)
        split = jnp.arange(next_power_of_two(step.compressed_splits), dtype=jnp.int32)
        there = (split * step.tiling.chunk < seen)[:, None] & valid[None, :]
        m = plgpu.load(m_ref.at[split[:, None], row[None, :]], mask=there, other=LEAST)
        total = plgpu.load(total_ref.at[split[:, None], row[None, :]], mask=there, other=0)
        top = jnp.max(m, axis=0)
        total = jnp.sum(total * exp2((m - top[None, :]) * c, step.interpret), axis=0)
        lse = jnp.where(total > 0, top * c + jnp.log(jnp.where(total > 0, total, 1)) * LOG2_E, NEVER)
        block = slab * SLAB + jnp.arange(SLAB, dtype=jnp.int32)
        columns = score_ref.shape[1] // step.per_block
        overlap = step.compress_block // step.compress_stride
        importance = jnp.zeros((SLAB,), jnp.float32)
        for shift in range(1 - overlap, step.per_block):
            # Compressed token j s/d + shift and block j share this many chunks of d tokens.
            weight = float(min(shift + overlap, step.per_block) - max(shift, 0))
            index = block * step.per_block + shift
            mask = valid[:, None] & ((index >= 0) & (index < seen))[None, :]
            column = (shift % step.per_block) * columns + block + shift // step.per_block
            s = plgpu.load(score_ref.at[row[:, None], column[None, :]], mask=mask, other=-jnp.inf)
            importance += weight * jnp.sum(exp2(s * c - lse[:, None], step.interpret), axis=0)
        at = jnp.full((SLAB,), bk * step.num_queries + query)
        plgpu.store(importance_ref.at[at, block], importance)


def _choose_kernel(importance_ref, offset_ref, indices_ref, *, step: Step):
    query, bk = pl.program_id(0), pl.program_id(1)
    row = bk * step.num_queries + query
    block = jnp.arange(importance_ref.shape[1], dtype=jnp.int32)
    position = offset_ref[lax.div(bk, jnp.int32(step.num_kv_heads))] + query
    last = jnp.minimum(lax.div(position, jnp.int32(step.select_block)), step.num_blocks - 1)
    forced = (block < step.num_init) | (block > last - step.num_local)
    at = importance_ref.at[jnp.full(block.shape, row), block]
    importance = plgpu.load(at, mask=block <= last, other=-jnp.inf)
    importance = jnp.where(block <= last, jnp.where(forced, jnp.inf, importance), -jnp.inf)
    chosen = best_blocks(importance[:, None], jnp.full((1,), last + 1), step.num_selected)
    place = lax.broadcasted_iota(jnp.int32, chosen.shape, 0)
    at = indices_ref.at[jnp.full(chosen.shape, row), place]
    plgpu.store(at, chosen, mask=place < step.num_selected)


def _choose(partials, scores, offsets, step: Step):
    """The selected blocks, int32 [B K m, n]."""
    m, total, _ = partials
    pairs = step.batch * step.num_kv_heads
    width = max(SLAB, next_power_of_two(step.num_blocks))
    importance = launch(
        functools.partial(_importance_kernel, step=step),
        out_shape=jax.ShapeDtypeStruct((pairs * step.num_queries, width), jnp.float32),
        grid=(pl.cdiv(step.num_blocks, SLAB), pairs, step.num_queries),
        num_warps=4,
        num_stages=1,
        interpret=step.interpret,
        name="decode_attention_importance",
    )(m, total, scores, offsets)
    return launch(
        functools.partial(_choose_kernel, step=step),
        out_shape=jax.ShapeDtypeStruct((pairs * step.num_queries, step.num_selected), jnp.int32),
        grid=(step.num_queries, pairs),
        num_warps=min(8, max(1, width // 1024)),  # in one warp the maximum needs no barrier
        num_stages=1,
        interpret=step.interpret,
        name="decode_attention_choose",
    )(importance, offsets)


def _selected_kernel(q_ref, k_ref, v_ref, indices_ref, offset_ref, table_ref, m_ref, total_ref, acc_ref, *, step: Step):
    split, bk, query = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    Dk, Dv, s = q_ref.shape[-1], v_ref.shape[-1], step.select_block
    b, kv_head = lax.div(bk, jnp.int32(step.num_kv_heads)), lax.rem(bk, jnp.int32(step.num_kv_heads))
    g = jnp.arange(max(LEAST_ROWS, step.padded_group), dtype=jnp.int32)
    row, valid = _rows(b, kv_head, query, g, step)
    position = offset_ref[b] + query
    padded_block = next_power_of_two(s)
    key = split * step.tiling.num_keys + jnp.arange(step.tiling.num_keys, dtype=jnp.int32)
    place, inner = lax.div(key, jnp.int32(padded_block)), lax.rem(key, jnp.int32(padded_block))
    at = indices_ref.at[bk * step.num_queries + query, place]
    block = plgpu.load(at, mask=place < step.num_selected, other=-1)
    visible = (block >= 0) & (inner < s) & (block * s + inner <= position)
    page = plgpu.load(table_ref.at[b, jnp.maximum(block, 0)], mask=visible, other=0)
    at = (jnp.maximum(page, 0) * step.num_kv_heads + kv_head) * s + inner
    q = load_rows(q_ref, (), row, None, Dk, valid)
    k = load_rows(k_ref, (), at, None, Dk, visible)
    v = load_rows(v_ref, (), at, None, Dv, visible)
    carry = _attend(_nothing(g.shape[0], Dv), dot_pieces(q, k), visible[None, :], v, step)
    _store_partials((m_ref, total_ref, acc_ref), split, row, valid, *carry)


def _selected_partials(q, k, v, indices, offsets, tables, step: Step):
    """Partial sums of the selected blocks."""
    return launch(
        functools.partial(_selected_kernel, step=step),
        out_shape=_partials_shape(step.selected_splits, v.shape[-1], step),
        grid=(step.selected_splits, step.batch * step.num_kv_heads, step.num_queries),
        num_warps=step.tiling.num_warps,
        num_stages=1,
        interpret=step.interpret,
        name="decode_attention_selected",
    )(q, k, v, indices, offsets, tables)


def _join_kernel(
    m_ref, total_ref, acc_ref, slc_m_ref, slc_total_ref, slc_acc_ref, gate_ref, offset_ref, o_ref, *, step: Step
):
    row = pl.program_id(0)
    b = lax.div(row, jnp.int32(step.num_queries * step.num_heads))
    position = offset_ref[b] + lax.rem(lax.div(row, jnp.int32(step.num_heads)), jnp.int32(step.num_queries))
    Dv, c = o_ref.shape[-1], step.scale * LOG2_E

    def joined(refs, first, count, written, gate):
        m_ref, total_ref, acc_ref = refs
        split = jnp.arange(next_power_of_two(count), dtype=jnp.int32)
        there = (split < count) & written(split)
        at = first + split
        m = plgpu.load(m_ref.at[at, row], mask=there, other=LEAST)
        total = plgpu.load(total_ref.at[at, row], mask=there, other=0)
        weight = exp2((m - jnp.max(m)) * c, step.interpret)
        total = jnp.sum(total * weight)
        gate = jnp.where(total > 0, gate_ref[row, gate].astype(jnp.float32) / jnp.where(total > 0, total, 1), 0)
        pieces = load_rows(acc_ref, (), at, row, Dv, there)
        return tuple(jnp.sum(piece * (weight * gate)[:, None], axis=0) for piece in pieces)

    first, second = (m_ref, total_ref, acc_ref), (slc_m_ref, slc_total_ref, slc_acc_ref)
    seen = step.visible(position)
    branches = (
        joined(first, 0, step.compressed_splits, lambda split: split * step.tiling.chunk < seen, 0),
        joined(second, 0, step.selected_splits, lambda split: split >= 0, 1),
        joined(first, step.compressed_splits, step.window_splits, lambda split: split >= 0, 2),
    )
    pieces = tuple((x + y + z)[None, :] for x, y, z in zip(*branches, strict=True))
    one = jnp.zeros((1,), jnp.int32)
    store_rows(o_ref, (), row + one, None, Dv, pieces, one == 0)


def _join(first, second, gates, offsets, dtype, step: Step):
    """The gated sum of the branches, [rows, Dv]."""
    rows, Dv = first[2].shape[1:]
    return launch(
        functools.partial(_join_kernel, step=step),
        out_shape=jax.ShapeDtypeStruct((rows, Dv), dtype),
        grid=(rows,),
        num_warps=2,
        num_stages=1,
        interpret=step.interpret,
        name="decode_attention_join",
    )(*first, *second, gates, offsets)
