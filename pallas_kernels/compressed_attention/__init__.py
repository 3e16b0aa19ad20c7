"""Attention over compressed tokens (arXiv 2502.11089, section 3.3.1), forward and backward.

Contract, the same for every backend. A query of group k at position t = query_offset + row sees compressed token i,
which stands for tokens [i d, i d + l), iff i d >= starts[row] and i d + l - 1 <= t:

    o[t, h]   = sum_i p[h, t, i] v[i, k]
    lse[h, t] = log sum_i exp(scale q[t, h] . k[i, k])        float32, natural logarithm
    p[h, t, i] = exp(scale q[t, h] . k[i, k] - lse[h, t])

over the visible i. A query that sees none gets o = 0, lse = -inf and zero gradients. Both o and lse carry gradients to
q, k and v. Results are the same bits from run to run.
"""

from pallas_kernels.compressed_attention.triton import compressed_attention

__all__ = ["compressed_attention"]
