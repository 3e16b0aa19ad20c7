"""The newest few tokens of each row, and the compressed tokens that they finish, written into a paged cache.

Row b holds lengths[b] tokens. Its first num_tokens[b] new ones, of m, go to positions lengths[b] and on; of the others,
nothing is kept. Position p of a row lies in

* page block_tables[b, p // s] of `slc_k` and `slc_v`, at place p mod s, for which `selected_k` and `selected_v` are;
* slot p mod R of the rings `tail_k` and `tail_v` (R >= l + m - 1), for which `pooled_k` and `pooled_v` are;
* slot p mod W of the rings `win_k` and `win_v` (W >= window + m - 1), for which `window_k` and `window_v` are.

With a `rotation`, which is (cos, sin), the H heads of the queries and all keys are not rotated yet. Every pair (x_i,
x_{i + Dk/2}) of them becomes (x_i cos_i - x_{i + Dk/2} sin_i, x_{i + Dk/2} cos_i + x_i sin_i), in float32 at least. The
queries are only rotated: they are returned, or None without a rotation.

With `gates`, the gates of each new token and query head are returned: sigmoid(silu(h + in_bias) W + out_bias), where h
are F columns of an array. Without, None is returned. Queries and gates of tokens that do not count are made of what
these hold.

Compressed token i, which starts at position i d, lies in page block_tables[b, i d // s], at place i d mod s over d. It
is finished if i d + l <= lengths[b] + num_tokens[b]. Those that the new tokens finish are written: the entries of
`finished_k` and `finished_v`, of which the first is the next that the row finishes; or, where these are None, the means
of tokens in the tail and of new ones as they are stored, summed in float32 at least.

A pool of pages may be `Quantized`. What is written there is then rounded to 8 bits; what is given is not.

What would lie in no page (-1, or beyond the table) is dropped. All other places keep what they hold. Not
differentiable.

Sizes read: compress_block, compress_stride, select_block and window.
"""

from typing import NamedTuple, Protocol

from jaxtyping import Array, Float, Int

from pallas_kernels.contract import Sizes
from pallas_kernels.quantized import Quantized


class Heads(NamedTuple):
    """Heads of each token, in neighbouring columns of an array that may hold more, such as a joined product."""

    array: Float[Array, "B m F"]
    column: int = 0  # where the first head begins


class Gates(NamedTuple):
    """An MLP whose first product is made."""

    hidden: Heads  # F columns
    in_bias: Float[Array, " F"]
    out_kernel: Float[Array, "F H 3"]
    out_bias: Float[Array, "H 3"]


class Places(NamedTuple):
    """The arrays of a cache that hold keys and values."""

    slc_k: Float[Array, "P K s Dk"] | Quantized
    slc_v: Float[Array, "P K s Dv"] | Quantized
    cmp_k: Float[Array, "P K s/d Dk"] | Quantized
    cmp_v: Float[Array, "P K s/d Dv"] | Quantized
    tail_k: Float[Array, "B R K Dk"]
    tail_v: Float[Array, "B R K Dv"]
    win_k: Float[Array, "B W K Dk"]
    win_v: Float[Array, "B W K Dv"]


class Append(Protocol):
    """The cache with the new tokens."""

    def __call__(
        self,
        q: Heads | None,
        pooled_k: Heads,
        pooled_v: Heads,
        selected_k: Heads,
        selected_v: Heads,
        window_k: Heads,
        window_v: Heads,
        finished_k: Float[Array, "B C K Dk"] | None,
        finished_v: Float[Array, "B C K Dv"] | None,
        rotation: tuple[Float[Array, "B m Dk/2"], Float[Array, "B m Dk/2"]] | None,
        gates: Gates | None,
        places: Places,
        lengths: Int[Array, " B"],
        num_tokens: Int[Array, " B"],
        block_tables: Int[Array, "B N"],
        *,
        config: Sizes,
        num_heads: int,
    ) -> tuple[Float[Array, "B m H Dk"] | None, Float[Array, "B m H 3"] | None, Places]:
        """(rotated queries, gates in float32 at least, the same arrays with the new tokens); `num_heads` is H.

        q is None without a rotation.
        """
