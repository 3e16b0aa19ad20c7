"""The product of one row in a kernel, with what goes before and after it, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.one_row_product.contract import Norm
from pallas_kernels.one_row_product.triton import ProductTile, one_row_product
from tests.pallas_kernels import cases

EPSILON = 1e-2  # large enough to be seen
# Rows and columns of the matrix, gated: a chunk, several, and chunks that are not full; programs of each tile.
SIZES = {
    "one chunk": (64, 48, False),
    "one that is not full": (80, 32, False),
    "several, gated": (1024, 64, True),
    "several, the last not full, gated": (1024 + 100, 96, True),
    "many columns": (600, 2048 + 32, False),
}
# Of the 350M model: queries, keys, values and gates; the attention's output; SwiGLU's two.
GPU_SIZES = {
    "joined": (1024, 2560, False),
    "output": (2048, 1024, False),
    "gate and up": (1024, 6144, True),
    "down": (3072, 1024, False),
}


def inputs(size, dtype):
    """x, matrix, and what `one_row_product` takes beside them."""
    D, F, gated = size
    rng = np.random.default_rng(0)
    x, kernel, scale, residual = (
        jnp.asarray(rng.standard_normal(shape), dtype) for shape in ((D,), (D, F), (D,), (F // (1 + gated),))
    )
    options = {"norm": Norm(scale.astype(jnp.float32), EPSILON), "counted": jnp.array(True), "residual": residual}
    return x, kernel / D**0.5, options


def expected(x, kernel, gated, norm=None, counted=True, residual=0.0):
    x, kernel, residual = (np.asarray(array, np.float64) for array in (x, kernel, residual))
    x = x if counted else np.zeros_like(x)
    if norm is not None:
        x = x / np.sqrt((x**2).mean() + norm.epsilon) * np.asarray(norm.scale, np.float64)
    y = x @ kernel
    if gated:
        gate, up = np.split(y, 2)
        y = gate / (1 + np.exp(-gate)) * up
    return y + residual


def check(y, reference, dtype):
    assert y.dtype == dtype
    assert y.shape == reference.shape
    # The norm's result and the product's are rounded once each to the dtype; up to 3072 numbers are added in float32.
    error = np.linalg.norm(np.asarray(y, np.float64) - reference) / np.linalg.norm(reference)
    assert error < 2 * float(jnp.finfo(dtype).eps) + 4 * float(jnp.finfo(jnp.float32).eps)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dressed", [False, True], ids=["bare", "with all before and after it"])
def test_it_is_the_product(size, dtype, dressed):
    gated = SIZES[size][2]
    x, kernel, options = inputs(SIZES[size], dtype)
    options = options if dressed else {}
    y = one_row_product(x, kernel, gated=gated, **options, interpret=True)
    check(y, expected(x, kernel, gated, **options), dtype)


@pytest.mark.parametrize("gated", [False, True])
def test_a_row_that_does_not_count_adds_nothing_whatever_it_holds(gated):
    x, kernel, options = inputs((80, 64, gated), jnp.bfloat16)
    options["counted"] = jnp.array(False)
    y = one_row_product(jnp.full_like(x, jnp.nan), kernel, gated=gated, **options, interpret=True)
    np.testing.assert_array_equal(y, options["residual"])


@pytest.mark.parametrize(
    ("dtype", "columns", "message"),
    [
        (jnp.bfloat16, 16, "kernel.dtype = bfloat16: expected that of x, float32"),
        (jnp.float32, 40, "columns of the result = 40: expected a multiple of 16"),
        (jnp.float32, 2064, "columns of the result = 2064: expected a multiple of 32"),
    ],
)
def test_what_it_does_not_take_is_refused(dtype, columns, message):
    with pytest.raises(NotImplementedError, match=message):
        one_row_product(jnp.ones(32), jnp.ones((32, columns), dtype), interpret=True)


@pytest.mark.parametrize("tile", [ProductTile(8, 4, 32), ProductTile(16, 4, 128)])
def test_a_program_may_take_more_or_less(tile):
    x, kernel, options = inputs(SIZES["one that is not full"], jnp.float32)
    y = one_row_product(x, kernel, **options, interpret=True, tile=tile)
    check(y, expected(x, kernel, False, **options), jnp.float32)


@pytest.mark.parametrize("kind", ["NVIDIA H100", "NVIDIA A100"])
@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("size", ["one that is not full", "several, the last not full, gated"])
def test_it_lowers_for_gpus(size, kind, x64):
    D, F, gated = SIZES[size]
    kinds = (jnp.bfloat16, jnp.bfloat16, jnp.float32, jnp.bool, jnp.bfloat16)
    shapes = ((D,), (D, F), (D,), (), (F // (1 + gated),))

    def product(x, kernel, scale, counted, residual):
        options = {"norm": Norm(scale, EPSILON), "counted": counted, "residual": residual}
        return one_row_product(x, kernel, gated=gated, **options)

    with jax.enable_x64(x64):
        arrays = map(jax.ShapeDtypeStruct, shapes, kinds)
        assert "one_row_product" in cases.lower(kind, product, *arrays)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("size", [*SIZES, *GPU_SIZES])
def test_it_is_the_product_on_a_gpu_with_the_same_bits_every_time(size, dtype):
    D, F, gated = (SIZES | GPU_SIZES)[size]
    x, kernel, options = inputs((D, F, gated), dtype)
    product = jax.jit(lambda x, kernel: one_row_product(x, kernel, gated=gated, **options))
    y = product(x, kernel)
    check(y, expected(x, kernel, gated, **options), dtype)
    np.testing.assert_array_equal(y, product(x, kernel))
