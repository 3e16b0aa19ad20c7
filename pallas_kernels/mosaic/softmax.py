"""The online softmax of a warpgroup's rows, its statistics in base 2."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.mosaic.products import ROWS, down_rows, filled

LOG2_E = 1.4426950408889634
LEAST = -1e30  # a finite stand-in for -inf: no difference of two of them is NaN
NEVER = 1e30  # above every score, so that weights vanish
_SUMS = 8  # columns of the least matrix


def softmax_start(value_dim: int) -> tuple[Any, Any, Any]:
    """(acc, m, total) before any key: weighted values, running maximum of the scaled scores, sums of the weights.

    The sums are of every 8th column, [64, 8]: threads add up their own until the end.
    """
    return filled((ROWS, value_dim), 0), filled((ROWS,), LEAST), filled((ROWS, _SUMS), 0)


def softmax_sums(p: Any) -> Any:
    """Of every 8th column of the weights."""
    return functools.reduce(jnp.add, [p[:, i : i + _SUMS] for i in range(0, p.shape[1], _SUMS)])


def softmax_step(s: Any, m: Any, total: Any, scale_log2: float, edge: bool) -> tuple[Any, Any, Any, Any]:
    """One step over the columns of the unscaled scores s, -inf where a row does not see a column.

    Rows may have seen nothing yet only if `edge`. Returns (p, m, total, decay): the columns' weights, the new maximum
    and sums, and the factor by which what was summed before shrinks.
    """
    m_new = jnp.maximum(m, s.max(axis=1) * scale_log2)
    reference = jnp.where(m_new > LEAST, m_new, NEVER) if edge else m_new
    p = jnp.exp2(s * scale_log2 - down_rows(reference, s.shape[1]))
    decay = jnp.exp2(m - m_new)
    return p, m_new, total * down_rows(decay, _SUMS) + softmax_sums(p), decay


def softmax_finish(acc: Any, m: Any, total: Any) -> tuple[jax.Array, jax.Array]:
    """(o, lse) of the online softmax: zeros and -inf for rows that saw nothing."""
    total = total.sum(axis=1)
    seen = total > 0
    o = acc * down_rows(jnp.where(seen, 1 / total, 0.0), acc.shape[1])
    return o, jnp.where(seen, m * (1 / LOG2_E) + jnp.log(total), -jnp.inf)
