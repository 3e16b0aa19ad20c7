"""What the block-major kernels share: a program takes one work item of the inverse index (`inverse_index`)."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.selected_attention.block_union import block_keys
from pallas_kernels.triton.integers import cdiv, div, loop
from pallas_kernels.triton.problem import Problem
from pallas_kernels.triton.rows import Pair, Rows, packed_rows


class Item(NamedTuple):
    """The queries that one program gathers, and the keys of their block."""

    pair: Pair
    rows: Rows
    key: Any  # number within the block, of a power of two
    inside: Any  # whether the block has such a key; None: all
    key_position: Any
    first: Any  # the item's first entry in the list of choices
    count: Any
    first_query: Any
    last_query: Any
    steps: Any
    own: Any  # steps, the first ones, with queries that do not see all of the block
    queries: int  # of a step
    choices_ref: Any

    def places(self, offset: Any, starts_ref: Any, num_keys: int) -> Any:
        """Where the keys are read: at their positions, or, if no query sees them, at the nearest that one sees."""
        place = jnp.minimum(self.key_position, jnp.minimum(offset + self.last_query, num_keys - 1))
        return place if starts_ref is None else jnp.maximum(place, starts_ref[self.pair.batch, self.first_query])

    def gather(self, i: Any, num_selected: int) -> tuple[Any, Any, Any]:
        """(choice, query, whether there is one) of each packed row in step i."""
        entry = i * self.queries + self.rows.query
        listed = entry < self.count
        choice = plgpu.load(self.choices_ref.at[self.pair.index, self.first + entry], mask=listed, other=0)
        return choice, div(choice, num_selected), listed

    def walk(self, step: Callable[..., Any], carry: Any) -> Any:
        """Runs `step(i, carry, edge)`: a block's list begins with its own queries, which do not see all of it."""
        carry = loop(0, self.own, functools.partial(step, edge=True), carry)
        return loop(self.own, self.steps, functools.partial(step, edge=False), carry)


def item_of(
    pair: Pair,
    q_shape: tuple[int, ...],
    num_kv_heads: int,
    num_rows: int,
    stride: int,
    refs: Any,
    problem: Problem,
) -> Item:
    """The item of this program; `refs` are those of the inverse index."""
    choices_ref, *fields = refs
    numbers = (ref[pair.index, pl.program_id(0)] for ref in fields)
    block, first, count, rank, first_query, last_query = numbers
    rows = packed_rows(0, num_rows, stride, pair, q_shape[2], num_kv_heads)
    queries = num_rows // stride
    key, inside = block_keys(problem)
    key_position = block * problem.select_block + key
    steps = cdiv(count, queries)
    own = jnp.minimum(cdiv(jnp.maximum(problem.select_block - rank, 0), queries), steps)
    return Item(
        pair, rows, key, inside, key_position, first, count, first_query, last_query, steps, own, queries, choices_ref
    )
