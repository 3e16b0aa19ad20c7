"""Sliding window attention kernels against the dense float32 reference, forward and backward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.triton_call import poisoned_outputs
from pallas_kernels.window_attention import window_attention
from tests.pallas_kernels import dense

# B, T, H, K, Dk, Dv, window, segments, query_offset
CASES = {
    "plain": (1, 200, 2, 2, 32, 32, 50, False, 0),
    "segments, offset, odd group, odd heads": (1, 170, 6, 2, 48, 40, 100, True, 37),
    "window longer than the sequence": (1, 99, 2, 1, 32, 32, 400, False, 0),
}
GPU_CASES = {
    "plain": (1, 1000, 64, 4, 128, 128, 512, False, 0),
    "192 and 128, segments": (2, 777, 32, 2, 192, 128, 100, True, 0),
    "odd group and heads, offset": (1, 900, 12, 2, 40, 96, 333, False, 301),
    "one head a group": (1, 777, 4, 4, 256, 128, 512, True, 0),
    "64 heads a group": (1, 640, 64, 1, 64, 48, 70, False, 0),
}


def inputs(case, dtype):
    B, T, H, K, Dk, Dv, _, segments, offset = case
    Tq = T - offset
    keys = jax.random.split(jax.random.key(T), 4)
    shapes = ((B, Tq, H, Dk), (B, T, K, Dk), (B, T, K, Dv), (B, Tq, H, Dv))
    arrays = tuple(jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True))
    starts = None
    if segments:
        first = np.where(np.arange(offset, T) >= 43, 43, 0)
        starts = jnp.broadcast_to(jnp.asarray(first, jnp.int32), (B, Tq))
    return arrays, starts


def results(op, arrays, starts, offset, **static):
    """o, dq, dk, dv."""
    q, k, v, do = arrays
    o, pullback = jax.vjp(lambda q, k, v: op(q, k, v, starts, offset, **static), q, k, v)
    return o, *pullback(do.astype(o.dtype))


def check(case, dtype, tolerance, **static):
    arrays, starts = inputs(case, dtype)
    sizes = {"window": case[6], "scale": case[4] ** -0.5}
    run = jax.jit(functools.partial(results, window_attention, **sizes, **static))
    actual = run(arrays, starts, jnp.int32(case[-1]))
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), arrays)
    expected = jax.jit(functools.partial(results, dense.window_attention, **sizes))(
        *dense.on_cpu((exact, starts)), case[-1]
    )
    for name, a, b in zip(("o", "dq", "dk", "dv"), actual, expected, strict=True):
        assert a.dtype == dtype
        assert dense.relative_error(a.astype(jnp.float32), b) < tolerance, name
    return functools.partial(run, arrays, starts, jnp.int32(case[-1])), actual


@pytest.mark.parametrize("name", CASES)
def test_forward_and_gradients_equal_dense(name):
    check(CASES[name], jnp.float32, 2e-6, interpret=True)


def test_window_of_one_returns_the_values():
    (q, k, v, _), _ = inputs((1, 70, 4, 2, 32, 32, 1, False, 0), jnp.float32)
    o = jax.jit(functools.partial(window_attention, window=1, scale=1.0, interpret=True))(q, k, v, None, 0)
    np.testing.assert_allclose(o, jnp.repeat(v, 2, axis=2), rtol=1e-6)


def test_unsupported_arguments_raise_not_implemented():
    q, k = jnp.ones((1, 8, 2, 32)), jnp.ones((1, 8, 1, 32))
    with pytest.raises(NotImplementedError, match="dtypes"):
        window_attention(q, k.astype(jnp.bfloat16), k, None, 0, window=4, scale=1.0, interpret=True)
    with pytest.raises(NotImplementedError, match="head size"):
        window_attention(q[..., :8], k[..., :8], k, None, 0, window=4, scale=1.0, interpret=True)


@pytest.mark.parametrize("kind", ["NVIDIA H100", "NVIDIA A100"])
@pytest.mark.parametrize("name", GPU_CASES)
def test_lowers_for_gpu(name, kind):
    B, T, H, K, Dk, Dv, window, segments, offset = GPU_CASES[name]
    Tq = T - offset
    shapes = ((B, Tq, H, Dk), (B, T, K, Dk), (B, T, K, Dv), (B, Tq, H, Dv))
    arrays = tuple(jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)
    starts = jax.ShapeDtypeStruct((B, Tq), jnp.int32) if segments else None
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=None, platform="gpu")
    run = functools.partial(results, window_attention, offset=offset, window=window, scale=Dk**-0.5)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)):
        jax.jit(run).trace(arrays, starts).lower(lowering_platforms=("cuda",))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("name", GPU_CASES)
def test_gpu_forward_and_gradients_equal_dense_and_repeat(name, dtype):
    with poisoned_outputs():
        run, actual = check(GPU_CASES[name], dtype, 1e-4 if dtype == jnp.float32 else 1e-2)
    for a, b in zip(actual, run(), strict=True):
        np.testing.assert_array_equal(a, b)
