"""Every op of every backend against the reference: values, gradients, what must not be read, and the same bits twice.

On a GPU (`-m gpu`) the same properties hold of compiled kernels, at larger sizes and in every dtype.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nsa_jax import num_compressed, reference
from nsa_jax.backends.choice import Backward, Forward
from nsa_jax.testing import assert_same_blocks, normwise_error, tolerance_of
from pallas_kernels.differentiable import Op
from tests.pallas_kernels import cases
from tests.pallas_kernels.cases import BACKENDS, BRANCHES, CASES, GPU_CASES, Case, Inputs, Results

INTERPRETED = 2e-6  # float32
HUGE = 3e38

each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_dtype = pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])


def each(ops, of: dict[str, Case], exhaustive=()):
    """Every backend and op with every case that is for them."""
    found = [
        (op, name, backend)
        for backend in BACKENDS
        for name, case in of.items()
        for op in ops
        if op in case.ops and backend in case.backends
    ]
    marked = [pytest.param(*one, marks=[pytest.mark.exhaustive] * (one[:2] in exhaustive)) for one in found]
    return pytest.mark.parametrize(("op", "name", "backend"), marked)


def skip_unless_taken(backend: str, dtype: Any) -> None:
    if dtype not in cases.DTYPES[backend]:
        pytest.skip(f"{backend} refuses {jnp.dtype(dtype)}")


def close(what: str, actual: jax.Array, expected: jax.Array, tolerance: float) -> None:
    error = normwise_error(actual, expected)
    assert error <= tolerance, f"{what}: normwise error {error:.3g} above {tolerance:.3g}"


def same_bits(actual: Any, expected: Any) -> None:
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def check_branch(
    backend: str, op: str, case: Case, dtype: Any, tolerance: float, *, tile: Any = None, **backward_tiles: Any
) -> tuple[Any, Inputs, Results]:
    """Both passes of a branch; returns the compiled call, its inputs and what it gave."""
    forward, backward = cases.function(backend, op), cases.function(backend, op + "_backward", case)
    if tile is not None:
        forward = functools.partial(forward, tile=tile)
    inputs = cases.inputs(case, dtype)
    run = functools.partial(cases.results, forward, functools.partial(backward, **backward_tiles), op, case)
    if case.traced:
        compiled = functools.partial(jax.jit(run), offset=case.offset)
    else:
        compiled = jax.jit(functools.partial(run, offset=case.query_offset))
    actual, expected = compiled(inputs), cases.expected_results(op, case, inputs)
    check_results(actual, expected, dtype, tolerance)
    return compiled, inputs, actual


def check_results(actual: Results, expected: Results, dtype: Any, tolerance: float) -> None:
    assert actual.lse.dtype == actual.gradients.delta.dtype == jnp.float32
    seen = np.isfinite(expected.lse)
    np.testing.assert_array_equal(np.isneginf(actual.lse), ~seen)
    np.testing.assert_allclose(np.asarray(actual.lse)[seen], np.asarray(expected.lse)[seen], atol=1e-5, rtol=1e-5)
    names = ("o", "dq", "dk", "dv")
    for name, a, b in zip(names, (actual.o, *actual.gradients[:3]), (expected.o, *expected.gradients[:3]), strict=True):
        assert a.dtype == dtype
        close(name, a, b, tolerance)
    deltas = (np.asarray(x.gradients.delta)[seen] for x in (actual, expected))
    close("delta", *deltas, tolerance)
    assert not np.any(np.asarray(actual.o)[~np.swapaxes(seen, 1, 2)])


def unseen(expected: Results, gradient: jax.Array) -> np.ndarray:
    """Which keys no query sees: those whose value has no gradient at all."""
    return np.broadcast_to(~np.any(np.asarray(expected.gradients.dv), axis=-1, keepdims=True), gradient.shape)


def check_unseen_keys_change_nothing(
    op: str, case: Case, compiled: Any, inputs: Inputs, actual: Results, value: float
) -> None:
    """Keys and values that no query sees may hold anything, and get no gradient.

    Only those that straddle two of the call's segments must be finite.
    """
    q, k, v, *_ = cases.arguments(op, inputs)
    expected = cases.expected_results(op, case, inputs)
    hidden_k, hidden_v = (unseen(expected, x) for x in (k, v))
    values = np.full((*k.shape[:3], 1), np.nan)
    if op == "compressed_attention" and inputs.starts is not None:
        token = np.arange(k.shape[1]) * case.config.compress_stride
        come = token + case.config.compress_block <= case.query_offset + case.num_queries
        values[come & (token >= np.asarray(inputs.starts)[:, :1])] = value  # of these, the hidden ones straddle
    for poison in (values, np.full_like(values, value)):
        huge = jnp.asarray(poison, q.dtype)
        changed = cases.with_keys(op, inputs, jnp.where(hidden_k, huge, k), jnp.where(hidden_v, -huge, v))
        same_bits(compiled(changed), actual)
    assert not np.any(np.asarray(actual.gradients.dk)[hidden_k])
    assert not np.any(np.asarray(actual.gradients.dv)[hidden_v])


def check_finite_keys_reach_only_who_sees_them(op: str, case: Case, compiled: Any, inputs: Inputs) -> None:
    """Huge numbers in late keys change nothing for the queries before them, nor for what these send back."""
    row = case.num_queries // 2
    position = case.query_offset + row
    first = num_compressed(position, case.config) if op == "compressed_attention" else position
    _, k, v, *_ = cases.arguments(op, inputs)
    if first >= k.shape[1]:
        return
    inputs = inputs._replace(do=inputs.do.at[:, row:].set(0), dlse=inputs.dlse.at[:, :, row:].set(0))
    large = 1e30 if k.dtype == jnp.float32 else 1e3
    changed = cases.with_keys(op, inputs, k.at[:, first:].set(large), v.at[:, first:].set(-large))
    actual, expected = compiled(changed), compiled(inputs)
    pairs = zip(actual.gradients[:3], expected.gradients[:3], (row, first, first), strict=True)
    for a, b, end in ((actual.o, expected.o, row), *pairs):
        same_bits(a[:, :end], b[:, :end])


def check_blocks_that_no_query_selected_are_not_read(case: Case, compiled: Any, inputs: Inputs) -> None:
    """They hold NaN, which nothing that reads it gets rid of."""
    s = case.config.select_block
    own = (case.query_offset + np.arange(case.num_queries)) // s
    alone = np.full(inputs.block_indices.shape, -1, np.int32)
    alone[..., 0] = own
    inputs = inputs._replace(block_indices=jnp.asarray(alone))
    op, first = "selected_attention", own[0] * s  # every query reads its own block and no other
    _, k, v, _ = cases.arguments(op, inputs)
    poisoned = cases.with_keys(op, inputs, k.at[:, :first].set(jnp.nan), v.at[:, :first].set(jnp.nan))
    same_bits(compiled(poisoned), compiled(inputs))


# What others show in part, here or in the tests of residuals and of Triton's tiles.
REPEATED = {
    *((op, "group of 4, odd length") for op in (*BRANCHES, "select_blocks")),
    *((op, "segments and offset, one head a group, no overlap") for op in BRANCHES[:2]),
    *((op, "last queries only, group of 16, 192 and 128, s = 48, nothing forced") for op in BRANCHES[1:]),
    ("selected_attention", "shorter than a compressed token"),
    ("selected_attention", "1 block, two heads a group"),
    ("selected_attention", "40 blocks, segments, last queries only"),
    ("selected_attention", "64 rows: 1 block, group of 32"),
    ("selected_attention", "64 rows: 5 blocks, group of 8"),
    ("selected_attention", "64 rows: 40 blocks, last queries only, group of 64"),
    ("window_attention", "segments, group of 3, s = 24"),
}


@each(BRANCHES, CASES, REPEATED)
def test_values_and_gradients_equal_the_reference(backend, op, name):
    case, dtype = CASES[name], cases.INTERPRETED_DTYPE[backend]
    compiled, inputs, actual = check_branch(backend, op, case, dtype, cases.INTERPRETED_TOLERANCE[backend])
    same_bits(compiled(inputs), actual)
    check_unseen_keys_change_nothing(op, case, compiled, inputs, actual, HUGE if dtype == jnp.float32 else 1e4)
    check_finite_keys_reach_only_who_sees_them(op, case, compiled, inputs)
    if op == "selected_attention":
        check_blocks_that_no_query_selected_are_not_read(case, compiled, inputs)


def check_blocks(backend: str, case: Case, dtype: Any) -> tuple[Any, jax.Array]:
    """The selection from the reference's lse; returns the compiled call with its arguments, and what it gave."""
    select = cases.function(backend, "select_blocks")
    inputs = cases.inputs(case, dtype)
    q, k, starts = cases.exact((inputs.q, inputs.kv.cmp_k, inputs.starts))
    static = case.options

    @jax.jit
    def expect(q, k, starts):
        places = (starts, case.query_offset)
        _, lse = reference.compressed_attention(q, k, k, *places, **static)
        blocks = reference.select_blocks(q, k, lse, *places, **static)
        return lse, blocks, reference.block_importance(q, k, lse, *places, **static)

    lse, blocks, importance = expect(q, k, starts)
    run = functools.partial(select, **static)
    arguments = (inputs.q, inputs.kv.cmp_k, jnp.asarray(np.asarray(lse)), inputs.starts)
    if case.traced:
        compiled = functools.partial(jax.jit(run), *arguments, case.offset)
    else:
        compiled = functools.partial(jax.jit(lambda *arguments: run(*arguments, case.query_offset)), *arguments)
    actual = compiled()
    assert actual.dtype == jnp.int32
    assert_same_blocks(actual, blocks, importance)
    return compiled, actual


