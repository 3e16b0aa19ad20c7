"""The decoding kernels against the dense float32 ops on the same rows laid out whole."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.triton_call import poisoned_outputs
from tests.pallas_kernels import dense

SMALL = {"compress_block": 8, "compress_stride": 4, "select_block": 16, "num_selected": 4, "window": 20}
PAPER = {"compress_block": 32, "compress_stride": 16, "select_block": 64, "num_selected": 16, "window": 512}
ODD = {"compress_block": 32, "compress_stride": 16, "select_block": 48, "num_selected": 5, "window": 70}
FORCED = {"num_init": 1, "num_local": 2}

# lengths (of each row, the queries included), m, H, K, Dk, Dv, sizes
CASES = {
    "one token, ragged": ([1, 7, 8, 64, 65, 150], 1, 4, 2, 32, 32, SMALL),
    "drafts, odd group and heads": ([3, 40, 131], 3, 6, 2, 48, 40, SMALL),
    "one head a group": ([100], 2, 3, 3, 32, 32, {**SMALL, "compress_block": 4}),
    "few blocks": ([57, 31], 1, 4, 2, 32, 32, {**SMALL, "num_selected": 3}),
    "blocks of no power of two": ([97, 200], 1, 2, 1, 32, 32, ODD),
}
GPU_CASES = {
    "paper": ([1, 31, 4000, 9001], 1, 64, 4, 128, 128, PAPER),
    "192 and 128, drafts": ([5, 3000], 4, 64, 4, 192, 128, PAPER),
    "one head a group": ([700, 3000], 1, 4, 4, 64, 64, PAPER),
    "64 heads a group, drafts": ([900], 3, 64, 1, 32, 48, PAPER),
    "blocks of no power of two, odd": ([333, 500], 2, 12, 2, 40, 96, ODD),
    "large heads, 128 a block": ([2000], 1, 8, 2, 256, 256, {**PAPER, "select_block": 128, "compress_block": 64}),
}


def inputs(case, dtype, seed=0):
    """Whole sequences (float32 numbers that the dtype holds), and the same in pages that lie anywhere."""
    lengths, m, H, K, Dk, Dv, sizes = case
    B, s, d = len(lengths), sizes["select_block"], sizes["compress_stride"]
    N = -(-max(lengths) // s)
    P, ring = B * N + 3, sizes["window"] + m + 1
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return np.array(jnp.asarray(rng.standard_normal(shape), dtype).astype(jnp.float32))

    whole = {
        name: normal(B, N * s // (d if name.startswith("cmp") else 1), K, Dk if name.endswith("k") else Dv)
        for name in ("cmp_k", "cmp_v", "slc_k", "slc_v", "win_k", "win_v")
    }
    tables = np.full((B, N), -1, np.int32)
    order = rng.permutation(P)
    paged = {
        name: normal(B, ring, *x.shape[2:]) if "win" in name else normal(P, K, x.shape[1] // N, x.shape[3])
        for name, x in whole.items()
    }
    for b, length in enumerate(lengths):
        used = -(-length // s)
        tables[b, :used] = order[b * N : b * N + used]
        for j in range(used):
            for name in ("cmp_k", "cmp_v", "slc_k", "slc_v"):
                size = whole[name].shape[1] // N
                paged[name][tables[b, j]] = whole[name][b, j * size : (j + 1) * size].swapaxes(0, 1)
        for p in range(max(0, length - ring), length):
            for name in ("win_k", "win_v"):
                paged[name][b, p % ring] = whole[name][b, p]
    q, gates = normal(B, m, H, Dk), rng.random((B, m, H, 3)).astype(np.float32)
    offsets = np.maximum(np.array(lengths, np.int32) - m, 0)
    return q, gates, whole, paged, offsets, tables


def expected(case, q, gates, whole, offset, b):
    """o and block indices of one row, dense; only its own tokens are there."""
    length, (_, m, _, _, Dk, _, sizes) = case[0][b], case
    scale, offset = Dk**-0.5, int(offset)
    blocks = {name: sizes[name] for name in ("compress_block", "compress_stride")}
    reach = max(length, offset + m)
    row = {
        name: x[b : b + 1, : -(-reach // (sizes["compress_stride"] if "cmp" in name else 1))]
        for name, x in whole.items()
    }
    q = q[b : b + 1]
    o_cmp, _ = dense.compressed_attention(q, row["cmp_k"], row["cmp_v"], None, offset, scale=scale, **blocks)
    Nb = -(-reach // sizes["select_block"])
    importance = dense.block_importance(
        q, row["cmp_k"], None, offset, Nb, select_block=sizes["select_block"], scale=scale, **blocks
    )
    choice = {"select_block": sizes["select_block"], "num_selected": sizes["num_selected"], **FORCED}
    indices = dense.select_from_importance(importance, None, offset, **choice)
    o_slc = dense.selected_attention(
        q,
        row["slc_k"],
        row["slc_v"],
        jnp.asarray(indices),
        None,
        offset,
        select_block=sizes["select_block"],
        scale=scale,
    )
    o_win = dense.window_attention(q, row["win_k"], row["win_v"], None, offset, window=sizes["window"], scale=scale)
    g = gates[b : b + 1]
    return (g[..., 0:1] * o_cmp + g[..., 1:2] * o_slc + g[..., 2:3] * o_win)[0], indices[0]


def check(case, dtype, tolerance, **static):
    q, gates, whole, paged, offsets, tables = inputs(case, dtype)
    arrays = [jnp.asarray(x, dtype) for x in (q, *paged.values())]
    arguments = (*arrays, jnp.asarray(gates), jnp.asarray(offsets), jnp.asarray(tables))
    run = jax.jit(functools.partial(decode_attention, **case[-1], **FORCED, scale=case[4] ** -0.5, **static))
    o, indices = run(*arguments)
    assert o.dtype == dtype
    with jax.default_device(jax.devices("cpu")[0]):
        for b, length in enumerate(case[0]):
            count = min(case[1], length)  # a row shorter than m has fewer queries that mean something
            want, blocks = expected(case, q, gates, whole, offsets[b], b)
            if dtype == jnp.float32:
                np.testing.assert_array_equal(indices[b][:, :count], blocks[:, :count])
            same = np.all(np.asarray(indices[b]) == blocks, axis=(0, 2))[:count]
            assert same.all() or dtype != jnp.float32
            got = np.asarray(o[b].astype(jnp.float32))[:count]
            assert dense.relative_error(got[same], np.asarray(want)[:count][same]) < tolerance, b
            assert np.isfinite(np.asarray(o[b].astype(jnp.float32))).all()
    return run, arguments, (o, indices)


@pytest.mark.parametrize("name", CASES)
def test_equals_dense(name):
    check(CASES[name], jnp.float32, 2e-6, interpret=True)


def test_unsupported_arguments_raise_not_implemented():
    q, gates, _, paged, offsets, tables = inputs(CASES["one token, ragged"], jnp.float32)
    sizes = {**SMALL, **FORCED, "interpret": True}
    with pytest.raises(NotImplementedError, match="scale"):
        decode_attention(jnp.asarray(q), *paged.values(), gates, offsets, tables, scale=-1.0, **sizes)
    wide = np.zeros((len(offsets), 40000), np.int32)
    with pytest.raises(NotImplementedError, match="40000 blocks"):
        decode_attention(jnp.asarray(q), *paged.values(), gates, offsets, wide, scale=1.0, **sizes)


@pytest.mark.parametrize("kind", ["NVIDIA H100", "NVIDIA A100"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("name", GPU_CASES)
def test_lowers_for_gpu(name, dtype, kind):
    case = GPU_CASES[name]
    q, gates, _, paged, offsets, tables = inputs((([70] * len(case[0])), *case[1:]), jnp.float32)
    arrays = [jax.ShapeDtypeStruct(x.shape, dtype) for x in (q, *paged.values(), gates)]
    arrays += [jax.ShapeDtypeStruct(x.shape, jnp.int32) for x in (offsets, tables)]
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=None, platform="gpu")
    run = functools.partial(decode_attention, **case[-1], **FORCED, scale=case[4] ** -0.5)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)):
        jax.jit(run).trace(*arrays).lower(lowering_platforms=("cuda",))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("name", GPU_CASES)
def test_gpu_equals_dense_and_repeats(name, dtype):
    with poisoned_outputs():
        run, arguments, results = check(GPU_CASES[name], dtype, 1e-4 if dtype == jnp.float32 else 1e-2)
    for a, b in zip(results, run(*arguments), strict=True):
        np.testing.assert_array_equal(a, b)
