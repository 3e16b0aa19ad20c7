"""Sliding window attention: softmax over the last `window` positions, the query's own included.

Contract of every backend:

    window_attention(q [B, Tq, H, Dk], k [B, T, K, Dk], v [B, T, K, Dv], starts, query_offset, *, window, scale,
                     interpret=False) -> o [B, Tq, H, Dv]

Row r of q stands at position t = query_offset + r, and query_offset is an int or an int32 scalar array. It sees
positions max(t - window + 1, starts) .. t, where starts (int32 [B, Tq], never decreasing along Tq, or None for zeros)
is the first token of its segment. A query that sees nothing gets zeros, and zero gradients.

o has q's dtype, softmax statistics are float32. Differentiable in q, k and v. Residuals are the inputs, the output and
the lse. The backward pass is deterministic. Arguments that a backend does not support raise NotImplementedError.
"""

from pallas_kernels.window_attention.triton import window_attention

__all__ = ["window_attention"]