@each(["select_blocks"], CASES, REPEATED)
def test_blocks_are_those_of_highest_importance(backend, op, name):
    compiled, actual = check_blocks(backend, CASES[name], cases.INTERPRETED_DTYPE[backend])
    same_bits(compiled(), actual)


def blocks_of_equal_keys(backend: str, case: Case, dtype: Any) -> jax.Array:
    inputs = cases.inputs(case, dtype)
    q, k = inputs.q, jnp.broadcast_to(inputs.kv.cmp_k[:, :1], inputs.kv.cmp_k.shape)
    _, lse = jax.jit(functools.partial(reference.compressed_attention, **case.options))(
        *cases.exact((q, k, k)), None, 0
    )
    select = functools.partial(cases.function(backend, "select_blocks"), **case.options)
    return np.asarray(jax.jit(select)(q, k, jnp.asarray(np.asarray(lse)), None, 0))


@each_backend
def test_equal_keys_are_chosen_in_order_of_index(backend):
    case = cases.fitted(backend, Case(400, 4, 2, 32, 32, cases.NSAConfig(32, 16, 64, 4, 0, 1)))
    blocks = blocks_of_equal_keys(backend, case, cases.INTERPRETED_DTYPE[backend])
    # Block 0 has no compressed token before it and weighs 7 against 8: it loses to every other whole block.
    np.testing.assert_array_equal(blocks[0, :, 399], [[1, 2, 3, 6]] * 2)


