"""Selected attention kernels against the dense float32 reference, forward and backward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.selected_attention import block_union, selected_attention
from pallas_kernels.selected_attention import triton as query_major
from pallas_kernels.selected_attention import triton_backward as backward
from pallas_kernels.selected_attention.block_major import BlockMajorTile
from pallas_kernels.selected_attention.inverse_index import invert
from pallas_kernels.triton_call import poisoned_outputs
from tests.pallas_kernels import dense

# B, T, H, K, Dk, Dv, s, n, segments, query_offset
CASES = {
    "plain": (1, 80, 8, 2, 32, 32, 16, 3, False, 0),
    "segments, offset, odd group, odd heads": (1, 70, 6, 2, 48, 40, 16, 3, True, 37),
}
GPU_CASES = {
    "plain": (1, 1000, 64, 4, 128, 128, 64, 16, False, 0),
    "192 and 128, segments": (2, 777, 32, 2, 192, 128, 64, 8, True, 0),
    "odd group, heads and block, offset": (1, 900, 12, 2, 40, 96, 48, 5, False, 301),
    "one head a group": (1, 777, 4, 4, 128, 128, 64, 16, True, 0),
    "64 heads a group": (1, 640, 64, 1, 64, 48, 128, 3, False, 0),
    "long enough to choose tiles by overlap": (1, 4200, 16, 1, 64, 64, 64, 16, False, 0),
}


def inputs(case, dtype):
    B, T, H, K, Dk, Dv, s, n, segments, offset = case
    Tq = T - offset
    keys = jax.random.split(jax.random.key(T), 4)
    shapes = ((B, Tq, H, Dk), (B, T, K, Dk), (B, T, K, Dv), (B, Tq, H, Dv))
    arrays = tuple(jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True))
    first = np.where(np.arange(offset, T) >= 43, 43, 0) if segments else np.zeros(Tq, int)
    starts = jnp.broadcast_to(jnp.asarray(first, jnp.int32), (B, Tq)) if segments else None
    return arrays, selection(B, K, first, offset, s, n), starts


def selection(B, K, first, offset, s, n):
    """Random blocks per query, its own always among them."""
    rng = np.random.default_rng(n)
    indices = np.full((B, K, len(first), n), -1, np.int32)
    for b, h, row in np.ndindex(*indices.shape[:3]):
        blocks = np.arange(first[row] // s, (offset + row) // s + 1)
        chosen = np.append(rng.choice(blocks[:-1], min(n, len(blocks)) - 1, replace=False), blocks[-1])
        indices[b, h, row, : len(chosen)] = np.sort(chosen)
    return jnp.asarray(indices)


def results(op, arrays, indices, starts, offset, **static):
    """o, dq, dk, dv."""
    q, k, v, do = arrays
    o, pullback = jax.vjp(lambda q, k, v: op(q, k, v, indices, starts, offset, **static), q, k, v)
    return o, *pullback(do.astype(o.dtype))


def check(case, dtype, tolerance, **static):
    arrays, indices, starts = inputs(case, dtype)
    sizes = {"select_block": case[6], "scale": case[4] ** -0.5}
    run = jax.jit(functools.partial(results, selected_attention, **sizes, **static))
    actual = run(arrays, indices, starts, jnp.int32(case[-1]))
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), arrays)
    reference = jax.jit(functools.partial(results, dense.selected_attention, **sizes))
    expected = reference(*dense.on_cpu((exact, indices, starts)), case[-1])
    for name, a, b in zip(("o", "dq", "dk", "dv"), actual, expected, strict=True):
        assert a.dtype == dtype
        assert dense.relative_error(a.astype(jnp.float32), b) < tolerance, name
    return functools.partial(run, arrays, indices, starts, jnp.int32(case[-1])), actual


@pytest.mark.parametrize("name", CASES)
def test_forward_and_gradients_equal_dense(name):
    check(CASES[name], jnp.float32, 2e-6, interpret=True)


def test_tiles_of_several_queries_equal_dense(monkeypatch):
    monkeypatch.setattr(block_union, "_ADAPTIVE_FROM", 8)
    pairs = query_major.ForwardTile(2, 2, 2), query_major.ForwardTile(4, 4, 2)
    monkeypatch.setattr(query_major, "forward_tiles", lambda *_: pairs)
    monkeypatch.setattr(backward, "query_tiles", lambda *_: (backward.QueryTile(8, 4, 2), None))
    check((1, 70, 8, 1, 32, 32, 16, 3, True, 37), jnp.float32, 2e-6, interpret=True)


def test_block_major_forward_equals_dense(monkeypatch):
    monkeypatch.setattr(query_major, "block_major_tile", lambda *_: BlockMajorTile(16, 32, 4, 2))
    check((1, 70, 6, 2, 32, 40, 24, 3, True, 37), jnp.float32, 2e-6, interpret=True)


def test_inverse_index_lists_every_choice_once_in_order():
    indices = selection(2, 1, np.zeros(90, int), 0, 16, 4)[:, 0]
    index = jax.tree.map(np.asarray, jax.jit(invert, static_argnums=(1, 2))(indices, 6, 32))
    for row, chosen in enumerate(np.asarray(indices)):
        for block in range(6):
            items = range(*index.block_items[row, block : block + 2])
            assert all(index.block[row, i] == block and 0 < index.length[row, i] <= 32 for i in items)
            spans = [index.places[row, index.first[row, i] : index.first[row, i] + index.length[row, i]] for i in items]
            np.testing.assert_array_equal(np.concatenate(spans), np.flatnonzero(chosen == block))
        used = index.block_items[row, -1]
        assert not index.length[row, used:].any()


def test_unsupported_arguments_raise_not_implemented():
    q, k = jnp.ones((1, 8, 2, 32)), jnp.ones((1, 8, 1, 32))
    indices = jnp.zeros((1, 1, 8, 1), jnp.int32)
    call = functools.partial(selected_attention, interpret=True)
    with pytest.raises(NotImplementedError, match="dtypes"):
        call(q, k.astype(jnp.bfloat16), k, indices, None, 0, select_block=16, scale=1.0)
    with pytest.raises(NotImplementedError, match="head size"):
        call(q[..., :8], k[..., :8], k, indices, None, 0, select_block=16, scale=1.0)
    with pytest.raises(NotImplementedError, match="select_block = 8"):
        call(q, k, k, indices, None, 0, select_block=8, scale=1.0)
    with pytest.raises(NotImplementedError, match="scale"):
        call(q, k, k, indices, None, 0, select_block=16, scale=-1.0)


@pytest.mark.parametrize("kind", ["NVIDIA H100", "NVIDIA A100"])
@pytest.mark.parametrize("name", GPU_CASES)
def test_lowers_for_gpu(name, kind):
    B, T, H, K, Dk, Dv, s, n, segments, offset = GPU_CASES[name]
    Tq = T - offset
    shapes = ((B, Tq, H, Dk), (B, T, K, Dk), (B, T, K, Dv), (B, Tq, H, Dv))
    arrays = tuple(jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)
    indices = jax.ShapeDtypeStruct((B, K, Tq, n), jnp.int32)
    starts = jax.ShapeDtypeStruct((B, Tq), jnp.int32) if segments else None
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=None, platform="gpu")
    run = functools.partial(results, selected_attention, offset=offset, select_block=s, scale=Dk**-0.5)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)):
        jax.jit(run).trace(arrays, indices, starts).lower(lowering_platforms=("cuda",))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("name", GPU_CASES)
def test_gpu_forward_and_gradients_equal_dense_and_repeat(name, dtype):
    with poisoned_outputs():
        run, actual = check(GPU_CASES[name], dtype, 1e-4 if dtype == jnp.float32 else 1e-2)
    for a, b in zip(actual, run(), strict=True):
        np.testing.assert_array_equal(a, b)
