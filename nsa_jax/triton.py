"""The Pallas Triton kernels behind the common interface. Interpreted where there is no GPU.

float64 is refused: the kernels compute softmax statistics in float32.
"""

import jax
import jax.numpy as jnp

from nsa_jax.attention import on_gpu
from nsa_jax.config import NSAConfig
from pallas_kernels import block_selection
from pallas_kernels import compressed_attention as compressed
from pallas_kernels import decode_attention as decode
from pallas_kernels import nsa_attention as nsa
from pallas_kernels import selected_attention as selected
from pallas_kernels import window_attention as window


def nsa_attention(q, kv, gates, place, window_place, *, config: NSAConfig, scale: float):
    """All branches and their gated sum in one differentiable op: o [B, T, H, Dv]."""
    return nsa.nsa_attention(
        q,
        kv.cmp_k,
        kv.cmp_v,
        kv.slc_k,
        kv.slc_v,
        kv.win_k,
        kv.win_v,
        gates,
        place.starts,
        place.query_offset,
        window_place=window_place,
        compress_block=config.compress_block,
        compress_stride=config.compress_stride,
        select_block=config.select_block,
        num_selected=config.num_selected,
        num_init=config.num_init,
        num_local=config.num_local,
        window=config.window,
        scale=scale,
        interpret=_interpret(q),
    )


def compressed_attention(q, k, v, starts, query_offset, *, config: NSAConfig, scale: float):
    """Attention to the compressed tokens: (o [B, T, H, Dv], lse [B, H, T])."""
    return compressed.compressed_attention(
        q,
        k,
        v,
        starts,
        query_offset,
        compress_block=config.compress_block,
        compress_stride=config.compress_stride,
        scale=scale,
        interpret=_interpret(q),
    )


def select_blocks(q, k, lse, starts, query_offset, *, config: NSAConfig, scale: float):
    """The n blocks of highest importance (equations 8 to 12)."""
    return block_selection.select_blocks(
        q,
        k,
        lse,
        starts,
        query_offset,
        compress_block=config.compress_block,
        compress_stride=config.compress_stride,
        select_block=config.select_block,
        num_selected=config.num_selected,
        num_init=config.num_init,
        num_local=config.num_local,
        scale=scale,
        interpret=_interpret(q),
    )


def selected_attention(q, k, v, block_indices, starts, query_offset, *, config: NSAConfig, scale: float):
    """Attention to the tokens of the selected blocks up to the query's own: o [B, T, H, Dv]."""
    return selected.selected_attention(
        q,
        k,
        v,
        block_indices,
        starts,
        query_offset,
        select_block=config.select_block,
        scale=scale,
        interpret=_interpret(q),
    )


def window_attention(q, k, v, starts, query_offset, *, config: NSAConfig, scale: float):
    """Attention to positions t - w + 1 .. t: o [B, T, H, Dv]."""
    return window.window_attention(
        q, k, v, starts, query_offset, window=config.window, scale=scale, interpret=_interpret(q)
    )


def decode_attention(
    q, cmp_k, cmp_v, slc_k, slc_v, win_k, win_v, gates, query_offsets, block_tables, *, config: NSAConfig, scale: float
):
    """All branches of a few queries of each row over a cache: (o [B, m, H, Dv], block_indices [B, K, m, n])."""
    return decode.decode_attention(
        q,
        cmp_k,
        cmp_v,
        slc_k,
        slc_v,
        win_k,
        win_v,
        gates,
        query_offsets,
        block_tables,
        compress_block=config.compress_block,
        compress_stride=config.compress_stride,
        select_block=config.select_block,
        num_selected=config.num_selected,
        num_init=config.num_init,
        num_local=config.num_local,
        window=config.window,
        scale=scale,
        interpret=_interpret(q),
    )


def _interpret(q: jax.Array) -> bool:
    if q.dtype == jnp.float64:
        raise NotImplementedError("implementation = 'triton': float64 is not supported")
    return not on_gpu()
