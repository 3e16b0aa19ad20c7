"""Which compressed tokens a query sees, for all Triton kernels that walk along them."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from pallas_kernels.triton.integers import cdiv, div, loop
from pallas_kernels.triton.problem import Problem
from pallas_kernels.triton.rows import load_starts

Range = tuple[Any, Any, bool]


def visible_end(position: Any, problem: Problem, num_keys: int) -> Any:
    """One past the last compressed token that ends at or before `position`: i d + l - 1 <= position."""
    ahead = problem.compress_stride + 1 - problem.compress_block
    return jnp.minimum(div(jnp.maximum(position + ahead, 0), problem.compress_stride), num_keys)


def first_visible(start: Any, problem: Problem) -> Any:
    """First compressed token whose first token is at `start` or later: i d >= start."""
    return cdiv(start, problem.compress_stride)


@dataclasses.dataclass(frozen=True)
class Visibility:
    """What the queries of one batch entry see. Queries and keys are indices along Tq and Nc."""

    problem: Problem
    num_keys: int
    batch: Any
    offset: Any  # position of the first query
    starts_ref: Any  # int32 [B, Tq], never decreasing along Tq; None: zeros

    def key_ranges(self, ends: tuple[Any, Any], keys: int) -> list[Range]:
        """Ranges (begin, end, edge) of tiles of `keys` keys that hold one which a tile of queries sees.

        `ends` are the first and the last of the queries. Tiles that all of them see whole are no edge.
        """
        first_query, last_query = ends
        end = cdiv(visible_end(self.offset + last_query, self.problem, self.num_keys), keys)
        full_end = div(visible_end(self.offset + first_query, self.problem, self.num_keys), keys)
        if self.starts_ref is None:
            return [(0, full_end, False), (full_end, end, True)]
        first, last = (first_visible(self.starts_ref[self.batch, i], self.problem) for i in (first_query, last_query))
        begin = jnp.minimum(div(first, keys), end)
        full_begin = jnp.clip(cdiv(last, keys), begin, end)
        full_end = jnp.clip(full_end, full_begin, end)
        return [(begin, full_begin, True), (full_begin, full_end, False), (full_end, end, True)]

    def places(self, key: Any, ends: tuple[Any, Any]) -> tuple[Any, Any]:
        """(where a tile of queries, of which `ends` are the first and the last, reads keys; which it reads, None: all).

        For a key after the last that its last query may see, it reads that one again: an index costs less than a mask.
        The mask of the scores hides those, and with segments the keys that nobody sees because they straddle two.
        """
        first_query, last_query = ends
        place = jnp.minimum(key, visible_end(self.offset + last_query, self.problem, self.num_keys) - 1)
        if self.starts_ref is None:
            return place, None
        return place, place >= first_visible(self.starts_ref[self.batch, first_query], self.problem)

    def seen(self, key: Any, num_queries: int) -> Any:
        """Whether one of the call's queries sees the key.

        The first query at or after the key's last token does, if any does: its segment begins no later than theirs.
        """
        first_token = key * self.problem.compress_stride
        query = jnp.maximum(first_token + self.problem.compress_block - 1 - self.offset, 0)
        seen = (key < self.num_keys) & (query < num_queries)
        if self.starts_ref is not None:
            seen &= first_token >= load_starts(self.starts_ref, self.batch, query, seen)
        return seen

    def mask(self, key: Any, query: Any, axis: int) -> Any:
        """Mask of a tile of scores whose axis `axis` holds the queries and whose other axis holds the keys."""
        shape = (query.shape[0], key.shape[0]) if axis == 0 else (key.shape[0], query.shape[0])
        end = visible_end(self.offset + query, self.problem, self.num_keys)
        column = lax.broadcast_in_dim(key, shape, (1 - axis,))
        mask = column < lax.broadcast_in_dim(end, shape, (axis,))
        if self.starts_ref is not None:
            start = load_starts(self.starts_ref, self.batch, query, query < self.starts_ref.shape[1])
            mask &= column >= lax.broadcast_in_dim(first_visible(start, self.problem), shape, (axis,))
        return mask


def walk(ranges: Sequence[Range], step: Callable[..., Any], carry: Any) -> Any:
    """Runs `step(i, carry, edge)` over each range in turn."""
    for begin, end, edge in ranges:
        carry = loop(begin, end, functools.partial(step, edge=edge), carry)
    return carry
