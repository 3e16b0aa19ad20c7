"""Sliding window attention through Pallas Triton: the forward kernel.

The heads of a group are packed into the rows of a tile: 128 rows are then few queries, whose windows differ by few
keys, so that little of a tile's work falls outside the band.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.contract import Sizes
from pallas_kernels.tiles import (
    LEAST,
    LOG2_E,
    accumulate,
    dot_pieces,
    launch,
    load_rows,
    next_power_of_two,
    softmax_finish,
    softmax_step,
    store_rows,
    zeros,
)
from pallas_kernels.triton.problem import check_supported, heads_first, offset_array
from pallas_kernels.window_attention.triton_backward import key_band


@dataclasses.dataclass(frozen=True)
class ForwardTile:
    """One program's work: `num_rows` rows (query x head) of one K/V head, `num_keys` keys at a time."""

    num_rows: int
    num_keys: int
    num_warps: int
    num_stages: int


def forward_tile(head_dim: int, itemsize: int) -> ForwardTile:
    """The tile for the larger head size `head_dim` and elements of `itemsize` bytes."""
    if itemsize == 4:
        return ForwardTile(64, 32, 4, 1)
    if head_dim > 128:
        return ForwardTile(128, 64, 8, 2)
    return ForwardTile(128, 64, 4, 2)  # H100, G = 16, D = 128, 64k: 3.39 ms, with 8 warps 4.8.


def _forward_kernel(
    q_ref,
    k_ref,
    v_ref,
    offset_ref,
    starts_ref,
    o_ref,
    lse_ref,
    *,
    num_rows: int,
    num_keys: int,
    padded_group: int,
    window: int,
    scale: float,
    interpret: bool,
):
    tile, bk = pl.program_id(0), pl.program_id(1)
    (_, Tq, H, Dk), (_, T, K, Dv) = q_ref.shape, v_ref.shape
    G, num_queries = H // K, num_rows // padded_group
    b, kv_head = lax.div(bk, jnp.int32(K)), lax.rem(bk, jnp.int32(K))
    row = jnp.arange(num_rows, dtype=jnp.int32)
    t = tile * num_queries + lax.div(row, jnp.int32(padded_group))
    g = lax.rem(row, jnp.int32(padded_group))
    valid = (t < Tq) & (g < G)
    head = jnp.where(g < G, kv_head * G + g, H)
    position = offset_ref[0] + t
    lowest = jnp.maximum(position - window + 1, 0)
    segment = jnp.int32(0)
    if starts_ref is not None:
        lowest = jnp.maximum(lowest, plgpu.load(starts_ref.at[b, t], mask=t < Tq, other=0))
        segment = starts_ref[b, tile * num_queries]
    first, tiles, inner, outer = key_band(
        offset_ref[0] + tile * num_queries, num_queries, segment, T, window=window, num_keys=num_keys
    )
    q = load_rows(q_ref, (b,), t, head, Dk, valid)
    key = jnp.arange(num_keys, dtype=jnp.int32)

    def step(i, carry, *, edge):
        m, total, acc = carry
        key_position = first + i * num_keys + key
        in_bounds = key_position < T if edge else None
        s = dot_pieces(q, load_rows(k_ref, (b,), key_position, kv_head, Dk, in_bounds))
        if edge:
            s = jnp.where(key_position[None, :] <= position[:, None], s, -jnp.inf)
        if edge or starts_ref is not None:
            s = jnp.where(key_position[None, :] >= lowest[:, None], s, -jnp.inf)
        p, m, total, decay = softmax_step(s, m, total, scale * LOG2_E, interpret)
        return m, total, accumulate(acc, p, load_rows(v_ref, (b,), key_position, kv_head, Dv, in_bounds), decay)

    edge, middle = functools.partial(step, edge=True), functools.partial(step, edge=False)
    carry = (jnp.full((num_rows,), LEAST, jnp.float32), jnp.zeros((num_rows,), jnp.float32), zeros(num_rows, Dv))
    carry = lax.fori_loop(0, inner, edge, carry)
    carry = lax.fori_loop(inner, outer, middle, carry)
    m, total, acc = lax.fori_loop(outer, tiles, edge, carry)
    o, lse = softmax_finish(m, total, acc, scale)
    store_rows(o_ref, (b,), t, head, Dv, o, valid)
    plgpu.store(lse_ref.at[bk, t, jnp.where(g < G, g, G)], lse, mask=valid)


def forward(
    q: Float[Array, "B Tq H Dk"],
    k: Float[Array, "B T K Dk"],
    v: Float[Array, "B T K Dv"],
    segment_starts: Int[Array, "B Tq"] | None,
    query_offset: int | Int[Array, ""],
    *,
    config: Sizes,
    scale: float,
    interpret: bool = False,
    tile: ForwardTile | None = None,
) -> tuple[Float[Array, "B Tq H Dv"], Float[Array, "B H Tq"]]:
    """(o, lse); see the contract. `tile` overrides the table, for tests and tuning.

    Raises:
      NotImplementedError: a dtype, head size, group size or scale that the kernels do not support.
    """
    check_supported(q, k, v, scale=scale)
    tile = tile or forward_tile(max(q.shape[-1], v.shape[-1]), q.dtype.itemsize)
    (B, Tq, H, _), (_, _, K, Dv) = q.shape, v.shape
    padded_group = next_power_of_two(H // K)
    num_rows = max(tile.num_rows, padded_group)
    kernel = functools.partial(
        _forward_kernel,
        num_rows=num_rows,
        num_keys=tile.num_keys,
        padded_group=padded_group,
        window=config.window,
        scale=float(scale),
        interpret=interpret,
    )
    o, lse = launch(
        kernel,
        out_shape=(
            jax.ShapeDtypeStruct((B, Tq, H, Dv), q.dtype),
            jax.ShapeDtypeStruct((B * K, Tq, H // K), jnp.float32),
        ),
        grid=(pl.cdiv(Tq, num_rows // padded_group), B * K),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        interpret=interpret,
        name="window_attention_forward",
    )(q, k, v, offset_array(query_offset), segment_starts)
    return o, heads_first(lse, K)
