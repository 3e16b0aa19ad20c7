"""What the contracts of all ops share: the sizes they read, and what a backward pass returns.

Shapes: B batch, T tokens, Tq queries, H query heads, K key/value heads, G = H / K query heads of a group, Nc compressed
tokens, n selected blocks, Dk and Dv sizes of query/key and of value heads.

Queries. Row r of q stands at position t = query_offset + r of the sequence whose keys cover positions 0 .. T - 1.
`query_offset` is an int or an int32 scalar array. `segment_starts` (int32 [B, Tq], never decreasing along Tq) is the
position of the first token of each query's segment, and None stands for zeros. `scale` multiplies the scores.

Residuals. Every forward pass returns (o, lse): o in q's dtype, and lse = log sum_j exp(scale q . k_j), the natural
logarithm, in float32, as [B, H, Tq]. A query that sees nothing has o = 0 and lse = -inf. Any backend's backward pass
takes what any other backend's forward pass returned.

What must not matter. Keys and values that no query of the call sees may hold any finite numbers, those that come after
the last query may also hold NaN, and their gradients are zero. A key that some queries do not see reaches these only if
it is not finite, or if its products are not: a tile of queries multiplies what one of them sees.

Refusals. A backend raises NotImplementedError, before anything is computed, for arguments that it does not support. A
call that no backend could serve raises another error.
"""

from typing import NamedTuple, Protocol

import jax.numpy as jnp
from jaxtyping import Array, Float


class Sizes(Protocol):
    """The sizes of Native Sparse Attention: frozen and hashable. `nsa_jax.NSAConfig` is one."""

    @property
    def compress_block(self) -> int:
        """Tokens that a compressed token stands for: l."""

    @property
    def compress_stride(self) -> int:
        """Tokens between the starts of neighbouring compressed tokens: d."""

    @property
    def select_block(self) -> int:
        """Tokens of a selection block: s."""

    @property
    def num_selected(self) -> int:
        """Blocks that a query reads, the forced ones included: n."""

    @property
    def num_init(self) -> int:
        """Blocks at the start of a query's segment that are always read."""

    @property
    def num_local(self) -> int:
        """Blocks up to and including the query's own that are always read."""

    @property
    def window(self) -> int:
        """Tokens of the sliding window, the query's own included: w."""

    def __hash__(self) -> int:
        """Sizes are static arguments of compiled functions."""


class Gradients(NamedTuple):
    """What the backward pass of an attention op returns."""

    dq: Float[Array, "B Tq H Dk"]  # added to the `dq` that was given, in q's dtype
    dk: Float[Array, "B T K Dk"]
    dv: Float[Array, "B T K Dv"]
    delta: Float[Array, "B H Tq"]  # sum over Dv of o * do (minus dlse, where there is one): the gradient of the gate


def sees_nothing(
    q: Float[Array, "B Tq H Dk"], v: Float[Array, "B T K Dv"]
) -> tuple[Float[Array, "B Tq H Dv"], Float[Array, "B H Tq"]]:
    """(o, lse) of queries that see nothing, because there are no keys or no queries."""
    B, Tq, H, _ = q.shape
    return jnp.zeros((B, Tq, H, v.shape[3]), q.dtype), jnp.full((B, H, Tq), -jnp.inf, jnp.float32)


def gradients_of_nothing(
    q: Float[Array, "B Tq H Dk"],
    k: Float[Array, "B T K Dk"],
    v: Float[Array, "B T K Dv"],
    dq: Float[Array, "B Tq H Dk"] | None,
) -> Gradients:
    """The gradients of `sees_nothing`, added to the `dq` that was given."""
    B, Tq, H, _ = q.shape
    delta = jnp.zeros((B, H, Tq), jnp.float32)
    return Gradients(jnp.zeros_like(q) if dq is None else dq, jnp.zeros_like(k), jnp.zeros_like(v), delta)
