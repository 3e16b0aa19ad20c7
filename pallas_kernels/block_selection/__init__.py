"""Choice of the blocks that each query reads (arXiv 2502.11089, equations 8 to 12).

Contract, the same for every backend. With p[h, t, i] = exp(scale q[t, h] . k[i, K] - lse[h, t]) over the compressed
tokens i that the query at position t = query_offset + row sees (see `compressed_attention`), block j has importance

    imp[K, t, j] = sum over the heads h of group K and over i of c(i, j) p[h, t, i]

where c(i, j) counts the chunks of d tokens that compressed token i and block j share. Candidates are the blocks
starts // s <= j <= t // s. The first `num_init` of them and the last `num_local` are taken, then those of highest
importance, equal ones in order of index, until `num_selected` are taken or none is left. The result is ascending, with
-1 in the places left over. It carries no gradient.
"""

from pallas_kernels.block_selection.triton import select_blocks

__all__ = ["select_blocks"]
