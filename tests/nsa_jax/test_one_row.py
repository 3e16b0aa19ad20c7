"""Products of one row in a kernel and of any rows without: the same results, and the kernel on a single GPU alone."""

import types

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType

from nsa_jax import one_row
from nsa_jax.one_row import is_one_row_on_a_gpu, multiply_rows
from nsa_jax.testing import normwise_error
from pallas_kernels.one_row_product import tiles
from pallas_kernels.one_row_product.contract import Norm
from pallas_kernels.one_row_product.triton import one_row_product
from pallas_kernels.tiles import MatrixRow
from pallas_kernels.triton.tiles import ProductTile
from tests.pallas_kernels import cases


@pytest.fixture
def calls(monkeypatch):
    """Results of the kernel, which products of one row call as on a GPU, but interpreted."""
    made = []

    def interpreted(*args, **options):
        made.append(one_row_product(*args, **options, interpret=True))
        return made[-1]

    kernels = types.SimpleNamespace(supports=lambda op, device: True, function=lambda op: interpreted)
    monkeypatch.setattr(one_row, "TRITON", kernels)
    return made


def random(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape).astype(jnp.bfloat16)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("gated", [False, True])
def test_a_product_has_all_before_and_after_it_with_the_kernel_and_without(calls, gated, rows):
    x, weight, scale, residual = random(0, rows, 1, 64), random(1, 96, 64) / 8, random(2, 64), random(3, rows, 1, 96)
    residual = residual[..., :48] if gated else residual
    counted = jnp.arange(rows)[:, None] == 0
    garbage = jnp.where(counted[:, :, None], x, jnp.nan)
    norm = Norm(scale.astype(jnp.float32), 1e-2)
    y = multiply_rows(garbage, weight, norm=norm, counted=counted, gated=gated, residual=residual)
    wide = jnp.where(counted[:, :, None], x, 0).astype(jnp.float32)
    wide = wide / jnp.sqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + 1e-2) * norm.scale[None, None]
    product = wide @ weight.T.astype(jnp.float32)
    if gated:
        gate, up = jnp.split(product, 2, axis=-1)
        product = jax.nn.silu(gate) * up
    assert len(calls) == (rows == 1)
    assert y.dtype == jnp.bfloat16
    assert normwise_error(y, residual + product) < 1e-2


@pytest.mark.parametrize("refused", [False, True])
def test_several_dimensions_are_summed_over_and_what_the_kernel_refuses_is_made_without_it(calls, monkeypatch, refused):
    if refused:
        monkeypatch.setattr(tiles, "PRODUCT", (MatrixRow((8, 0), 2, 64, ProductTile(32, 1, 64)),))
    o, weight = random(0, 1, 1, 4, 16), random(1, 40, 4, 16)
    y = multiply_rows(o, weight)
    assert len(calls) == (not refused)
    assert y.shape == (1, 1, 40)
    assert normwise_error(y, jnp.einsum("bthd,ehd->bte", *(x.astype(jnp.float32) for x in (o, weight)))) < 1e-2


def test_a_given_precision_is_that_of_xla(calls):
    y = multiply_rows(random(0, 1, 1, 64), random(1, 32, 64), precision="highest")
    assert y.shape == (1, 1, 32)
    assert not calls


def test_only_one_row_on_a_single_gpu_is_multiplied_so():
    def takes(kind, rows=1, dtype=jnp.bfloat16, **mesh):
        with cases.abstract(kind, **mesh):
            return is_one_row_on_a_gpu(*(jax.ShapeDtypeStruct(shape, dtype) for shape in ((rows, 1, 64), (64, 64))))

    assert takes("NVIDIA H100")
    assert takes("NVIDIA A100", dtype=jnp.float16)
    assert not takes("NVIDIA H100", rows=2)
    assert not takes("NVIDIA H100", dtype=jnp.float32)
    assert not takes("NVIDIA H100", devices=2)
    assert not takes("NVIDIA H100", axes=AxisType.Explicit)
    assert not takes("Tesla T4")
    assert not takes("AMD Instinct MI300X")
