"""Selected attention: softmax over the tokens of the blocks that each query selected.

Contract of every backend:

    selected_attention(q [B, Tq, H, Dk], k [B, T, K, Dk], v [B, T, K, Dv], block_indices [B, K, Tq, n], starts,
                       query_offset, *, select_block, scale, interpret=False) -> o [B, Tq, H, Dv]

Row r of q stands at position query_offset + r, and query_offset is an int or an int32 scalar array. The G = H / K heads
of a group share the selection. block_indices are int32, ascending, without duplicates, -1 at the end where fewer than n
blocks are selected, and none lies past the query's own block. A query sees the tokens of its blocks at positions
starts .. its own, where starts (int32 [B, Tq] or None for zeros) is the first token of its segment. A query that sees
nothing gets zeros, and zero gradients.

o has q's dtype, softmax statistics are float32. Differentiable in q, k and v; the indices carry no gradient. Residuals
are the inputs, the output and the lse. The backward pass is deterministic. Arguments that a backend does not support
raise NotImplementedError.
"""

from pallas_kernels.selected_attention.triton import selected_attention

__all__ = ["selected_attention"]
