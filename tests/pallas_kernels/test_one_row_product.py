"""The product of one row in a kernel, with what goes before and after it, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.one_row_product.contract import Norm
from pallas_kernels.one_row_product.triton import one_row_product
from pallas_kernels.triton.tiles import ProductTile
from tests.pallas_kernels import cases

EPSILON = 1e-2  # large enough to be seen
# Rows of the matrix, numbers of x, gated: a chunk, several, and chunks that are not full; programs of each tile.
SIZES = {
    "one chunk": (48, 64, False),
    "one that is not full": (33, 80, False),
    "several, gated": (64, 2048, True),
    "several, the last not full, gated": (96, 2048 + 100, True),
    "longer than a warp holds": (24, 4096 + 30, False),
}
# Of the 350M model: queries, keys, values and gates; the attention's output; SwiGLU's two.
GPU_SIZES = {
    "joined": (2560, 1024, False),
    "output": (1024, 2048, False),
    "gate and up": (6144, 1024, True),
    "down": (1024, 3072, False),
}


def inputs(size, dtype):
    """x, matrix, and what `one_row_product` takes beside them."""
    F, D, gated = size
    rng = np.random.default_rng(0)
    x, weight, scale, residual = (
        jnp.asarray(rng.standard_normal(shape), dtype) for shape in ((D,), (F, D), (D,), (F // (1 + gated),))
    )
    options = {"norm": Norm(scale.astype(jnp.float32), EPSILON), "counted": jnp.array(True), "residual": residual}
    return x, weight / D**0.5, options


def expected(x, weight, gated, norm=None, counted=True, residual=0.0):
    x, weight, residual = (np.asarray(array, np.float64) for array in (x, weight, residual))
    x = x if counted else np.zeros_like(x)
    if norm is not None:
        x = x / np.sqrt((x**2).mean() + norm.epsilon) * np.asarray(norm.scale, np.float64)
    y = weight @ x
    if gated:
        gate, up = np.split(y, 2)
        y = gate / (1 + np.exp(-gate)) * up
    return y + residual


def check(y, reference, dtype):
    assert y.dtype == dtype
    assert y.shape == reference.shape
    # The norm's result and the product's are rounded once each to the dtype; up to 4126 numbers are added in float32.
    error = np.linalg.norm(np.asarray(y, np.float64) - reference) / np.linalg.norm(reference)
    assert error < 2 * float(jnp.finfo(dtype).eps) + 4 * float(jnp.finfo(jnp.float32).eps)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dressed", [False, True], ids=["bare", "with all before and after it"])
def test_it_is_the_product(size, dtype, dressed):
    gated = SIZES[size][2]
    x, weight, options = inputs(SIZES[size], dtype)
    options = options if dressed else {}
    y = one_row_product(x, weight, gated=gated, **options, interpret=True)
    check(y, expected(x, weight, gated, **options), dtype)


@pytest.mark.parametrize("gated", [False, True])
def test_a_row_that_does_not_count_adds_nothing_whatever_it_holds(gated):
    x, weight, options = inputs((64, 80, gated), jnp.bfloat16)
    options["counted"] = jnp.array(False)
    y = one_row_product(jnp.full_like(x, jnp.nan), weight, gated=gated, **options, interpret=True)
    np.testing.assert_array_equal(y, options["residual"])


@pytest.mark.parametrize(
    ("dtype", "size", "message"),
    [
        (jnp.bfloat16, (16, 32), "weight.dtype = bfloat16: expected that of x, float32"),
        (jnp.float32, (17, 8192), "numbers of the result = 17: expected a multiple of 2"),
    ],
)
def test_what_it_does_not_take_is_refused(dtype, size, message):
    with pytest.raises(NotImplementedError, match=message):
        one_row_product(jnp.ones(size[1]), jnp.ones(size, dtype), interpret=True)


@pytest.mark.parametrize("tile", [ProductTile(1, 4, 32), ProductTile(4, 4, 128)])
def test_a_program_may_take_more_or_less(tile):
    x, weight, options = inputs((32, 80, False), jnp.float32)
    y = one_row_product(x, weight, **options, interpret=True, tile=tile)
    check(y, expected(x, weight, False, **options), jnp.float32)


@pytest.mark.parametrize("kind", ["NVIDIA H100", "NVIDIA A100"])
@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("size", ["one that is not full", "several, the last not full, gated"])
def test_it_lowers_for_gpus(size, kind, x64):
    F, D, gated = SIZES[size]
    kinds = (jnp.bfloat16, jnp.bfloat16, jnp.float32, jnp.bool, jnp.bfloat16)
    shapes = ((D,), (F, D), (D,), (), (F // (1 + gated),))

    def product(x, weight, scale, counted, residual):
        options = {"norm": Norm(scale, EPSILON), "counted": counted, "residual": residual}
        return one_row_product(x, weight, gated=gated, **options)

    with jax.enable_x64(x64):
        arrays = map(jax.ShapeDtypeStruct, shapes, kinds)
        assert "one_row_product" in cases.lower(kind, product, *arrays)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("size", [*SIZES, *GPU_SIZES])
def test_it_is_the_product_on_a_gpu_with_the_same_bits_every_time(size, dtype):
    gated = (SIZES | GPU_SIZES)[size][2]
    x, weight, options = inputs((SIZES | GPU_SIZES)[size], dtype)
    product = jax.jit(lambda x, weight: one_row_product(x, weight, gated=gated, **options))
    y = product(x, weight)
    check(y, expected(x, weight, gated, **options), dtype)
    np.testing.assert_array_equal(y, product(x, weight))
