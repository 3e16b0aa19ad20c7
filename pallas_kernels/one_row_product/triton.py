"""One row times a matrix in one Pallas Triton kernel.

A program makes one number of the result, or a few, from rows of the matrix, which lie in memory one after the other, so
that nothing is summed across programs and the card is full of them. It loads its part of the matrix before it looks at
anything else: all of the matrix is on its way at once. x is short, and every program normalises it for itself. With
one row, 15 of the 16 rows that tensor cores multiply would be empty. So a program multiplies entry by entry, adds up
its chunks, and sums once.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float

from pallas_kernels.one_row_product import tiles
from pallas_kernels.one_row_product.contract import Norm
from pallas_kernels.tiles import MatrixKey, find_tile
from pallas_kernels.triton.integers import iota, next_power_of_two
from pallas_kernels.triton.launch import launch
from pallas_kernels.triton.tiles import ProductTile


def one_row_product(
    x: Float[Array, " D"],
    weight: Float[Array, "F D"],
    *,
    norm: Norm | None = None,
    counted: Bool[Array, ""] | None = None,
    gated: bool = False,
    residual: Float[Array, " F"] | None = None,
    interpret: bool = False,
    tile: ProductTile | None = None,
) -> Float[Array, " F"]:
    """W x with a beginning and an end that need no kernel of their own; see `pallas_kernels.one_row_product.contract`.

    Args:
      x: [D].
      weight: W, [F, D] in the dtype of x.
      norm: of x, before the product; None: there is none.
      counted: whether x counts; otherwise it is taken for zeros. None: it does.
      gated: whether the result is silu(W_1 x) * W_2 x, with F/2 numbers.
      residual: what is added to the result, in its shape.
      interpret: run without a GPU, for tests.
      tile: overrides the table, for tests and tuning.

    Returns:
      [F], or [F/2] if it is `gated`, in the dtype of x.

    Raises:
      NotImplementedError: a dtype that is not supported, another one of the matrix, or numbers of the result that are
        no multiple of a program's.
    """
    F, D = weight.shape[0] // (1 + gated), weight.shape[1]
    if x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise NotImplementedError(f"x.dtype = {x.dtype}: expected bfloat16, float16 or float32")
    if weight.dtype != x.dtype:
        raise NotImplementedError(f"weight.dtype = {weight.dtype}: expected that of x, {x.dtype}")
    tile = tile or find_tile(tiles.PRODUCT, MatrixKey(x.dtype.itemsize, D))
    if F % tile.outputs:
        raise NotImplementedError(f"numbers of the result = {F}: expected a multiple of {tile.outputs}")
    tile = dataclasses.replace(tile, depth=min(tile.depth, next_power_of_two(D)))
    scale, epsilon = (None, 0.0) if norm is None else norm
    return launch(
        functools.partial(_kernel, tile=tile, gated=gated, epsilon=epsilon),
        out_shape=jax.ShapeDtypeStruct((F,), x.dtype),
        grid=(F // tile.outputs,),
        num_warps=tile.num_warps,
        num_stages=1,
        interpret=interpret,
        name="one_row_product",
    )(x, weight, scale, None if counted is None else counted.astype(jnp.int32)[None], residual)


def _kernel(
    x_ref: Any,
    weight_ref: Any,
    scale_ref: Any,
    counted_ref: Any,
    residual_ref: Any,
    y_ref: Any,
    *,
    tile: ProductTile,
    gated: bool,
    epsilon: float,
) -> None:
    F, D = y_ref.shape[0], weight_ref.shape[1]
    output = pl.program_id(0) * tile.outputs + iota(tile.outputs)
    chunks = range(0, D, tile.depth)  # where they begin

    def vector(ref: Any, begin: int) -> Any:
        at = begin + iota(tile.depth)
        return _load(ref.at[at], at < D if begin + tile.depth > D else None)

    def matrix(first_row: int, begin: int) -> Any:
        at = begin + iota(tile.depth)
        valid = jnp.broadcast_to((at < D)[None, :], (tile.outputs, tile.depth)) if begin + tile.depth > D else None
        return _load(weight_ref.at[(first_row + output)[:, None], at[None, :]], valid)

    halves = [[matrix(first_row, begin) for begin in chunks] for first_row in ((0, F) if gated else (0,))]
    x = [vector(x_ref, begin).astype(jnp.float32) for begin in chunks]
    if counted_ref is not None:
        counts = plgpu.load(counted_ref.at[jnp.zeros((), jnp.int32)]) != 0
        x = [jnp.where(counts, chunk, 0) for chunk in x]
    if scale_ref is not None:
        mean_square = functools.reduce(jnp.add, [jnp.sum(chunk * chunk) for chunk in x]) / D
        factor = jax.lax.rsqrt(mean_square + epsilon)
        scaled = [chunk * factor * vector(scale_ref, begin) for chunk, begin in zip(x, chunks, strict=True)]
        x = [chunk.astype(x_ref.dtype).astype(jnp.float32) for chunk in scaled]
    products = [_product(x, weights) for weights in halves]
    y = products[0] / (1 + jnp.exp(-products[0])) * products[1] if gated else products[0]
    if residual_ref is not None:
        y += plgpu.load(residual_ref.at[output]).astype(jnp.float32)
    plgpu.store(y_ref.at[output], y.astype(y_ref.dtype))


def _load(at: Any, valid: Any) -> Any:
    """Entries, with zeros where not `valid`; None: all are."""
    return plgpu.load(at) if valid is None else plgpu.load(at, mask=valid, other=0)


def _product(x: list[Any], weights: list[Any]) -> jax.Array:
    """W x of chunks, with a single sum along the chunks."""
    parts = [chunk[None, :] * w.astype(jnp.float32) for chunk, w in zip(x, weights, strict=True)]
    return jnp.sum(functools.reduce(jnp.add, parts), axis=1)
