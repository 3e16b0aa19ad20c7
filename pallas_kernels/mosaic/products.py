"""Vectors and matrices in the registers of a warpgroup, and their products."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

MATRIX = plgpu.Layout.WGMMA
OF_ROWS = plgpu.Layout.WGMMA.reduce(1)  # a number for each row of a matrix
OF_COLUMNS = plgpu.Layout.WGMMA.reduce(0)
ROWS = 64  # of a warpgroup's matrices
_versioned: Any = plgpu  # what other versions of JAX declare otherwise


def i32(x: int) -> Any:
    """A constant that `jax_enable_x64` leaves alone."""
    return np.int32(x)


def down_rows(x: Any, columns: int) -> jax.Array:
    """Numbers of the rows, [M], as a matrix [M, columns]."""
    return lax.broadcast_in_dim(x, (x.shape[0], columns), (0,))


def along_columns(x: Any, rows: int) -> jax.Array:
    """Numbers of the columns, [N], as a matrix [rows, N]."""
    return lax.broadcast_in_dim(x, (rows, x.shape[0]), (1,))


def index(shape: tuple[int, int], axis: int) -> jax.Array:
    """Each entry's index along an axis, int32."""
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=MATRIX)


def row_index() -> jax.Array:
    """0 .. 63, as numbers of the rows of a warpgroup."""
    return plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=OF_ROWS)


def column_index() -> jax.Array:
    """0 .. 63, as numbers of the columns of a matrix."""
    return plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=OF_COLUMNS)


def load_numbers(ref: Any, layout: Any = OF_ROWS) -> jax.Array:
    """Numbers of the rows or of the columns of a matrix, from shared or from global memory."""
    numbers: jax.Array = _versioned.load(ref, layout=layout, optimized=False)
    return numbers


def load_matrix(ref: Any, layout: Any = MATRIX) -> jax.Array:
    """A matrix from shared memory that is laid out as plain rows, which is slow where banks collide."""
    matrix: jax.Array = _versioned.load(ref, layout=layout, optimized=False)
    return matrix


def store_matrix(ref: Any, matrix: Any) -> None:
    """The reverse of `load_matrix`. JAX 0.12 refuses a plain store where banks collide."""
    if hasattr(plgpu, "store"):
        _versioned.store(ref, matrix, optimized=False)
    else:
        ref[...] = matrix


def filled(shape: tuple[int, ...], value: float, dtype: Any = jnp.float32) -> jax.Array:
    """A matrix, or the numbers of its rows."""
    layout = MATRIX if len(shape) == 2 else OF_ROWS
    return plgpu.layout_cast(jnp.full(shape, value, dtype), layout)


def accumulators(body: Callable[..., Any], *shapes: tuple[int, int]) -> Any:
    """body(*references to accumulators of zeros). The zeros cost no instructions where a product follows at once."""
    return pl.run_scoped(body, *(plgpu.ACC(shape, jnp.float32) for shape in shapes))


def product(a: Any, b: Any, shape: tuple[int, int]) -> jax.Array:
    """The product a b of matrices in shared memory."""

    def body(accumulator: Any) -> jax.Array:
        plgpu.wgmma(accumulator, a, b)
        return accumulator[...]

    return accumulators(body, shape)


def two_products(
    first: tuple[Any, Any], second: tuple[Any, Any], use: Callable[[jax.Array], Any], shape: tuple[int, int]
) -> tuple[Any, jax.Array]:
    """(use(a b), c d) of matrices (a, b) and (c, d) in shared memory. The second product runs while the first is used.

    Each has a call of its own, so that the zeros of its accumulators come right before it.
    """

    def issue_first(accumulator: Any) -> Any:
        plgpu.wgmma(accumulator, *first)

        def issue_second(other: Any) -> Any:
            plgpu.wgmma(other, *second)
            return use(plgpu.wgmma_accumulator_load(accumulator, wait_n=1)), other[...]

        return accumulators(issue_second, shape)

    return accumulators(issue_first, shape)


@dataclasses.dataclass(frozen=True)
class Products:
    """Products whose left factor is in registers.

    The interpreter takes left factors from shared memory alone, and has no accumulator that starts with a value: there,
    `spare` [warpgroups, 64, 256] is shared memory for left factors. On a device it is None.
    """

    spare: Any

    def issue(self, accumulator: Any, a: Any, b: Any) -> None:
        """Accumulator += a b. Runs on while the warpgroup goes on, until it waits."""
        if self.spare is None:
            plgpu.wgmma(accumulator, a, b)
            return
        factor = self.spare.at[lax.axis_index("warpgroup"), :, pl.ds(0, a.shape[1])]
        factor[...] = a
        plgpu.commit_smem()
        plgpu.wgmma(accumulator, factor, b)
        plgpu.wgmma_wait(0)

    def add(self, total: Any, *factors: tuple[Any, Any]) -> jax.Array:
        """Total + the products a b of all pairs."""

        def issue_all(accumulator: Any) -> None:
            for a, b in factors:
                self.issue(accumulator, a, b)

        if self.spare is None:
            return pl.run_state(issue_all)(plgpu.ACC.init(total))

        def product(accumulator: Any) -> jax.Array:
            issue_all(accumulator)
            return accumulator[...]

        return total + accumulators(product, total.shape)
