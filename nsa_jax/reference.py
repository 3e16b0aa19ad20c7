"""The oracle: every op from its equation, with plain masks, in float32 or float64. Memory is quadratic in T.

Every implementation module (this one, `xla`, `triton`, `mosaic`) has the same four functions with the same arguments:
`starts` is int32 [B, Tq] (see `nsa_jax.visibility`) or None without segments, `query_offset` an int or int32 scalar.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from nsa_jax.config import NSAConfig
from nsa_jax.visibility import (
    blocks_scored,
    choose_blocks,
    compressed_visible,
    pool_importance,
    starts_or_zeros,
)

HIGHEST = jax.lax.Precision.HIGHEST


def compressed_attention(q, k, v, starts, query_offset, *, config: NSAConfig, scale: float):
    """Attention to the compressed tokens: (o [B, T, H, Dv], lse [B, H, T])."""
    starts = starts_or_zeros(starts, q)
    positions = _positions(q, query_offset)
    visible = compressed_visible(positions, starts, k.shape[1], config)
    return masked_attention(q, k, v, visible[:, None], scale)


def select_blocks(q, k, lse, starts, query_offset, *, config: NSAConfig, scale: float) -> Int[Array, "B K T n"]:
    """The n blocks of highest importance (equations 11 and 12)."""
    starts = starts_or_zeros(starts, q)
    importance = block_importance(q, k, lse, starts, query_offset, config=config, scale=scale)
    return choose_blocks(importance, _positions(q, query_offset), starts, config)


def block_importance(q, k, lse, starts, query_offset, *, config: NSAConfig, scale: float) -> Float[Array, "B K T Nb"]:
    """Importance of every block, before any is forced or ruled out (equations 8 to 10)."""
    starts = starts_or_zeros(starts, q)
    B, T, H, _ = q.shape
    _, Nc, K, _ = k.shape
    visible = compressed_visible(_positions(q, query_offset), starts, Nc, config)[:, None, None]
    lse = lse.reshape(B, K, H // K, T, 1)
    p = jnp.exp(jnp.where(visible, _logits(q, k, scale) - jnp.where(visible, lse, 0), -jnp.inf))
    return pool_importance(p.sum(axis=2), blocks_scored(Nc, config), config)


def selected_attention(q, k, v, block_indices, starts, query_offset, *, config: NSAConfig, scale: float):
    """Attention to the tokens of the selected blocks up to the query's own: o [B, T, H, Dv]."""
    starts = starts_or_zeros(starts, q)
    positions = _positions(q, query_offset)
    key = jnp.arange(k.shape[1], dtype=jnp.int32)
    visible = _causal(positions, starts, key)[:, None]
    chosen = jnp.any(block_indices[..., None] == (key // config.select_block)[None, None, None, None, :], axis=3)
    return masked_attention(q, k, v, visible & chosen, scale)[0]


def window_attention(q, k, v, starts, query_offset, *, config: NSAConfig, scale: float):
    """Attention to positions t - w + 1 .. t: o [B, T, H, Dv]."""
    starts = starts_or_zeros(starts, q)
    positions = _positions(q, query_offset)
    key = jnp.arange(k.shape[1], dtype=jnp.int32)
    near = key[None, :] > positions[:, None] - config.window
    return masked_attention(q, k, v, (_causal(positions, starts, key) & near[None])[:, None], scale)[0]


def masked_attention(
    q: Float[Array, "B T H Dk"],
    k: Float[Array, "B S K Dk"],
    v: Float[Array, "B S K Dv"],
    mask: Bool[Array, "B #K T S"],
    scale: float,
) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B H T"]]:
    """Softmax attention under a mask, and the natural logarithm of the softmax's sum.

    A row whose mask is empty gives output 0 and lse = -inf, with zero gradients.
    """
    B, T, H, _ = q.shape
    mask = mask[:, :, None]
    logits = jnp.where(mask, _logits(q, k, scale), -jnp.inf)
    highest = jnp.max(logits, axis=-1, keepdims=True, initial=-jnp.inf)
    highest = jax.lax.stop_gradient(jnp.where(jnp.isfinite(highest), highest, 0))
    p = jnp.exp(logits - highest)
    total = p.sum(axis=-1, keepdims=True)
    empty = total == 0
    safe = jnp.where(empty, 1, total)
    o = jnp.einsum("bkgts,bskd->btkgd", p / safe, v.astype(p.dtype), precision=HIGHEST)
    lse = jnp.where(empty, -jnp.inf, jnp.log(safe) + highest)
    return o.reshape(B, T, H, v.shape[-1]).astype(q.dtype), lse.reshape(B, H, T)


def _logits(q, k, scale) -> Float[Array, "B K G T S"]:
    """Scaled scores, at least in float32."""
    B, T, H, D = q.shape
    K = k.shape[2]
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    q = q.astype(dtype).reshape(B, T, K, H // K, D)
    return jnp.einsum("btkgd,bskd->bkgts", q, k.astype(dtype), precision=HIGHEST) * scale


def _positions(q, query_offset) -> Int[Array, " T"]:
    return query_offset + jnp.arange(q.shape[1], dtype=jnp.int32)


def _causal(positions, starts, key) -> Bool[Array, "B T S"]:
    """Keys of the query's segment up to its own position."""
    return (key[None, None, :] <= positions[None, :, None]) & (key[None, None, :] >= starts[:, :, None])
