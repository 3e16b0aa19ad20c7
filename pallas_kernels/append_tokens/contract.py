"""The newest few tokens of each row, and the compressed tokens that they finish, written into a paged cache.

Row b holds lengths[b] tokens. Its first num_tokens[b] new ones, of m, go to positions lengths[b] and on; of the others,
nothing is kept. Position p of a row lies in

* page block_tables[b, p // s] of `slc_k` and `slc_v`, at place p mod s, for which `selected_k` and `selected_v` are;
* slot p mod R of the rings `tail_k` and `tail_v` (R >= l + m - 1), for which `pooled_k` and `pooled_v` are;
* slot p mod W of the rings `win_k` and `win_v` (W >= window + m - 1), for which `window_k` and `window_v` are.

Compressed token i, which starts at position i d, lies in page block_tables[b, i d // s], at place i d mod s over d. It
is finished if i d + l <= lengths[b] + num_tokens[b]. Those that the new tokens finish are written: the entries of
`finished_k` and `finished_v`, of which the first is the next that the row finishes; or, where these are None, the means
of tokens in the tail and of new ones, summed in float32 at least.

What would lie in no page (-1, or beyond the table) is dropped. All other places keep what they hold. Not
differentiable.

Sizes read: compress_block, compress_stride, select_block and window.
"""

from typing import NamedTuple, Protocol

from jaxtyping import Array, Float, Int

from pallas_kernels.contract import Sizes


class Places(NamedTuple):
    """The arrays of a cache that hold keys and values."""

    slc_k: Float[Array, "P K s Dk"]
    slc_v: Float[Array, "P K s Dv"]
    cmp_k: Float[Array, "P K s/d Dk"]
    cmp_v: Float[Array, "P K s/d Dv"]
    tail_k: Float[Array, "B R K Dk"]
    tail_v: Float[Array, "B R K Dv"]
    win_k: Float[Array, "B W K Dk"]
    win_v: Float[Array, "B W K Dv"]


class Append(Protocol):
    """The cache with the new tokens."""

    def __call__(
        self,
        pooled_k: Float[Array, "B m K Dk"],
        pooled_v: Float[Array, "B m K Dv"],
        selected_k: Float[Array, "B m K Dk"],
        selected_v: Float[Array, "B m K Dv"],
        window_k: Float[Array, "B m K Dk"],
        window_v: Float[Array, "B m K Dv"],
        finished_k: Float[Array, "B C K Dk"] | None,
        finished_v: Float[Array, "B C K Dv"] | None,
        places: Places,
        lengths: Int[Array, " B"],
        num_tokens: Int[Array, " B"],
        block_tables: Int[Array, "B N"],
        *,
        config: Sizes,
    ) -> Places:
        """The same arrays with the new tokens."""
