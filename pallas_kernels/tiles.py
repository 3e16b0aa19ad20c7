"""Tiles shared by the Triton kernels: heads of any size, groups of any size packed into rows, masked edges."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.triton_call import triton_call

LOG2_E = 1.4426950408889634
# Finite stand-ins for the infinities, so that no difference of two of them is NaN.
LEAST = -1e30
NEVER = 1e30


def head_chunks(head_dim: int) -> tuple[tuple[int, int], ...]:
    """`head_dim` cut into (start, width) pieces of power-of-two width, 16 at least: 192 is 128 + 64.

    Triton's tiles have power-of-two sides. Pieces cost what they hold, where padding 192 to 256 would cost a third.
    """
    rest, start, chunks = -(-head_dim // 16) * 16, 0, []
    while rest:
        width = 1 << (rest.bit_length() - 1)
        chunks.append((start, width))
        start, rest = start + width, rest - width
    return tuple(chunks)


def _row_index(prefix, row, head):
    if head is None:
        return (*prefix, row[:, None])
    return (*prefix, row[:, None], head[:, None] if jnp.ndim(head) else head)


def load_rows(ref, prefix, row, head, head_dim, valid=None):
    """Loads `ref[*prefix, row, head, :]` as a tuple of [rows, width] pieces. Rows not `valid` are zeros.

    `head` is an index, an index for each row, or None where the array has no such axis.

    Every index is an array, contiguous in the last axis: this lowers to vector loads, and also runs interpreted.
    """
    index = _row_index(prefix, row, head)
    pieces = []
    for start, width in head_chunks(head_dim):
        column = start + jnp.arange(width, dtype=jnp.int32)
        mask = None if valid is None else jnp.broadcast_to(valid[:, None], (row.shape[0], width))
        if start + width > head_dim:
            inside = jnp.broadcast_to((column < head_dim)[None, :], (row.shape[0], width))
            mask = inside if mask is None else mask & inside
        at = ref.at[(*index, column[None, :])]
        pieces.append(plgpu.load(at) if mask is None else plgpu.load(at, mask=mask, other=0))
    return tuple(pieces)


def store_rows(ref, prefix, row, head, head_dim, pieces, valid):
    """The reverse of `load_rows`. Rows not `valid` must have an index out of bounds or a value of their own."""
    index = _row_index(prefix, row, head)
    for (start, width), piece in zip(head_chunks(head_dim), pieces, strict=True):
        column = start + jnp.arange(width, dtype=jnp.int32)
        mask = jnp.broadcast_to(valid[:, None], piece.shape)
        if start + width > head_dim:
            mask &= (column < head_dim)[None, :]
        at = ref.at[(*index, column[None, :])]
        plgpu.store(at, piece.astype(ref.dtype), mask=mask)


def dot(a, b, trans_b: bool = False):
    """a @ b or a @ b.T in float32. Float32 inputs are multiplied in IEEE precision, not TF32."""
    contracted = (((1,), (1 if trans_b else 0,)), ((), ()))
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, contracted, precision=precision, preferred_element_type=jnp.float32)


def dot_pieces(a, b):
    """a @ b.T where both are cut along the head by `head_chunks`."""
    total = dot(a[0], b[0], trans_b=True)
    for x, y in zip(a[1:], b[1:], strict=True):
        total += dot(x, y, trans_b=True)
    return total


def row_products(a, b):
    """The dot product of each row of a with the same row of b, in float32."""
    products = [jnp.sum(x.astype(jnp.float32) * y.astype(jnp.float32), axis=1) for x, y in zip(a, b, strict=True)]
    return functools.reduce(jnp.add, products)


def zeros(rows: int, head_dim: int):
    """Float32 accumulators, cut as `head_chunks` cuts `head_dim`."""
    return tuple(jnp.zeros((rows, width), jnp.float32) for _, width in head_chunks(head_dim))


def accumulate(accumulators, weights, values, decay=None):
    """acc * decay + weights @ values, piece by piece."""
    weights = weights.astype(values[0].dtype)
    if decay is not None:
        accumulators = tuple(acc * decay[:, None] for acc in accumulators)
    return tuple(acc + dot(weights, value) for acc, value in zip(accumulators, values, strict=True))


def exp2(x, interpret: bool):
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


def softmax_step(s, m, total, c, interpret, member=None):
    """One step of the online softmax of scores s * scale, where c = scale * log2(e), over the columns of s.

    m is the running maximum of s, `total` the running sum of the weights. Rows that are not `member` stay as they
    were. Returns (p, m, total, decay): the columns' weights, the new maximum and sum, and the factor by which what was
    summed before shrinks.
    """
    m_new = jnp.maximum(m, jnp.max(s, axis=1))
    reference = m_new * c
    if member is not None:
        m_new = jnp.where(member, m_new, m)
        reference = jnp.where(member, reference, NEVER)
    p = exp2(s * c - reference[:, None], interpret)
    decay = exp2((m - m_new) * c, interpret)
    return p, m_new, total * decay + jnp.sum(p, axis=1), decay


def softmax_finish(m, total, accumulators, scale):
    """(o, lse) of the online softmax: zeros and -inf for rows that saw nothing."""
    seen = total > 0
    total = jnp.where(seen, total, 1)
    inverse = jnp.where(seen, 1 / total, 0)
    lse = jnp.where(seen, m * scale + jnp.log(total), -jnp.inf)
    return tuple(acc * inverse[:, None] for acc in accumulators), lse


def finish_query_gradient(dq, scale, gate_ref, dq_before_ref, b, t, head, valid):
    """dq of gate * o from the accumulators of p (dp - delta) k, added to what other branches gave q before."""
    factor = scale
    if gate_ref is not None:
        factor = (scale * plgpu.load(gate_ref.at[b, t, head], mask=valid, other=0))[:, None]
    dq = tuple(piece * factor for piece in dq)
    if dq_before_ref is None:
        return dq
    before = load_rows(dq_before_ref, (b,), t, head, dq_before_ref.shape[-1], valid)
    return tuple(piece + x.astype(jnp.float32) for piece, x in zip(dq, before, strict=True))


def base2_lse(lse):
    """lse in base 2, and a number so large that every weight vanishes where it is -inf."""
    return jnp.where(lse > LEAST, lse * LOG2_E, NEVER)


def next_power_of_two(n: int) -> int:
    """The least power of two that is at least `n`."""
    return 1 << max(0, n - 1).bit_length()


def check_supported(q, k, v, scale: float) -> None:
    """Raises NotImplementedError, before anything is traced, for what the Triton kernels do not take."""
    if q.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32) or not q.dtype == k.dtype == v.dtype:
        raise NotImplementedError(
            f"q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}: expected one of bfloat16, float16, float32 for all"
        )
    for name, size in (("q and k", q.shape[-1]), ("v", v.shape[-1])):
        if not 32 <= size <= 256:
            raise NotImplementedError(f"head size of {name} is {size}: the Triton kernels take 32 to 256")
    if q.shape[2] // k.shape[2] > 64:
        raise NotImplementedError(
            f"{q.shape[2] // k.shape[2]} query heads per K/V head: the Triton kernels take 1 to 64"
        )
    if not scale > 0:
        raise NotImplementedError(f"scale = {scale}: expected a positive number")


def launch(kernel, *, name, grid, out_shape, num_warps, num_stages, interpret):
    """`triton_call` where each reference is a whole array, which the kernel indexes by its program ids.

    For an argument that is None the kernel gets None.
    """

    def call(*arguments):
        def body(*refs):
            rest = iter(refs)
            kernel(*[None if argument is None else next(rest) for argument in arguments], *rest)

        return triton_call(
            body,
            name=name,
            grid=grid,
            in_specs=pl.no_block_spec,
            out_specs=pl.no_block_spec,
            out_shape=out_shape,
            num_warps=num_warps,
            num_stages=num_stages,
            interpret=interpret,
        )(*[argument for argument in arguments if argument is not None])

    return call
