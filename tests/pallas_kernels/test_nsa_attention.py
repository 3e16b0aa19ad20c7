"""All branches as one op against dense float32 branches and their gated sum, forward and every gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from pallas_kernels import block_selection, compressed_attention, nsa_attention
from pallas_kernels.triton_call import poisoned_outputs, triton_call
from tests.pallas_kernels import dense

COMPRESS = {"compress_block": 16, "compress_stride": 8}
SELECT = {"select_block": 16, "num_selected": 3, "num_init": 1, "num_local": 1}
# B, T, H, K, Dk, Dv, segments, query_offset, sizes
CASES = {
    "plain": (1, 80, 8, 2, 32, 32, False, 0, COMPRESS | SELECT | {"window": 20}),
    "segments, offset, odd group, odd heads": (2, 70, 6, 2, 48, 40, True, 37, COMPRESS | SELECT | {"window": 9}),
}
DEFAULT = {"compress_block": 32, "compress_stride": 16, "select_block": 64, "num_selected": 16, "num_init": 1}
DEFAULT |= {"num_local": 2, "window": 512}
GPU_CASES = {
    "plain": (1, 2100, 64, 4, 128, 128, False, 0, DEFAULT),
    "192 and 128, segments": (2, 1555, 32, 2, 192, 128, True, 0, DEFAULT),
    "one head a group, odd heads": (1, 1300, 4, 4, 64, 40, True, 0, DEFAULT),
    "64 heads a group, offset": (1, 1300, 64, 1, 64, 64, False, 301, DEFAULT),
}
NAMES = ("o", "dq", "dcmp_k", "dcmp_v", "dslc_k", "dslc_v", "dwin_k", "dwin_v", "dgates")


def shapes(case):
    """Of q, the six keys and values, the gates, and the cotangent."""
    B, T, H, K, Dk, Dv, _, offset, sizes = case
    Tq, Nc = T - offset, (T - sizes["compress_block"]) // sizes["compress_stride"] + 1
    keys = [(B, length, K, D) for length in (Nc, T, T) for D in (Dk, Dv)]
    return (B, Tq, H, Dk), *keys, (B, Tq, H, 3), (B, Tq, H, Dv)


def inputs(case, dtype):
    B, T, *_, segments, offset, _ = case
    keys = jax.random.split(jax.random.key(T), 9)
    arrays = [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes(case), strict=True)]
    arrays[7] = jax.nn.sigmoid(arrays[7].astype(jnp.float32))
    first = jnp.where(jnp.arange(offset, T, dtype=jnp.int32) >= 43, 43, 0)
    return tuple(arrays), jnp.broadcast_to(first, (B, T - offset)) if segments else None


def composed(q, cmp_k, cmp_v, slc_k, slc_v, win_k, win_v, gates, starts, offset, *, indices, scale, **sizes):
    """The same from dense branches, given the selection."""
    compress = {name: sizes[name] for name in ("compress_block", "compress_stride")}
    o_cmp, _ = dense.compressed_attention(q, cmp_k, cmp_v, starts, offset, scale=scale, **compress)
    o_slc = dense.selected_attention(
        q, slc_k, slc_v, indices, starts, offset, select_block=sizes["select_block"], scale=scale
    )
    o_win = dense.window_attention(q, win_k, win_v, starts, offset, window=sizes["window"], scale=scale)
    return gates[..., 0:1] * o_cmp + gates[..., 1:2] * o_slc + gates[..., 2:3] * o_win


def results(op, arrays, starts, offset, **static):
    """o and the gradients, in the order of NAMES."""
    *primals, do = arrays
    o, pullback = jax.vjp(lambda *primals: op(*primals, starts, offset, **static), *primals)
    return o, *pullback(do.astype(o.dtype))


def selection(arrays, starts, offset, *, scale, interpret, window, **sizes):
    """The blocks that the fused op chooses: those of its own two ops."""
    q, cmp_k, cmp_v = arrays[:3]
    compress = {name: sizes[name] for name in ("compress_block", "compress_stride")}
    static = {"scale": scale, "interpret": interpret}
    lse = compressed_attention.compressed_attention(q, cmp_k, cmp_v, starts, offset, **compress, **static)[1]
    return block_selection.select_blocks(q, cmp_k, lse, starts, offset, **sizes, **static)


def check(case, dtype, tolerance, interpret):
    arrays, starts = inputs(case, dtype)
    offset, sizes = jnp.int32(case[-2]), case[-1] | {"scale": case[4] ** -0.5}
    run = jax.jit(functools.partial(results, nsa_attention.nsa_attention, interpret=interpret, **sizes))
    actual = run(arrays, starts, offset)
    indices = jax.jit(functools.partial(selection, interpret=interpret, **sizes))(arrays, starts, offset)
    given = jax.jit(functools.partial(nsa_attention.nsa_attention, interpret=interpret, **sizes))
    np.testing.assert_array_equal(given(*arrays[:-1], starts, offset, indices), actual[0])
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), arrays)
    exact, indices, first = dense.on_cpu((exact, indices, starts))
    reference = jax.jit(functools.partial(results, functools.partial(composed, indices=indices), **sizes))
    expected = reference(exact, first, case[-2])
    for name, a, b in zip(NAMES, actual, expected, strict=True):
        assert a.dtype == (jnp.float32 if name == "dgates" else dtype), name
        assert dense.relative_error(a.astype(jnp.float32), b) < tolerance, name
    return functools.partial(run, arrays, starts, offset), actual


@pytest.mark.parametrize("name", [pytest.param("plain", marks=pytest.mark.exhaustive), *list(CASES)[1:]])
def test_forward_and_gradients_equal_dense(name):
    check(CASES[name], jnp.float32, 2e-6, interpret=True)


def test_no_compressed_token_raises_not_implemented():
    arrays = [jnp.ones(shape) for shape in shapes(CASES["plain"])[:-1]]
    arrays[1], arrays[2] = arrays[1][:, :0], arrays[2][:, :0]
    with pytest.raises(NotImplementedError, match="0 compressed tokens"):
        nsa_attention.nsa_attention(*arrays, None, 0, scale=1.0, interpret=True, **CASES["plain"][-1])


@pytest.mark.exhaustive
def test_vmap_scan_and_remat_give_the_same_gradients():
    case = (2, 48, 4, 2, 32, 32, False, 0, COMPRESS | SELECT | {"window": 20})
    (*arrays, do), _ = inputs(case, jnp.float32)
    op = functools.partial(nsa_attention.nsa_attention, interpret=True, scale=case[4] ** -0.5, **case[-1])

    def loss(op, *arrays):
        return jnp.sum(op(*arrays) * do)

    def plain(*arrays):
        return op(*arrays, None, 0)

    def each(*arrays):  # one sequence at a time, through the other axis
        return jax.vmap(lambda *one: plain(*(x[None] for x in one))[0])(*arrays)

    def scanned(*arrays):
        body = jax.checkpoint(lambda carry, one: (carry, plain(*(x[None] for x in one))[0]))
        return jax.lax.scan(body, 0, arrays)[1]

    wanted = jax.jit(jax.value_and_grad(functools.partial(loss, plain), argnums=range(8)))(*arrays)
    for other in (each, scanned):
        actual = jax.jit(jax.value_and_grad(functools.partial(loss, other), argnums=range(8)))(*arrays)
        for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
            assert dense.relative_error(a, b) < 2e-6


def test_vmap_of_a_grid_too_long_for_cuda_is_refused():
    call = triton_call(
        lambda x_ref, o_ref: None,
        name="long",
        grid=(65536, 1),
        in_specs=pl.no_block_spec,
        out_specs=pl.no_block_spec,
        out_shape=jax.ShapeDtypeStruct((4,), jnp.float32),
        num_warps=4,
        num_stages=1,
        interpret=True,
    )
    x = jax.ShapeDtypeStruct((3, 4), jnp.float32)
    with pytest.raises(NotImplementedError, match="vmap of long with 65536 programs"):
        jax.eval_shape(jax.vmap(call), x)


@pytest.mark.parametrize("kind", ["NVIDIA H100", "NVIDIA A100"])
@pytest.mark.parametrize("name", GPU_CASES)
def test_lowers_for_gpu(name, kind):
    case = GPU_CASES[name]
    B, T, *_, segments, offset, sizes = case
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes(case)]
    arrays[7] = jax.ShapeDtypeStruct(arrays[7].shape, jnp.float32)
    starts = jax.ShapeDtypeStruct((B, T - offset), jnp.int32) if segments else None
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=None, platform="gpu")
    run = functools.partial(results, nsa_attention.nsa_attention, offset=offset, scale=case[4] ** -0.5, **sizes)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)):
        jax.jit(run).trace(tuple(arrays), starts).lower(lowering_platforms=("cuda",))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("name", GPU_CASES)
def test_gpu_forward_and_gradients_equal_dense_and_repeat(name, dtype):
    with poisoned_outputs():
        run, actual = check(GPU_CASES[name], dtype, 1e-4 if dtype == jnp.float32 else 1e-2, interpret=False)
    for a, b in zip(actual, run(), strict=True):
        np.testing.assert_array_equal(a, b)
