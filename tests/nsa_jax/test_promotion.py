"""Strict dtype promotion and 64-bit JAX, alone and together: every op and layer is traced; x64 changes no number."""

import contextlib
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from whole_layers import FIELDS, embeddings, everything, initial, layer, run_alone, segments

import nsa_jax
from nsa_jax import NSAConfig
from nsa_jax.testing import assert_trees_close, random_inputs

KERNELS = NSAConfig(16, 8, 16, 4, 1, 1, 16)
DTYPES = pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.exhaustive)])


STRICT_AND_X64 = pytest.mark.parametrize(
    ("strict", "x64"),
    [(True, True), *(pytest.param(*mode, marks=pytest.mark.exhaustive) for mode in ((True, False), (False, True)))],
)


@contextlib.contextmanager
def mode(strict, x64):
    with jax.enable_x64(x64), jax.numpy_dtype_promotion("strict" if strict else "standard"):
        yield


@DTYPES
@STRICT_AND_X64
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.exhaustive if name == "nsa" else ()) for name in FIELDS]
)
def test_layers_and_their_caches_keep_their_dtypes(name, strict, x64, dtype):
    params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), nn.unbox(initial(name)))
    x, segment_ids = (jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (embeddings().astype(dtype), segments()))
    with mode(strict, x64):
        ids = jax.ShapeDtypeStruct(segment_ids.shape, jnp.int64 if x64 else jnp.int32)
        y, gradients, pieces, cache = jax.eval_shape(everything(layer(name, dtype=dtype)), params, x, ids, x)
        assert {leaf.dtype for leaf in (y, gradients[1], *pieces)} == {jnp.dtype(dtype)}
        assert {leaf.dtype for leaf in cache if leaf.ndim > 2} == {jnp.dtype(dtype)}
        assert {leaf.dtype for leaf in cache if leaf.ndim <= 2} == {jnp.dtype("int32")}
        assert {leaf.dtype for leaf in gradients[0].values()} == {jnp.dtype("float32")}


def problem(dtype):
    inputs = random_inputs(jax.random.key(0), KERNELS, T=48, num_heads=4, num_kv_heads=2, head_dim=16, dtype=dtype)
    sizes = {"batch_size": 1, "max_length": 48, "num_kv_heads": 2, "head_dim": 16, "dtype": dtype}
    return (*inputs[:3], nsa_jax.init_nsa_cache(KERNELS, **sizes))


def ops(implementation, q, kv, gates, cache):
    options = {"config": KERNELS, "implementation": implementation}
    o, vjp = jax.vjp(functools.partial(nsa_jax.nsa_attention, **options), q, kv, gates)
    return o, vjp(o), nsa_jax.decode_attention(q[:, :1], cache, gates[:, :1], cache.lengths, **options)


@DTYPES
@STRICT_AND_X64
@pytest.mark.parametrize("implementation", ["reference", "xla", "triton"])
def test_ops_keep_their_dtypes(implementation, strict, x64, dtype):
    arrays = jax.eval_shape(functools.partial(problem, dtype))
    with mode(strict, x64):
        o, gradients, (decoded, blocks) = jax.eval_shape(functools.partial(ops, implementation), *arrays)
        assert {x.dtype for x in (o, decoded, *jax.tree.leaves(gradients))} == {jnp.dtype(dtype)}
        assert blocks.dtype == jnp.int32


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.exhaustive) for name in FIELDS])
def test_layers_have_the_same_numbers_under_x64(name):
    arguments = jax.device_get((nn.unbox(initial(name)), embeddings(), segments().astype("int32"), embeddings(2)))
    expected = run_alone(name)
    with jax.enable_x64(True):
        actual = jax.jit(everything(layer(name)))(*arguments)
    assert_trees_close(jax.device_get(actual), expected, 1e-5)


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_kernels_compute_the_same_under_x64(dtype):
    """Interpreted, forward, backward and a step; that they lower for GPUs is shown in tests/pallas_kernels."""
    arguments = jax.device_get(problem(dtype))
    run = functools.partial(ops, "triton")
    expected = jax.device_get(jax.jit(run)(*arguments))
    with jax.enable_x64(True):
        actual = jax.device_get(jax.jit(functools.partial(ops, "triton"))(*arguments))
    assert_trees_close(actual, expected)
