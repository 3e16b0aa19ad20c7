"""Native Sparse Attention of the newest few tokens of each row, over a paged cache: one decoding step.

Query r of row b stands at position t = query_offsets[b] + r. Block j of row b (tokens j s .. (j + 1) s - 1, and the
compressed tokens that start there) lies in page block_tables[b, j] of the pools, and position p of its window in slot
p mod W of the ring, W >= window + m - 1. The query sees compressed tokens i with i d + l - 1 <= t, the tokens <= t of
the num_selected blocks of highest importance, and positions t - window + 1 .. t. Gates are of any float dtype, in the
order compressed, selected, window. A pool may be `Quantized`.

Row b holds lengths[b] tokens, those of its queries included. Places from there on and pages of other rows may hold
anything, NaN included, and block_tables[b, j] matters only for j < ceil(lengths[b] / s). Where lengths[b] <
query_offsets[b] + m, the results of the queries from lengths[b] on are finite and mean nothing.
Softmax statistics are float32, block_indices ascend and end in -1 where there are fewer candidates. Not differentiable.

Sizes read: all.
"""

from typing import Protocol

from jaxtyping import Array, Float, Int

from pallas_kernels.contract import Sizes
from pallas_kernels.quantized import Quantized, head_bytes


class Decode(Protocol):
    """All branches of a few queries of each row over a cache."""

    def __call__(
        self,
        q: Float[Array, "B m H Dk"],
        cmp_k: Float[Array, "P K s/d Dk"] | Quantized,
        cmp_v: Float[Array, "P K s/d Dv"] | Quantized,
        slc_k: Float[Array, "P K s Dk"] | Quantized,
        slc_v: Float[Array, "P K s Dv"] | Quantized,
        win_k: Float[Array, "B W K Dk"],
        win_v: Float[Array, "B W K Dv"],
        gates: Float[Array, "B m H 3"],
        query_offsets: Int[Array, " B"],
        lengths: Int[Array, " B"],
        block_tables: Int[Array, "B N"],
        *,
        config: Sizes,
        scale: float,
    ) -> tuple[Float[Array, "B m H Dv"], Int[Array, "B K m n"]]:
        """(o in q's dtype, block_indices int32)."""


def bytes_read(
    T: int,
    config: Sizes,
    *,
    num_kv_heads: int,
    head_dim: int,
    v_head_dim: int,
    itemsize: int,
    dense: bool = False,
    quantized: bool = False,
) -> int:
    """Bytes of keys and values that one step of one row must read from a cache of T tokens.

    Every compressed token, `num_selected` blocks and the window, or all that there is where the cache is shorter;
    dense attention reads all T tokens. If the pools are `quantized`, the window is still of items of `itemsize`.
    """
    exact = (head_dim + v_head_dim) * itemsize
    if dense:
        return num_kv_heads * T * exact
    compressed = max(0, (T - config.compress_block) // config.compress_stride + 1)
    paged = compressed + min(T, config.num_selected * config.select_block)
    of_pages = head_bytes(head_dim) + head_bytes(v_head_dim) if quantized else exact
    return num_kv_heads * (paged * of_pages + min(T, config.window) * exact)
