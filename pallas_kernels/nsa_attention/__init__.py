"""The whole of Native Sparse Attention: three branches, selection, gated sum (arXiv 2502.11089, equation 5).

Contract of every backend:

    nsa_attention(q [B, Tq, H, Dk], cmp_k [B, Nc, K, Dk], cmp_v [B, Nc, K, Dv], slc_k, win_k [B, T, K, Dk], slc_v,
                  win_v [B, T, K, Dv], gates [B, Tq, H, 3], starts, query_offset, block_indices=None,
                  window_place=None, *, <sizes>, scale, interpret=False)
        -> o [B, Tq, H, Dv]

o = g0 o_cmp + g1 o_slc + g2 o_win, where the branches are those of `compressed_attention`, `selected_attention` over
what `block_selection` chooses, or over `block_indices` [B, K, Tq, n] where they are given, and `window_attention`. Nc
is at least 1. Where the window's keys are others than the T selected from, `window_place` is the (starts, query_offset)
of the queries among them. Differentiable in everything but starts, query_offset, block_indices and window_place.
Residuals are the inputs, the branches' outputs, their lse and the indices. The backward pass is deterministic; it gates
the cotangent inside the branches' kernels and lets each branch add to the one before's dq, so that neither a gated
cotangent nor three gradients of q are ever in memory.
"""

from pallas_kernels.nsa_attention.triton import nsa_attention

__all__ = ["nsa_attention"]
