"""Native Sparse Attention of the newest few tokens of each row, over a paged cache: one decoding step.

Contract of every backend:

    decode_attention(q [B, m, H, Dk], cmp_k [P, K, s / d, Dk], cmp_v [P, K, s / d, Dv], slc_k [P, K, s, Dk],
                     slc_v [P, K, s, Dv], win_k [B, W, K, Dk], win_v [B, W, K, Dv], gates [B, m, H, 3], query_offsets,
                     block_tables, *, compress_block, compress_stride, select_block, num_selected, num_init, num_local,
                     window, scale, interpret=False) -> (o [B, m, H, Dv], block_indices int32 [B, K, m, n])

Query r of row b stands at position t = query_offsets[b] + r. Block j of row b (tokens j s .. (j + 1) s - 1, and the
compressed tokens that start there) lies in page block_tables[b, j] (int32 [B, N]) of the pools, and position p of its
window in slot p mod W of the ring, W >= window + m - 1. The query sees compressed tokens i with i d + l - 1 <= t, the
tokens <= t of the num_selected blocks of highest importance, and positions t - window + 1 .. t. Gates are of any float
dtype, in the order compressed, selected, window.

What lies beyond t may hold anything finite, and block_tables[b, j] is read only for j <= t // s. o has q's dtype,
softmax statistics are float32, block_indices ascend and end in -1 where there are fewer candidates. Not differentiable.
Arguments that a backend does not support raise NotImplementedError.
"""

from pallas_kernels.decode_attention.triton import decode_attention

__all__ = ["decode_attention"]
