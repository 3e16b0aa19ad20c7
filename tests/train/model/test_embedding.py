"""The gradient of the embeddings: the same from a product of matrices as from a scatter, alone and on any mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nsa_jax.testing import normwise_error
from tests.train import test_step
from train.config import MeshConfig
from train.model import embedding
from train.model.embedding import CHUNK_ELEMENTS, embed, sum_by_product, sum_by_scatter
from train.parallel.communication import collectives, received_bytes
from train.parallel.sharding import activation, batch_sharding, make_mesh

B, T, E, V = 8, 24, 16, 64
LAST = 40  # tokens are below it: the rows from here on are padding, or stand for tokens that do not occur
MESHES = [
    MeshConfig(data=2, expert=2, tensor=2),
    MeshConfig(data=1, fsdp=2, context=2, tensor=2),
    MeshConfig(data=1, context=8),
]


@functools.cache
def inputs(dtype="float32"):
    """Tokens that repeat, a gradient with respect to their embeddings, and the sums written out in float64."""
    draw = np.random.default_rng(0)
    tokens = np.minimum(draw.geometric(0.1, (B, T)) - 1, LAST - 1).astype(np.int32)
    gradient = np.asarray(jnp.asarray(draw.standard_normal((B, T, E)), dtype))
    expected = np.zeros((V, E))
    np.add.at(expected, tokens, gradient.astype(np.float64))
    return tokens, gradient, expected


@pytest.fixture
def by_product(monkeypatch):
    """On every platform, in chunks of the given number of one-hot numbers."""

    def use(chunk_elements):
        product = functools.partial(sum_by_product, chunk_elements=chunk_elements)
        monkeypatch.setattr(embedding, "sum_by_scatter", product)

    return use


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("chunk", [None, 1, 5, 8, T], ids=lambda chunk: "scatter" if chunk is None else str(chunk))
def test_sums_equal_those_written_out_in_float64(dtype, chunk):
    tokens, gradient, expected = inputs(dtype)
    elements = {} if chunk is None else {"chunk_elements": B * V * chunk}
    add = functools.partial(sum_by_scatter if chunk is None else sum_by_product, num_rows=V, **elements)
    actual = jax.jit(add)(jnp.asarray(tokens), jnp.asarray(gradient))
    assert (actual.shape, actual.dtype) == ((V, E), jnp.float32)
    assert normwise_error(actual, expected) < 1e-6
    assert not np.any(actual[LAST:])


def test_a_gpu_multiplies_and_other_platforms_scatter():
    tokens, gradient, _ = inputs()
    transpose = jax.jit(lambda table: jax.vjp(lambda table: embed(table, jnp.asarray(tokens)), table)[1](gradient))

    def program(platform):
        return transpose.trace(jnp.ones((V, E))).lower(lowering_platforms=(platform,)).as_text()

    for platform, multiplies in (("cuda", True), ("rocm", True), ("cpu", False), ("tpu", False)):
        assert ("stablehlo.dot_general" in program(platform)) == multiplies, platform
        assert ("stablehlo.scatter" in program(platform)) != multiplies, platform


def test_a_gpu_multiplies_float32_exactly_and_bfloat16_as_it_is():
    def program(dtype):
        tokens, gradient, _ = inputs(dtype)
        add = jax.jit(functools.partial(sum_by_product, num_rows=V))
        return add.lower(jnp.asarray(tokens), jnp.asarray(gradient)).as_text()

    assert "precision = [HIGHEST, HIGHEST] : (tensor<1x8x1x24x64xf32>" in program("float32")
    assert "precision = [DEFAULT, DEFAULT] : (tensor<1x8x1x24x64xbf16>" in program("bfloat16")


def test_one_hot_numbers_of_all_tokens_never_exist_at_once_where_they_are_many():
    tokens, gradient, _ = inputs("bfloat16")

    def program(chunk_elements):
        add = functools.partial(sum_by_product, num_rows=V, chunk_elements=chunk_elements)
        return str(jax.make_jaxpr(add)(jnp.asarray(tokens), jnp.asarray(gradient)))

    whole, chunk = f"bf16[1,{B},1,{T},{V}]", f"bf16[1,{B},1,5,{V}]"
    assert whole in program(B * V * T)
    assert chunk in program(B * V * 5)
    assert whole not in program(B * V * 5)


@pytest.mark.parametrize("explicit", [False, True], ids=["auto", "explicit"])
@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("chunk", [None, 2], ids=["one chunk", "chunks"])
def test_on_a_mesh_devices_sum_their_own_tokens_and_their_sums_are_added_once(mesh, explicit, chunk, by_product):
    tokens, gradient, expected = inputs()
    D, C, tensor = mesh.data * mesh.fsdp * mesh.expert, mesh.context, mesh.tensor
    by_product(CHUNK_ELEMENTS if chunk is None else B // D * V // tensor * chunk)
    devices = make_mesh(dataclasses.replace(mesh, explicit=explicit))

    def transpose(table, tokens, gradient):
        _, transpose = jax.vjp(lambda table: embed(table, tokens), activation(table, "vocab", None))
        return transpose(activation(gradient, "batch", "sequence", None))[0]

    with jax.set_mesh(devices):
        tokens = jax.device_put(tokens, batch_sharding(devices))
        arguments = jnp.ones((V, E)), tokens, jnp.asarray(gradient)
        run = jax.jit(transpose).lower(*arguments).compile()
        actual = run(*arguments)
    assert normwise_error(actual, expected) < 1e-6
    assert actual.sharding.shard_shape(actual.shape) == (V // tensor, E)
    sent = 2 * ((D - 1) / D + (C - 1) / C) * V // tensor * E * 4
    found = received_bytes(collectives(run.as_text()))
    assert found == dict.fromkeys(found, 0.0) | {"all-reduce": sent}


@pytest.mark.parametrize("mesh", [None, MeshConfig(data=1, fsdp=2, tensor=2, explicit=True)], ids=str)
def test_a_step_of_microbatches_learns_the_same_from_products(mesh, by_product):
    whole = test_step.one_step()
    by_product(2 * V)
    devices = None if mesh is None else make_mesh(mesh, jax.devices()[:4])
    test_step.assert_close(test_step.one_step(accumulate=4, mesh=devices), whole, 1e-5)