@each_backend
def test_the_newest_compressed_token_of_the_last_query_is_scored(backend):
    """It ends with the last query's own token, because d divides T - l."""
    case = cases.fitted(backend, Case(192, 1, 1, 32, 32, cases.NSAConfig(num_selected=2, num_local=0)))
    dtype = cases.INTERPRETED_DTYPE[backend]
    q = jnp.ones((1, case.T, case.H, case.Dk), dtype)
    k = jnp.zeros((1, case.num_compressed, 1, case.Dk), dtype).at[:, -1].set(1.0).at[:, 5].set(0.1)

    @jax.jit
    def expect(q, k):
        _, lse = reference.compressed_attention(q, k, k, None, 0, **case.options)
        return lse, reference.select_blocks(q, k, lse, None, 0, **case.options)

    lse, expected = expect(q, k)
    np.testing.assert_array_equal(expected[0, 0, -1], [0, 2])  # nothing forces block 2 but the newest token's score
    select = functools.partial(cases.function(backend, "select_blocks"), **case.options)
    np.testing.assert_array_equal(jax.jit(lambda *arrays: select(*arrays, None, 0))(q, k, lse), expected)


@each_backend
def test_blocks_carry_no_gradient(backend):
    case = cases.fitted(backend, Case(100, 2, 1, 32, 32, cases.NSAConfig(32, 16, 64, 2, 0, 1), traced=False))
    select = functools.partial(cases.function(backend, "select_blocks"), **case.options)
    shapes = cases.shapes(case, cases.INTERPRETED_DTYPE[backend])

    def tangents(*arrays):
        blocks, tangent = jax.jvp(lambda *arrays: select(*arrays, None, 0), arrays, arrays)
        assert tangent.dtype == jax.dtypes.float0
        return blocks

    assert jax.eval_shape(tangents, shapes.q, shapes.kv.cmp_k, shapes.dlse).dtype == jnp.int32


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # infinite gradients, multiplied by numpy
@each_backend
def test_queries_that_see_nothing_give_zero_and_no_gradient(backend):
    case = cases.fitted(backend, Case(40, 2, 1, 32, 32, cases.NSAConfig(), traced=False))
    inputs = cases.inputs(case, cases.INTERPRETED_DTYPE[backend])
    forward = cases.function(backend, "compressed_attention")
    backward = cases.function(backend, "compressed_attention_backward")
    run = jax.jit(functools.partial(cases.results, forward, backward, "compressed_attention", case, offset=0))
    infinite = jnp.full(inputs.dlse.shape, jnp.inf)  # what d exp(-lse) would send back
    o, lse, (dq, dk, dv, _) = run(inputs._replace(dlse=infinite))
    assert not np.any(o[:, :31])
    assert np.all(np.isneginf(lse[:, :, :31]))
    assert not np.any(dq[:, :31])
    assert np.all(np.isfinite(o))
    _, _, (dq, dk, dv, _) = run(inputs._replace(dlse=infinite.at[:, :, 31:].set(0.0)))
    assert all(np.all(np.isfinite(x)) for x in (dq, dk, dv))


