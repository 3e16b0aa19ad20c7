"""Choice of the blocks that each query reads (arXiv 2502.11089, equations 8 to 12).

With p[h, t, i] = exp(scale q[t, h] . k[i, k] - lse[h, t]) over the compressed tokens i that the query at position t
sees (see `pallas_kernels.compressed_attention.contract`), block j has importance

    imp[k, t, j] = sum over the heads h of group k and over i of c(i, j) p[h, t, i]

where c(i, j) counts the chunks of d tokens that compressed token i and block j share. Candidates are the blocks
segment_starts // s <= j <= t // s. The first `num_init` of them and the last `num_local` are taken, then those of
highest importance, equal ones in order of index, until `num_selected` are taken or none is left. Without
`select_in_window`, these others are of the candidates that begin before the window, j s <= t - w. The result is
ascending, with -1 in the places left over. It carries no gradient.

Sizes read: all; of them w without `select_in_window` alone.
"""

from typing import Protocol

from jaxtyping import Array, Float, Int

from pallas_kernels.contract import Sizes


class Select(Protocol):
    """The n blocks of highest importance, per query and key/value head."""

    def __call__(
        self,
        q: Float[Array, "B Tq H Dk"],
        k: Float[Array, "B Nc K Dk"],
        lse: Float[Array, "B H Tq"],
        segment_starts: Int[Array, "B Tq"] | None,
        query_offset: int | Int[Array, ""],
        *,
        config: Sizes,
        scale: float,
    ) -> Int[Array, "B K Tq n"]:
        """Int32 block indices. A `query_offset` that is an int lets early queries use smaller kernels."""
