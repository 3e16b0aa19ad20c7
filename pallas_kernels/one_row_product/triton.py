"""One row times a matrix in one Pallas Triton kernel.

A program makes some columns of the result from all rows of the matrix, so that nothing is summed across programs. It
loads its part of the matrix before it looks at anything else: all of the matrix is on its way at once. The row x is
short, and every program normalises it for itself. With one row, 15 of the 16 rows that tensor cores multiply would be
empty. So a program multiplies entry by entry, adds up its chunks of the matrix, and sums over their rows once.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float

from pallas_kernels.one_row_product.contract import Norm
from pallas_kernels.triton.integers import iota, next_power_of_two
from pallas_kernels.triton.launch import launch


@dataclasses.dataclass(frozen=True)
class ProductTile:
    """How the work is cut. Columns and depth are powers of two."""

    columns: int  # of the result, that a program makes
    num_warps: int
    depth: int  # rows of the matrix in a chunk


# For results of so many columns at least: where these are few, narrow programs are more programs. 16 columns of 16 bits
# are a sector of memory, the least that a GPU reads. The times are of bfloat16 on an H100; see docs/experiments.md.
TILES = (
    (2048, ProductTile(32, 8, 512)),  # 1024 x 2560 with a norm: 3.9 us; 1024 x 6144, gated, with a norm: 6.3 us
    (0, ProductTile(16, 8, 512)),  # 2048 x 1024 with a residual: 4.2 us; 3072 x 1024 with a residual: 5.8 us
)


def one_row_product(
    x: Float[Array, " D"],
    kernel: Float[Array, "D F"],
    *,
    norm: Norm | None = None,
    counted: Bool[Array, ""] | None = None,
    gated: bool = False,
    residual: Float[Array, " F"] | None = None,
    interpret: bool = False,
    tile: ProductTile | None = None,
) -> Float[Array, " F"]:
    """x W with a beginning and an end that need no kernel of their own; see `pallas_kernels.one_row_product.contract`.

    Args:
      x: [D].
      kernel: W, [D, F] in the dtype of x.
      norm: of x, before the product; None: there is none.
      counted: whether x counts; otherwise it is taken for zeros. None: it does.
      gated: whether the result is silu(x W_1) * x W_2, with F/2 columns.
      residual: what is added to the result, in its shape.
      interpret: run without a GPU, for tests.
      tile: overrides the choice by sizes, for tests and tuning.

    Returns:
      [F], or [F/2] if it is `gated`, in the dtype of x.

    Raises:
      NotImplementedError: another dtype of the matrix, or columns that are no multiple of a program's.
    """
    D, F = kernel.shape[0], kernel.shape[1] // (1 + gated)
    tile = tile or next(tile for columns, tile in TILES if columns <= F)
    if kernel.dtype != x.dtype:
        raise NotImplementedError(f"kernel.dtype = {kernel.dtype}: expected that of x, {x.dtype}")
    if F % tile.columns:
        raise NotImplementedError(f"columns of the result = {F}: expected a multiple of {tile.columns}")
    tile = dataclasses.replace(tile, depth=min(tile.depth, next_power_of_two(D)))
    scale, epsilon = (None, 0.0) if norm is None else norm
    return launch(
        functools.partial(_kernel, tile=tile, gated=gated, epsilon=epsilon),
        out_shape=jax.ShapeDtypeStruct((F,), x.dtype),
        grid=(F // tile.columns,),
        num_warps=tile.num_warps,
        num_stages=1,
        interpret=interpret,
        name="one_row_product",
    )(x, kernel, scale, None if counted is None else counted.astype(jnp.int32)[None], residual)


def _kernel(
    x_ref: Any,
    kernel_ref: Any,
    scale_ref: Any,
    counted_ref: Any,
    residual_ref: Any,
    y_ref: Any,
    *,
    tile: ProductTile,
    gated: bool,
    epsilon: float,
) -> None:
    D, F = kernel_ref.shape[0], y_ref.shape[0]
    column = pl.program_id(0) * tile.columns + iota(tile.columns)
    chunks = range(0, D, tile.depth)  # where they begin

    def vector(ref: Any, begin: int) -> Any:
        row = begin + iota(tile.depth)
        return _load(ref.at[row], row < D if begin + tile.depth > D else None)

    def matrix(begin: int, first_column: int) -> Any:
        row = begin + iota(tile.depth)
        valid = jnp.broadcast_to((row < D)[:, None], (tile.depth, tile.columns)) if begin + tile.depth > D else None
        return _load(kernel_ref.at[row[:, None], (first_column + column)[None, :]], valid)

    halves = [[matrix(begin, first_column) for begin in chunks] for first_column in ((0, F) if gated else (0,))]
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
        y += plgpu.load(residual_ref.at[column]).astype(jnp.float32)
    plgpu.store(y_ref.at[column], y.astype(y_ref.dtype))


def _load(at: Any, valid: Any) -> Any:
    """Entries, with zeros where not `valid`; None: all are."""
    return plgpu.load(at) if valid is None else plgpu.load(at, mask=valid, other=0)


def _product(x: list[Any], weights: list[Any]) -> jax.Array:
    """x W of chunks, with a single sum across the rows of a chunk."""
    parts = [chunk[:, None] * w.astype(jnp.float32) for chunk, w in zip(x, weights, strict=True)]
    return jnp.sum(functools.reduce(jnp.add, parts), axis=0)