@pytest.mark.exhaustive
@each_backend
def test_a_window_of_one_returns_the_values(backend):
    case = cases.fitted(backend, Case(70, 4, 2, 32, 32, cases.NSAConfig(window=1), traced=False))
    inputs = cases.inputs(case, cases.INTERPRETED_DTYPE[backend])
    window = functools.partial(cases.function(backend, "window_attention"), **case.options)
    o, _ = jax.jit(lambda q, k, v: window(q, k, v, None, 0))(inputs.q, inputs.kv.win_k, inputs.kv.win_v)
    np.testing.assert_allclose(o, jnp.repeat(inputs.kv.win_v, case.H // case.K, axis=2), rtol=1e-6)


@each_backend
@pytest.mark.parametrize(
    ("op", "others"),
    [
        *((op, "backward") for op in BRANCHES),
        *(pytest.param(op, "forward", marks=pytest.mark.exhaustive) for op in BRANCHES),
    ],
)
def test_a_pass_of_another_backend_takes_or_gives_the_same_residuals(backend, op, others):
    """The other pass is pure JAX's, whose backward pass is derived from its forward pass."""
    sizes = cases.NSAConfig(16, 8, 16, 3, 1, 1, 9)
    case = cases.fitted(backend, Case(70, 3, 1, 32, 24, sizes, query_offset=37, segments=(43,)))
    tolerance = cases.INTERPRETED_TOLERANCE[backend]
    cases.function(backend, op), cases.function(backend, op + "_backward")
    mixed = Op(
        Forward(op, "xla" if others == "forward" else backend),
        Backward(op, "xla" if others == "backward" else backend),
        returns_lse=True,
    )
    inputs = cases.inputs(case, cases.INTERPRETED_DTYPE[backend])
    expected = cases.expected_results(op, case, inputs)

    @jax.jit
    def run(inputs: Inputs, offset: jax.Array) -> Any:
        q, k, v, *blocks = cases.arguments(op, inputs)
        out, pullback = jax.vjp(lambda q, k, v: mixed(q, k, v, *blocks, inputs.starts, offset, **case.options), q, k, v)
        return out, pullback((inputs.do, inputs.dlse))

    (o, _), gradients = run(inputs, case.offset)
    close("o", o, expected.o, tolerance)
    for name, a, b in zip(("dq", "dk", "dv"), gradients, expected.gradients[:3], strict=True):
        close(name, a, b, tolerance)


@each_backend
@pytest.mark.exhaustive
@pytest.mark.parametrize("op", BRANCHES)
def test_vmap_scan_and_remat_give_the_same_gradients(backend, op):
    case = cases.fitted(backend, Case(48, 2, 1, 32, 32, cases.NSAConfig(32, 16, 32, 2, 0, 1, 20), B=2, traced=False))
    attend = Op(cases.function(backend, op), cases.function(backend, op + "_backward"))
    q, k, v, *blocks = cases.arguments(op, cases.inputs(case, cases.INTERPRETED_DTYPE[backend]))

    def loss(q, k, v, *blocks):
        return jnp.sum(jnp.sin(attend(q, k, v, *blocks, None, 0, **case.options).astype(jnp.float32)))

    def mapped(*arrays):
        return jnp.sum(jax.vmap(loss)(*(x[:, None] for x in arrays)))

    def scanned(*arrays):
        step = cases.rematerialised(backend, lambda total, x: (total + loss(*x), None))
        return jax.lax.scan(step, 0.0, tuple(x[:, None] for x in arrays))[0]

    expected = jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v, *blocks)
    for transformed in (mapped, scanned):
        for a, b in zip(jax.jit(jax.grad(transformed, (0, 1, 2)))(q, k, v, *blocks), expected, strict=True):
            close(transformed.__name__, a, b, 1e-6)


@pytest.mark.gpu
@each_dtype
@each(BRANCHES, GPU_CASES)
def test_gpu_values_and_gradients_equal_the_reference_twice(backend, op, name, dtype):
    skip_unless_taken(backend, dtype)
    case = GPU_CASES[name]
    with cases.poisoned(backend):
        compiled, inputs, actual = check_branch(backend, op, case, dtype, tolerance_of(dtype))
    same_bits(compiled(inputs), actual)
    check_unseen_keys_change_nothing(op, case, compiled, inputs, actual, HUGE if dtype == jnp.float32 else 1e4)
    check_finite_keys_reach_only_who_sees_them(op, case, compiled, inputs)
    if op == "selected_attention":
        check_blocks_that_no_query_selected_are_not_read(case, compiled, inputs)


@pytest.mark.gpu
@each_dtype
@each(["select_blocks"], GPU_CASES)
def test_gpu_blocks_are_those_of_highest_importance_twice(backend, op, name, dtype):
    skip_unless_taken(backend, dtype)
    with cases.poisoned(backend):
        compiled, actual = check_blocks(backend, GPU_CASES[name], dtype)
    same_bits(compiled(), actual)


@pytest.mark.gpu
@each_backend
@pytest.mark.parametrize("op", BRANCHES)
def test_gpu_values_and_gradients_by_tiles_of_ones_own_equal_the_reference(backend, op):
    case = next(case for case in GPU_CASES.values() if op in case.ops and backend in case.backends)
    tiles = cases.TILES[backend][op]
    check_branch(backend, op, case, jnp.bfloat16, tolerance_of(jnp.bfloat16), **tiles)


@pytest.mark.gpu
@each_backend
def test_gpu_ties_go_to_the_lower_index(backend):
    actual = blocks_of_equal_keys(backend, GPU_CASES["paper's sizes"], jnp.bfloat16)
    # The first block is forced; the others weigh the same.
    np.testing.assert_array_equal(actual[0, :, -1], [[*range(14), 31, 32]] * 4)
