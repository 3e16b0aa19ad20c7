"""The online softmax, its statistics in base 2, and the end of a gradient of q.

Scores are kept unscaled: `scale_log2` = scale * log2(e) is applied inside the exponential, as one fused operation.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.triton.heads import Piece, row_products, scaled, zeros
from pallas_kernels.triton.problem import LOG2_E
from pallas_kernels.triton.rows import Rows, load_rows

# Finite stand-ins for the infinities, so that no difference of two of them is NaN.
LEAST = -1e30
NEVER = 3e38  # above every score, however large the numbers in places that must not matter


def exp2(x: Any, interpret: bool) -> jax.Array:
    """2^x. The hardware instruction alone: the library's version adds three operations for denormal results."""
    if interpret:
        return jnp.exp2(x)
    (y,) = plgpu.elementwise_inline_asm(
        "ex2.approx.ftz.f32 $0, $1;",
        args=[x],
        constraints="=f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, x.dtype)],
    )
    return y


def softmax_start(num_rows: int, pieces: Sequence[Piece]) -> tuple[Any, Any, tuple[Any, ...]]:
    """(m, total, acc) before any key: running maximum of the scores, sum of the weights, weighted values."""
    return jnp.full((num_rows,), LEAST, jnp.float32), jnp.zeros((num_rows,), jnp.float32), zeros(num_rows, pieces)


def softmax_step(
    s: Any, m: Any, total: Any, scale_log2: float, interpret: bool, member: Any = None
) -> tuple[Any, Any, Any, Any]:
    """One step of the online softmax over the columns of the unscaled scores s.

    Rows that are not `member` stay as they were. Returns (p, m, total, decay): the columns' weights, the new maximum
    and sum, and the factor by which what was summed before shrinks.
    """
    m_new = jnp.maximum(m, jnp.max(s, axis=1))
    reference = m_new * scale_log2
    if member is not None:
        m_new = jnp.where(member, m_new, m)
        reference = jnp.where(member, reference, NEVER)
    p = exp2(s * scale_log2 - reference[:, None], interpret)
    decay = exp2((m - m_new) * scale_log2, interpret)
    return p, m_new, total * decay + jnp.sum(p, axis=1), decay


def softmax_finish(m: Any, total: Any, acc: Sequence[Any], scale: float) -> tuple[tuple[Any, ...], Any]:
    """(o, lse) of the online softmax: zeros and -inf for rows that saw nothing."""
    seen = total > 0
    total = jnp.where(seen, total, 1)
    inverse = jnp.where(seen, 1 / total, 0)
    return scaled(acc, inverse[:, None]), jnp.where(seen, m * scale + jnp.log(total), -jnp.inf)


def load_lse_log2(lse_ref: Any, index: tuple[Any, ...], valid: Any) -> jax.Array:
    """The rows' lse in base 2; where it is -inf or a row is not `valid`, so large that every weight vanishes."""
    lse = plgpu.load(lse_ref.at[index], mask=valid, other=-jnp.inf)
    return jnp.where(lse > LEAST, lse * LOG2_E, NEVER)


def load_delta(
    o: Sequence[Any], do: Sequence[Any], lse_log2: Any, dlse_ref: Any, index: tuple[Any, ...], valid: Any
) -> jax.Array:
    """rowsum(do * o) - dlse of the rows.

    Rows that see nothing take no part: whatever cotangent came with their lse of -inf is dropped here.
    """
    delta = row_products(o, do)
    if dlse_ref is None:
        return delta
    delta -= plgpu.load(dlse_ref.at[index], mask=valid, other=0)
    return jnp.where(lse_log2 < NEVER, delta, 0)


def finish_query_gradient(
    dq: Sequence[Any],
    scale: float,
    gate_ref: Any,
    dq_before_ref: Any,
    batch: Any,
    query: Any,
    rows: Rows,
    pieces: Sequence[Piece],
    valid: Any,
) -> tuple[Any, ...]:
    """dq of gate * o from the accumulators of p (dp - delta) k, added to what other branches gave q before."""
    factor: Any = scale
    if gate_ref is not None:
        factor = (scale * plgpu.load(gate_ref.at[batch, query, rows.head], mask=valid, other=0))[:, None]
    dq = scaled(dq, factor)
    if dq_before_ref is None:
        return dq
    before = load_rows(dq_before_ref, (batch, query, rows.head), pieces, valid)
    return tuple(piece + x.astype(jnp.float32) for piece, x in zip(dq, before, strict=True))
