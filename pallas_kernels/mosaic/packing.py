"""How the heads of a group are packed into the rows of a warpgroup, in shared memory and in arrays of statistics.

A group of 8 heads or more lies query by query: row r is head r % G of query r // G, which one copy brings. A smaller
group lies head by head: row r is query r % (64 / G) of head r // (64 / G), because copies bring 8 rows or more.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic.products import ROWS, i32

ALIGNMENT = 8  # rows of a matrix in shared memory that stay together: copies start and end at multiples of it


@dataclasses.dataclass(frozen=True)
class Packing:
    """The packed rows of groups of `group` heads, a divisor of 64."""

    group: int

    @property
    def queries(self) -> int:
        """Queries of a warpgroup."""
        return ROWS // self.group

    @property
    def by_head(self) -> bool:
        """Whether rows lie head by head."""
        return self.group < 8

    @property
    def copies(self) -> int:
        """Copies that bring the rows of a warpgroup."""
        return self.group if self.by_head else self.queries

    def query_of(self, row: Any) -> Any:
        """The query of a packed row, from the warpgroup's first."""
        return row % i32(self.queries) if self.by_head else row // i32(self.group)

    def parts(self, batch: Any, query: Any, head: Any) -> list[tuple[tuple[Any, ...], Any]]:
        """For each copy, its place in an array [B, Tq, K, G, D] and its rows, for queries from `query` on."""
        if self.by_head:
            return [
                ((batch, pl.ds(query, self.queries), head, i32(g)), pl.ds(self.queries * g, self.queries))
                for g in range(self.group)
            ]
        return [((batch, query + i32(j), head), pl.ds(self.group * j, self.group)) for j in range(self.queries)]

    def load(self, ref: Any, shared: Any, barrier: Any, batch: Any, query: Any, head: Any) -> None:
        """Copies the rows of a warpgroup's queries to `shared` [64, D]. Queries past the last one are zeros."""
        for place, rows in self.parts(batch, query, head):
            plgpu.copy_gmem_to_smem(ref.at[place], shared.at[rows], barrier)

    def store(self, shared: Any, ref: Any, batch: Any, query: Any, head: Any) -> None:
        """The reverse of `load`, to be committed. What lies past the last query is not written."""
        for place, rows in self.parts(batch, query, head):
            plgpu.copy_smem_to_gmem(shared.at[rows], ref.at[place], commit_group=False)

    def padded(self, num_queries: int) -> int:
        """Queries that arrays have for the copies: copies along the queries want a multiple of 8 of them."""
        return -(-num_queries // ALIGNMENT) * ALIGNMENT if self.by_head else num_queries

    def rows_of_queries(self, x: jax.Array) -> jax.Array:
        """Numbers of queries, [..., n] with n a multiple of `queries`, as numbers of packed rows, [..., n G]."""
        *lead, n = x.shape
        x = x.reshape(*lead, n // self.queries, self.queries)
        shape = (*lead, n // self.queries, self.group, self.queries)
        rows = jnp.broadcast_to(x[..., None, :], shape)
        return (rows if self.by_head else rows.swapaxes(-1, -2)).reshape(*lead, n * self.group)

    def pack(self, x: jax.Array, num_kv_heads: int, padded: int, value: float) -> jax.Array:
        """Statistics [B, H, Tq] as packed rows [B K, padded G]; what is added holds `value`."""
        batch, _, n = x.shape
        x = jnp.pad(x, ((0, 0), (0, 0), (0, padded - n)), constant_values=value)
        x = x.reshape(batch * num_kv_heads, self.group, padded // self.queries, self.queries).swapaxes(1, 2)
        return (x if self.by_head else x.swapaxes(2, 3)).reshape(batch * num_kv_heads, padded * self.group)

    def unpack(self, x: jax.Array, num_kv_heads: int, num_queries: int) -> jax.Array:
        """The reverse of `pack`: [B, H, Tq]."""
        pairs, rows = x.shape
        tiles = (self.group, self.queries) if self.by_head else (self.queries, self.group)
        x = x.reshape(pairs, rows // ROWS, *tiles)
        x = (x if self.by_head else x.swapaxes(2, 3)).swapaxes(1, 2)
        return x.reshape(pairs // num_kv_heads, num_kv_heads * self.group, -1)[:, :, :num_queries]


def pad_rows(x: jax.Array, rows: int) -> jax.Array:
    """x [B, n, ...] with zeros up to so many rows."""
    return x if x.shape[1] == rows else jnp.pad(x, ((0, 0), (0, rows - x.shape[1]), *[(0, 0)] * (x.ndim - 2)))


def pad_keys(x: jax.Array) -> jax.Array:
    """Keys or values [B, N, K, D] as copies want them, with a multiple of 8 rows. Copies give zeros beyond them."""
    return pad_rows(x, -(-x.shape[1] // ALIGNMENT) * ALIGNMENT)
