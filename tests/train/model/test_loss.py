import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.config import MeshConfig
from train.model.loss import bits_per_byte, cross_entropy
from train.parallel.sharding import make_mesh

B, T, E, V = 2, 10, 6, 33


@pytest.fixture(scope="module")
def inputs():
    draw = np.random.default_rng(0)
    return {
        "hidden": jnp.asarray(draw.standard_normal((B, T, E)), jnp.float32),
        "kernel": jnp.asarray(draw.standard_normal((E, V)), jnp.float32),
        "targets": jnp.asarray(draw.integers(0, V, (B, T)), jnp.int32),
        "weights": jnp.asarray(draw.integers(0, 2, (B, T)), jnp.float32),
        "target_bytes": jnp.asarray(draw.integers(0, 5, (B, T)), jnp.int32),
    }


def test_sums_equal_those_written_out_in_float64(inputs):
    x = {name: np.asarray(value, np.float64) for name, value in inputs.items()}
    nll = z = 0.0
    for b in range(B):
        for t in range(T):
            scores = x["hidden"][b, t] @ x["kernel"]
            log_normaliser = math.log(sum(math.exp(score) for score in scores))
            nll += x["weights"][b, t] * (log_normaliser - scores[int(x["targets"][b, t])])
            z += x["weights"][b, t] * log_normaliser**2
    sums = cross_entropy(**inputs)
    np.testing.assert_allclose(sums.nll, nll, rtol=1e-6)
    np.testing.assert_allclose(sums.z, z, rtol=1e-6)
    assert float(sums.weight) == x["weights"].sum()
    assert float(sums.bytes) == (x["weights"] * x["target_bytes"]).sum()


@pytest.mark.parametrize("chunk", [1, 3, 5])
def test_chunks_change_neither_sums_nor_gradients(inputs, chunk):
    def gradients(chunk_elements):
        def objective(hidden, kernel):
            sums = cross_entropy(**(inputs | {"hidden": hidden, "kernel": kernel}), chunk_elements=chunk_elements)
            return sums.nll + 0.1 * sums.z, sums

        return jax.jit(jax.value_and_grad(objective, argnums=(0, 1), has_aux=True))(inputs["hidden"], inputs["kernel"])

    actual, expected = gradients(B * V * chunk), gradients(B * V * T)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-6)


def test_gradients_in_bfloat16_do_not_get_worse_with_the_number_of_chunks():
    draw = np.random.default_rng(1)
    T, V = 8192, 64
    hidden, kernel = draw.standard_normal((1, T, 16)), draw.standard_normal((16, V))
    targets, ones = jnp.asarray(draw.integers(0, V, (1, T)), jnp.int32), jnp.ones((1, T))

    def gradient(dtype, chunks):
        def nll(kernel):
            inputs = (jnp.asarray(hidden, jnp.bfloat16).astype(dtype), kernel, targets, ones, targets)
            return cross_entropy(*inputs, chunk_elements=T * V // chunks).nll

        return jax.jit(jax.grad(nll))(jnp.asarray(kernel, jnp.bfloat16).astype(dtype)).astype(jnp.float32)

    expected = gradient(jnp.float32, 1)
    for chunks in (1, 256):
        error = jnp.linalg.norm(gradient(jnp.bfloat16, chunks) - expected) / jnp.linalg.norm(expected)
        assert error < 3e-3, chunks


def test_logits_of_all_tokens_never_exist_at_once_where_they_are_large(inputs):
    def program(chunk_elements):
        def objective(hidden):
            return cross_entropy(**(inputs | {"hidden": hidden}), chunk_elements=chunk_elements).nll

        return str(jax.make_jaxpr(jax.grad(objective))(inputs["hidden"]))

    # Chunks of two tokens divide T, so that all logits would have the same number of elements however they are shaped.
    chunked, whole = program(B * V * 2), program(B * V * T)
    assert f"f32[1,{B},1,{T},{V}]" in whole
    for shape in (f"f32[1,{B},1,{T},{V}]", f"f32[5,1,{B},1,2,{V}]"):
        assert shape not in chunked
    assert f"f32[1,{B},1,2,{V}]" in chunked


def test_where_the_vocabulary_is_split_chunks_are_sized_by_the_logits_of_a_device(inputs):
    devices, local, tokens = 8, 5, 2
    arguments = inputs | {"kernel": jnp.ones((E, devices * local))}
    with jax.set_mesh(make_mesh(MeshConfig(data=1, tensor=devices))):
        program = jax.make_jaxpr(lambda: cross_entropy(**arguments, chunk_elements=B * tokens * local))()
    assert f"f32[1,{B},1,{tokens},{devices * local}]" in str(program)


def test_one_bit_per_byte_is_one_bit_per_byte():
    assert bits_per_byte(math.log(2) * 7, 7) == pytest.approx(1.0)
    assert math.isnan(bits_per_byte(1.0, 0))
