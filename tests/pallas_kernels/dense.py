"""The ops of `pallas_kernels` as plain masked jnp in float32: what the kernels must compute, quadratic in memory."""

import jax
import jax.numpy as jnp
import numpy as np


def relative_error(actual, expected):
    """Normwise: |actual - expected| / |expected|; NaN where either holds one."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(actual - expected) / max(np.linalg.norm(expected), 1e-30)


def on_cpu(tree):
    """Moves arrays to the CPU, where the reference compiles sooner: a GPU's float32 products are tuned for a minute."""
    return jax.device_put(tree, jax.devices("cpu")[0])


def positions(num_queries, query_offset):
    return query_offset + jnp.arange(num_queries, dtype=jnp.int32)


def starts_of(starts, batch, num_queries):
    return jnp.zeros((batch, num_queries), jnp.int32) if starts is None else starts


def compressed_mask(starts, num_keys, query_offset, *, compress_block, compress_stride):
    """Bool [B, Tq, Nc]: i d >= starts and i d + l - 1 <= t."""
    first = jnp.arange(num_keys, dtype=jnp.int32)[None, None] * compress_stride
    t = positions(starts.shape[1], query_offset)[None, :, None]
    return (first >= starts[:, :, None]) & (first + compress_block - 1 <= t)


def scores(q, k, scale):
    """Float32 [B, K, G, Tq, N] of q [B, Tq, H, D] and k [B, N, K, D]."""
    B, Tq, H, D = q.shape
    K = k.shape[2]
    packed = q.astype(jnp.float32).reshape(B, Tq, K, H // K, D)
    return scale * jnp.einsum("btkgd,bskd->bkgts", packed, k.astype(jnp.float32), precision="highest")


def attend(s, v, mask):
    """Masked softmax of s [B, K, G, Tq, N] over v [B, N, K, Dv]: o [B, Tq, H, Dv] and lse [B, H, Tq]."""
    B, K, G, Tq, _ = s.shape
    s = jnp.where(mask, s, -jnp.inf)
    top = jax.lax.stop_gradient(jnp.max(s, axis=-1, keepdims=True))
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    e = jnp.where(mask, jnp.exp(jnp.where(mask, s, 0.0) - top), 0.0)
    total = jnp.sum(e, axis=-1, keepdims=True)
    seen = total > 0
    p = e / jnp.where(seen, total, 1.0)
    lse = jnp.where(seen, top + jnp.log(jnp.where(seen, total, 1.0)), -jnp.inf)
    o = jnp.einsum("bkgts,bskd->btkgd", p, v.astype(jnp.float32), precision="highest")
    return o.reshape(B, Tq, K * G, v.shape[3]), lse[..., 0].reshape(B, K * G, Tq)


def compressed_attention(q, k, v, starts, query_offset, *, compress_block, compress_stride, scale):
    """(o [B, Tq, H, Dv], lse [B, H, Tq]), float32."""
    starts = starts_of(starts, q.shape[0], q.shape[1])
    mask = compressed_mask(
        starts, k.shape[1], query_offset, compress_block=compress_block, compress_stride=compress_stride
    )
    return attend(scores(q, k, scale), v, mask[:, None, None])


def block_importance(
    q, k, starts, query_offset, num_blocks, *, compress_block, compress_stride, select_block, scale, lse=None
):
    """Float32 [B, K, Tq, Nb]: sum over the group and over i of c(i, j) p[h, t, i]."""
    B, Tq, _, _ = q.shape
    Nc, K = k.shape[1], k.shape[2]
    starts = starts_of(starts, B, Tq)
    mask = compressed_mask(starts, Nc, query_offset, compress_block=compress_block, compress_stride=compress_stride)
    mask = mask[:, None, None]
    s = scores(q, k, scale)
    if lse is None:
        _, lse = attend(s, jnp.zeros((B, Nc, K, 1)), mask)
    lse = lse.reshape(B, K, -1, Tq)[..., None]
    p = jnp.where(mask, jnp.exp(jnp.where(mask, s - lse, 0.0)), 0.0).sum(axis=2)
    chunk = np.arange(Nc)[:, None] * compress_stride + np.arange(0, compress_block, compress_stride)[None]
    weights = np.zeros((Nc, num_blocks), np.float32)
    for i in range(Nc):
        for token in chunk[i]:
            if token // select_block < num_blocks:
                weights[i, token // select_block] += 1
    return jnp.einsum("bkti,ij->bktj", p, weights, precision="highest")


def select_from_importance(importance, starts, query_offset, *, select_block, num_selected, num_init, num_local):
    """NumPy int32 [B, K, Tq, n] by sorting every query's candidates: forced first, then importance, then index."""
    importance = np.asarray(importance)
    B, K, Tq, Nb = importance.shape
    starts = np.asarray(starts_of(starts, B, Tq))
    out = np.full((B, K, Tq, num_selected), -1, np.int32)
    for b, k, t in np.ndindex(B, K, Tq):
        first, last = starts[b, t] // select_block, (int(query_offset) + t) // select_block
        blocks = np.arange(first, min(last + 1, Nb))
        forced = (blocks < first + num_init) | (blocks > last - num_local)
        order = np.lexsort((blocks, -importance[b, k, t, blocks], ~forced))
        chosen = np.sort(blocks[order[:num_selected]])
        out[b, k, t, : len(chosen)] = chosen
    return out


def token_mask(starts, num_keys, query_offset):
    """Bool [B, Tq, T]: starts <= position <= t."""
    position = jnp.arange(num_keys, dtype=jnp.int32)[None, None]
    t = positions(starts.shape[1], query_offset)[None, :, None]
    return (position >= starts[:, :, None]) & (position <= t)


def selected_attention(q, k, v, block_indices, starts, query_offset, *, select_block, scale):
    """o [B, Tq, H, Dv], float32."""
    starts = starts_of(starts, q.shape[0], q.shape[1])
    T = k.shape[1]
    block = jnp.arange(T, dtype=jnp.int32) // select_block
    chosen = (block_indices[..., None] == block[None, None, None, None]).any(axis=3)
    mask = chosen & token_mask(starts, T, query_offset)[:, None]
    return attend(scores(q, k, scale), v, mask[:, :, None])[0]


def window_attention(q, k, v, starts, query_offset, *, window, scale):
    """o [B, Tq, H, Dv], float32."""
    starts = starts_of(starts, q.shape[0], q.shape[1])
    T = k.shape[1]
    t = positions(starts.shape[1], query_offset)[None, :, None]
    inside = jnp.arange(T, dtype=jnp.int32)[None, None] > t - window
    mask = token_mask(starts, T, query_offset) & inside
    return attend(scores(q, k, scale), v, mask[:, None, None])[0]
