"""Compressed attention kernels against the dense float32 reference, forward and backward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.compressed_attention import compressed_attention
from pallas_kernels.triton_call import poisoned_outputs
from tests.pallas_kernels import dense

# B, T, H, K, Dk, Dv, l, d, segments, query_offset
CASES = {
    "plain": (1, 150, 4, 2, 32, 32, 32, 16, False, 0),
    "segments, Dk != Dv, odd group and stride": (2, 217, 3, 1, 48, 80, 16, 8, True, 0),
    "last queries only, group of 6, wide values": (1, 600, 6, 1, 32, 192, 32, 16, False, 539),
    "segments and offset, one head a group": (1, 300, 2, 2, 32, 32, 32, 32, True, 111),
}
GPU_CASES = {
    "plain": (1, 2048, 64, 4, 128, 128, 32, 16, False, 0),
    "192 and 128, segments": (2, 777, 12, 2, 192, 128, 32, 16, True, 0),
    "80 and 256, offset": (1, 1500, 6, 2, 80, 256, 32, 16, False, 601),
    "one head a group, segments": (1, 1024, 4, 4, 64, 64, 32, 16, True, 0),
    "64 heads a group": (1, 640, 64, 1, 32, 48, 16, 8, False, 0),
}


def inputs(case, dtype):
    B, T, H, K, Dk, Dv, block, stride, segments, offset = case
    Nc = (T - block) // stride + 1
    keys = jax.random.split(jax.random.key(T), 5)
    q = jax.random.normal(keys[0], (B, T - offset, H, Dk), dtype)
    k = jax.random.normal(keys[1], (B, Nc, K, Dk), dtype)
    v = jax.random.normal(keys[2], (B, Nc, K, Dv), dtype)
    do = jax.random.normal(keys[3], (B, T - offset, H, Dv), dtype)
    dlse = jax.random.normal(keys[4], (B, H, T - offset), jnp.float32)
    starts = None
    if segments:
        first = np.array([0, 70, 200, 201])
        row = first[np.searchsorted(first, np.arange(offset, T), side="right") - 1]
        starts = jnp.broadcast_to(jnp.asarray(row, jnp.int32), (B, T - offset))
    return (q, k, v, do, dlse), starts, {"compress_block": block, "compress_stride": stride, "scale": Dk**-0.5}


def results(op, arrays, starts, offset, **static):
    """o, lse, dq, dk, dv with cotangents for both outputs."""
    q, k, v, do, dlse = arrays
    (o, lse), pullback = jax.vjp(lambda q, k, v: op(q, k, v, starts, offset, **static), q, k, v)
    return o, lse, *pullback((do.astype(o.dtype), dlse))


def check(case, dtype, tolerance, **static):
    arrays, starts, sizes = inputs(case, dtype)
    offset = case[-1]
    run = jax.jit(functools.partial(results, compressed_attention, **sizes, **static))
    actual = run(arrays, starts, jnp.int32(offset))
    exact, exact_starts = dense.on_cpu((jax.tree.map(lambda x: x.astype(jnp.float32), arrays), starts))
    expected = jax.jit(functools.partial(results, dense.compressed_attention, **sizes))(exact, exact_starts, offset)
    finite = np.isfinite(expected[1])
    np.testing.assert_array_equal(np.isfinite(actual[1]), finite)
    np.testing.assert_allclose(np.asarray(actual[1])[finite], np.asarray(expected[1])[finite], atol=1e-5, rtol=1e-5)
    for name, a, b in zip(("o", "dq", "dk", "dv"), (actual[0], *actual[2:]), (expected[0], *expected[2:]), strict=True):
        assert a.dtype == dtype
        assert dense.relative_error(a.astype(jnp.float32), b) < tolerance, name
    return run, arrays, starts, actual


@pytest.mark.parametrize("name", CASES)
def test_forward_and_gradients_equal_dense(name):
    check(CASES[name], jnp.float32, 2e-6, interpret=True)


def test_queries_that_see_nothing_give_zero_and_no_gradient():
    arrays, _, sizes = inputs((1, 40, 2, 1, 32, 32, 32, 16, False, 0), jnp.float32)
    q, k, v, do, _ = arrays
    dlse = jnp.full((1, 2, 40), jnp.inf)  # what d exp(-lse) would send back
    run = jax.jit(functools.partial(results, compressed_attention, starts=None, offset=0, **sizes, interpret=True))
    o, lse, dq, dk, dv = run((q, k, v, do, dlse))
    assert not np.any(o[:, :31])
    assert np.all(np.isneginf(lse[:, :, :31]))
    assert not np.any(dq[:, :31])
    assert np.all(np.isfinite(o))
    only_unseen = dlse.at[:, :, 31:].set(0.0)
    _, _, dq, dk, dv = run((q, k, v, do, only_unseen))
    assert all(np.all(np.isfinite(x)) for x in (dq, dk, dv))


def test_no_compressed_tokens_at_all():
    q = jnp.ones((1, 5, 2, 32))
    empty = jnp.ones((1, 0, 1, 32))
    static = {"compress_block": 32, "compress_stride": 16, "scale": 1.0}
    o, lse = compressed_attention(q, empty, empty, None, 0, **static)
    assert not np.any(o)
    assert np.all(np.isneginf(lse))
    grad = jax.grad(lambda q: jnp.sum(compressed_attention(q, empty, empty, None, 0, **static)[0]))(q)
    assert not np.any(grad)


def test_under_vmap_scan_and_remat():
    arrays, _, sizes = inputs((2, 48, 2, 1, 32, 32, 32, 16, False, 0), jnp.float32)
    op = functools.partial(compressed_attention, query_offset=0, starts=None, **sizes, interpret=True)

    def loss(q, k, v):
        return jnp.sum(jnp.sin(op(q, k, v)[0]))

    def mapped(q, k, v):
        return jnp.sum(jax.vmap(loss)(q[:, None], k[:, None], v[:, None]))

    def scanned(q, k, v):
        step = jax.checkpoint(lambda total, x: (total + loss(*x), None))
        return jax.lax.scan(step, 0.0, (q[:, None], k[:, None], v[:, None]))[0]

    expected = jax.jit(jax.grad(loss, (0, 1, 2)))(*arrays[:3])
    for transformed in (mapped, scanned):
        for a, b in zip(jax.jit(jax.grad(transformed, (0, 1, 2)))(*arrays[:3]), expected, strict=True):
            assert dense.relative_error(a, b) < 1e-6


@pytest.mark.parametrize(
    ("dtype", "size", "group", "scale", "message"),
    [
        (jnp.float64, 32, 1, 1.0, "dtype"),
        (jnp.float32, 320, 1, 1.0, "head size 320"),
        (jnp.float32, 32, 65, 1.0, "65 query heads"),
        (jnp.float32, 32, 1, -1.0, "scale = -1.0"),
    ],
)
def test_unsupported_arguments_are_refused(dtype, size, group, scale, message):
    q, k = jax.ShapeDtypeStruct((1, 64, group, size), dtype), jax.ShapeDtypeStruct((1, 3, 1, size), dtype)
    with pytest.raises(NotImplementedError, match=message):
        compressed_attention(q, k, k, None, 0, compress_block=32, compress_stride=16, scale=scale)


@pytest.mark.parametrize("device", ["NVIDIA H100", "NVIDIA A100"])
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        ((1, 65536, 64, 4, 128, 128, 32, 16, False, 0), jnp.bfloat16),
        ((2, 1000, 12, 2, 192, 128, 32, 16, True, 0), jnp.bfloat16),
        ((1, 333, 3, 3, 80, 256, 16, 8, True, 7), jnp.float16),
        ((1, 333, 64, 1, 32, 48, 32, 16, False, 0), jnp.float32),
    ],
)
def test_lowers_for_gpus(device, case, dtype):
    arrays, starts = jax.eval_shape(lambda: inputs(case, dtype)[:2])
    sizes = {"compress_block": case[6], "compress_stride": case[7], "scale": case[4] ** -0.5}
    abstract = jax.sharding.AbstractDevice(device_kind=device, num_cores=None, platform="gpu")
    run = jax.jit(functools.partial(results, compressed_attention, **sizes))
    offset = jax.ShapeDtypeStruct((), jnp.int32)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), abstract_device=abstract)):
        text = run.trace(arrays, starts, offset).lower(lowering_platforms=("cuda",)).as_text()
    for kernel in ("forward", "query_gradient", "key_gradient", "key_gradient_sum"):
        assert kernel in text


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.bfloat16, 1e-2), (jnp.float16, 1e-2), (jnp.float32, 1e-5)])
@pytest.mark.parametrize("name", GPU_CASES)
def test_gpu_equals_dense_twice(name, dtype, tolerance):
    case = GPU_CASES[name]
    with poisoned_outputs():
        run, arrays, starts, first = check(case, dtype, tolerance)
    for a, b in zip(first, run(arrays, starts, jnp.int32(case[-1])), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
