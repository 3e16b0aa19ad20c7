"""Block selection kernels against sorting the dense float32 importance."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.block_selection import select_blocks
from pallas_kernels.block_selection import triton as block_selection
from pallas_kernels.triton_call import poisoned_outputs
from tests.pallas_kernels import dense

# B, T, H, K, D, block, stride, s, n, num_init, num_local, segments, query_offset
CASES = {
    "paper's blocks": (1, 500, 4, 2, 32, 32, 16, 64, 4, 1, 1, False, 0),
    "segments, odd group, no overlap": (2, 217, 3, 1, 48, 8, 8, 16, 5, 1, 2, True, 0),
    "last queries only, three strides a block, nothing forced": (1, 600, 12, 2, 32, 32, 16, 48, 4, 0, 0, False, 539),
    "more places than blocks": (1, 200, 2, 2, 32, 32, 16, 32, 16, 1, 2, False, 0),
}
GPU_CASES = {
    "paper's blocks": (1, 2048, 64, 4, 128, 32, 16, 64, 16, 1, 2, False, 0),
    "segments, Dk 192": (2, 1777, 12, 2, 192, 32, 16, 64, 8, 1, 2, True, 0),
    "so many blocks that kernels differ, offset": (1, 4500, 8, 2, 64, 16, 8, 16, 8, 1, 1, False, 3000),
    "one head a group, offset": (1, 3000, 4, 4, 64, 32, 16, 128, 4, 2, 1, False, 1001),
}


def inputs(case, dtype=jnp.float32, equal_keys=False):
    B, T, H, K, D, block, stride, s, n, num_init, num_local, segments, offset = case
    Nc = (T - block) // stride + 1
    keys = jax.random.split(jax.random.key(T), 2)
    q = jax.random.normal(keys[0], (B, T - offset, H, D), dtype)
    k = jax.random.normal(keys[1], (B, Nc, K, D), dtype)
    if equal_keys:
        k = jnp.broadcast_to(k[:, :1], k.shape)
    starts = None
    if segments:
        first = np.array([0, 64, 192])
        row = first[np.searchsorted(first, np.arange(offset, T), side="right") - 1]
        starts = jnp.broadcast_to(jnp.asarray(row, jnp.int32), (B, T - offset))
    compress = {"compress_block": block, "compress_stride": stride, "scale": D**-0.5}
    select = {"select_block": s, "num_selected": n, "num_init": num_init, "num_local": num_local}
    return q, k, starts, offset, compress, select


def expected_blocks(q, k, starts, offset, compress, select):
    """(indices by sorting, importance, lse), all from the dense reference."""
    q, k, starts = dense.on_cpu((q, k, starts))
    values = jnp.zeros_like(k[..., :1])
    _, lse = jax.jit(functools.partial(dense.compressed_attention, **compress))(q, k, values, starts, offset)
    blocks = -(-(offset + q.shape[1]) // select["select_block"])
    importance = functools.partial(dense.block_importance, num_blocks=blocks, select_block=select["select_block"])
    importance = jax.jit(functools.partial(importance, **compress))(q, k, starts, offset, lse=lse)
    chosen = dense.select_from_importance(importance, starts, offset, **select)
    return chosen, np.asarray(importance), jnp.asarray(np.asarray(lse))


def check(case, dtype, **static):
    q, k, starts, offset, compress, select = inputs(case, dtype)
    expected, importance, lse = expected_blocks(q, k, starts, offset, compress, select)
    actual = np.asarray(
        jax.jit(functools.partial(select_blocks, **compress, **select, **static))(q, k, lse, starts, jnp.int32(offset))
    )
    for b, h, t in zip(*np.nonzero((actual != expected).any(-1)), strict=True):
        # The only excuse is a near tie: what was swapped must be as important as what it replaced.
        ours, theirs = set(actual[b, h, t]) - set(expected[b, h, t]), set(expected[b, h, t]) - set(actual[b, h, t])
        assert len(ours) == len(theirs) > 0
        assert -1 not in ours | theirs
        swapped = [np.sort(importance[b, h, t, list(blocks)]) for blocks in (ours, theirs)]
        np.testing.assert_allclose(*swapped, rtol=1e-5)
    return actual


@pytest.mark.parametrize("name", CASES)
def test_blocks_equal_sorted_importance(name):
    check(CASES[name], jnp.float32, interpret=True)


def test_equal_keys_are_chosen_in_order_of_index():
    case = (1, 400, 4, 2, 32, 32, 16, 64, 4, 0, 1, False, 0)
    q, k, starts, offset, compress, select = inputs(case, equal_keys=True)
    _, _, lse = expected_blocks(q, k, starts, offset, compress, select)
    actual = jax.jit(functools.partial(select_blocks, **compress, **select, interpret=True))(q, k, lse, starts, offset)
    # Block 0 has no compressed token before it and weighs 7 against 8: it loses to every other whole block.
    np.testing.assert_array_equal(actual[0, :, 399], [[1, 2, 3, 6]] * 2)


def test_slabs_and_spans_change_nothing(monkeypatch):
    q, k, starts, offset, compress, select = inputs(CASES["paper's blocks"])
    expected, _, lse = expected_blocks(q, k, starts, offset, compress, select)
    monkeypatch.setattr(block_selection, "_LEAST_BLOCKS_TO_CUT", 2)
    problem = block_selection.Problem(32, 16, compress["scale"], True)
    selection = block_selection.Selection(64, 4, 1, 1)
    spans = block_selection.query_spans(q.shape[1], k.shape[1], 8, 0, problem, selection)
    assert len(spans) == 3
    actual = block_selection.choose(
        q, k, lse, starts, jnp.zeros((1,), jnp.int32), problem, selection, spans, scratch_bytes=40000
    )
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("first", [0, 70, 130, 380])
def test_kernels_are_sized_by_where_the_queries_are_found_to_end(monkeypatch, first):
    monkeypatch.setattr(block_selection, "_LEAST_BLOCKS_TO_CUT", 2)
    q, k, starts, _, compress, select = inputs(CASES["paper's blocks"])
    expected, _, lse = expected_blocks(q, k, starts, 0, compress, select)
    last = first + 60
    run = functools.partial(select_blocks, **compress, **select, interpret=True)
    part = (q[:, first:last], k, lse[:, :, first:last], starts, jnp.int32(first))
    np.testing.assert_array_equal(jax.jit(run)(*part), expected[:, :, first:last])
    assert str(jax.make_jaxpr(run)(*part)).count("block_selection_top_n") > 2  # for a quarter, a half and all blocks


def test_no_compressed_tokens_selects_the_only_block():
    q, k, lse = jnp.ones((1, 20, 2, 32)), jnp.ones((1, 0, 1, 32)), jnp.full((1, 2, 20), -jnp.inf)
    _, _, _, _, compress, select = inputs(CASES["paper's blocks"])
    actual = select_blocks(q, k, lse, None, 0, **compress, **select)
    np.testing.assert_array_equal(actual, np.broadcast_to([0, -1, -1, -1], (1, 1, 20, 4)))


def test_indices_carry_no_gradient():
    q, k, starts, offset, compress, select = inputs((1, 100, 2, 1, 32, 32, 16, 64, 2, 0, 1, False, 0))
    lse = jnp.ones((1, 2, 100))

    def total(q, k, lse):
        chosen = select_blocks(q, k, lse, starts, offset, **compress, **select, interpret=True)
        return jnp.sum(chosen * jnp.sum(q))

    grads = jax.grad(total, (0, 1, 2))(q, k, lse)
    assert not np.any(grads[1])
    assert not np.any(grads[2])


@pytest.mark.parametrize(("dtype", "heads", "message"), [(jnp.float64, 1, "dtype"), (jnp.float32, 65, "65 query")])
def test_unsupported_arguments_are_refused(dtype, heads, message):
    q, k = jax.ShapeDtypeStruct((1, 64, heads, 32), dtype), jax.ShapeDtypeStruct((1, 3, 1, 32), dtype)
    lse = jax.ShapeDtypeStruct((1, heads, 64), jnp.float32)
    _, _, _, _, compress, select = inputs(CASES["paper's blocks"])
    with pytest.raises(NotImplementedError, match=message):
        select_blocks(q, k, lse, None, 0, **compress, **select)


@pytest.mark.parametrize("device", ["NVIDIA H100", "NVIDIA A100"])
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        ((1, 65536, 64, 4, 128, 32, 16, 64, 16, 1, 2, False, 0), jnp.bfloat16),
        ((2, 1000, 12, 2, 192, 32, 16, 48, 5, 1, 2, True, 0), jnp.float16),
        ((1, 333, 64, 1, 80, 16, 8, 16, 16, 1, 2, False, 0), jnp.float32),
        ((1, 333, 2, 2, 32, 32, 16, 128, 2, 1, 1, False, 7), jnp.bfloat16),
        ((1, 65536, 64, 4, 128, 32, 16, 64, 16, 1, 2, False, 49152), jnp.bfloat16),
    ],
)
def test_lowers_for_gpus(device, case, dtype):
    q, k, starts = jax.eval_shape(lambda: inputs(case, dtype)[:3])
    *_, compress, select = inputs((1, 333, *case[2:-1], 0))
    lse = jax.ShapeDtypeStruct((q.shape[0], q.shape[2], q.shape[1]), jnp.float32)
    abstract = jax.sharding.AbstractDevice(device_kind=device, num_cores=None, platform="gpu")
    offset = jnp.int32(case[-1]) if case[-1] else 0
    run = jax.jit(lambda q, k, lse, starts: select_blocks(q, k, lse, starts, offset, **compress, **select))
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), abstract_device=abstract)):
        text = run.trace(q, k, lse, starts).lower(lowering_platforms=("cuda",)).as_text()
    assert "score" in text
    assert "top_n" in text


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("name", GPU_CASES)
def test_gpu_equals_sorted_importance_twice(name, dtype):
    with poisoned_outputs():
        first = check(GPU_CASES[name], dtype)
    np.testing.assert_array_equal(first, check(GPU_CASES[name], dtype))


@pytest.mark.gpu
def test_gpu_ties_go_to_the_lower_index():
    q, k, starts, offset, compress, select = inputs(GPU_CASES["paper's blocks"], jnp.bfloat16, equal_keys=True)
    _, _, lse = expected_blocks(q, k, starts, offset, compress, select)
    actual = np.asarray(select_blocks(q, k, lse, starts, offset, **compress, **select))
    # The first block is forced; the others weigh the same.
    np.testing.assert_array_equal(actual[0, :, -1], [[*range(14), 30, 31]] * 4)
