"""`reference` and `xla` against a float64 NumPy brute force written from the equations alone."""

import contextlib
import dataclasses

import brute_force
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from strategies import Arrays, Case, cases, kernel_cases, random_arrays

import nsa_jax
from nsa_jax import BranchKV, NSAConfig
from nsa_jax.attention import AttentionInputs
from nsa_jax.compression import compress
from nsa_jax.testing import assert_matches_reference
from pallas_kernels.block_selection import triton as block_selection

TOLERANCE = {"float32": 1e-6, "float64": 1e-12}
# A float32 ranking may differ from the float64 one where the importances at the cut are closer than this (relative).
SMALLEST_FLOAT32_MARGIN = 1e-5

each_implementation = pytest.mark.parametrize("implementation", ["reference", "xla"])
each_dtype = pytest.mark.parametrize("dtype", ["float32", "float64"])

# Nearly all of the time goes into compiling, every problem having its own shapes: compile fast, run slowly.
FAST_COMPILATION = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def precision(dtype):
    return jax.enable_x64(True) if dtype == "float64" else contextlib.nullcontext()


def each_op(arrays, lse, block_indices, **options):
    """The four ops apart; selection and selected attention start from the lse and the blocks given."""
    q, kv = arrays.q, arrays.kv
    options["segment_ids"] = arrays.segment_ids
    o, own_lse = nsa_jax.compressed_attention(q, kv.cmp_k, kv.cmp_v, **options)
    chosen = nsa_jax.select_blocks(q, kv.cmp_k, lse, **options)
    options["return_lse"] = True
    o_slc, selected_lse = nsa_jax.selected_attention(q, kv.slc_k, kv.slc_v, block_indices, **options)
    o_win, window_lse = nsa_jax.window_attention(q, kv.win_k, kv.win_v, **options)
    return {
        "compressed": o,
        "lse": own_lse,
        "block_indices": chosen,
        "selected": o_slc,
        "selected_lse": selected_lse,
        "window": o_win,
        "window_lse": window_lse,
    }


def whole(arrays, **options):
    """The whole of NSA, each branch from what the library itself computed before it."""
    return {"nsa": nsa_jax.nsa_attention(arrays.q, arrays.kv, arrays.gates, segment_ids=arrays.segment_ids, **options)}


def run(function, *arguments, query_offset=0, traced_offset=False, **options):
    """`function` as one compiled call, with `query_offset` traced or a Python int; results as NumPy arrays."""

    def call(offset, *arguments):
        return function(*arguments, query_offset=offset, **options)

    static = () if traced_offset else (0,)
    offset = np.int32(query_offset) if traced_offset else query_offset
    results = jax.jit(call, static_argnums=static, compiler_options=FAST_COMPILATION)(offset, *arguments)
    return {name: np.asarray(result) for name, result in results.items()}


def run_brute_force(arrays, **options):
    """What `each_op` and `whole` should give, in float64, and the margin of the selection."""
    q, kv = arrays.q, arrays.kv
    options["segment_ids"] = arrays.segment_ids
    o, lse = brute_force.compressed_attention(q, kv.cmp_k, kv.cmp_v, **options)
    block_indices, margin = brute_force.select_blocks_and_margin(q, kv.cmp_k, lse, **options)
    options["return_lse"] = True
    o_slc, selected_lse = brute_force.selected_attention(q, kv.slc_k, kv.slc_v, block_indices, **options)
    o_win, window_lse = brute_force.window_attention(q, kv.win_k, kv.win_v, **options)
    return {
        "compressed": o,
        "lse": lse,
        "block_indices": block_indices,
        "margin": margin,
        "selected": o_slc,
        "selected_lse": selected_lse,
        "window": o_win,
        "window_lse": window_lse,
    }


def run_each_op(arrays, expected, dtype, **options):
    """`each_op` fed with the brute force's lse and blocks."""
    return run(each_op, arrays, expected["lse"].astype(dtype), expected["block_indices"], **options)


def assert_close(name, actual, expected, tolerance, least_norm=0.0):
    """Normwise relative error below `tolerance`; an all-zero expectation must be met exactly."""
    assert actual.shape == expected.shape, f"{name}: shape {actual.shape}, expected {expected.shape}"
    assert np.isfinite(actual).all(), f"{name}: not finite"
    error = np.linalg.norm(actual.astype(np.float64) - expected)
    norm = max(np.linalg.norm(expected), least_norm)
    assert error <= tolerance * norm, f"{name}: relative error {error / norm if norm else error:.2e}"


def decided_rows(expected, dtype):
    """[B, K, Tq]: the queries whose selection does not hang on rounding."""
    least = SMALLEST_FLOAT32_MARGIN if dtype == "float32" else 0.0
    return expected["margin"] >= least


def assert_each_op_agrees(actual, expected, dtype):
    tolerance = TOLERANCE[dtype]
    for name in ("compressed", "selected", "window"):
        assert actual[name].dtype == dtype
        assert_close(name, actual[name], expected[name], tolerance)

    sees_nothing = np.isneginf(expected["lse"])
    np.testing.assert_array_equal(np.isneginf(actual["lse"]), sees_nothing)
    np.testing.assert_array_equal(actual["compressed"][sees_nothing.swapaxes(1, 2)], 0)
    # An lse near 0 is the difference of terms of size 1: its error is measured against theirs.
    seen = {"lse": ~sees_nothing, "selected_lse": ..., "window_lse": ...}
    for name, rows in seen.items():
        some = expected[name][rows]
        assert_close(name, actual[name][rows], some, tolerance, least_norm=np.sqrt(some.size))

    assert actual["block_indices"].dtype == np.int32
    rows = decided_rows(expected, dtype)
    np.testing.assert_array_equal(actual["block_indices"][rows], expected["block_indices"][rows])


@pytest.mark.parametrize(("implementation", "dtype"), [("reference", "float64"), ("xla", "float32")])
@settings(max_examples=12, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases())
def test_each_op_agrees_on_random_problems(implementation, dtype, case: Case):
    compare_each_op(implementation, dtype, case)


@pytest.mark.exhaustive
@each_dtype
@each_implementation
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases())
def test_each_op_agrees_on_many_random_problems(implementation, dtype, case: Case):
    compare_each_op(implementation, dtype, case)


@pytest.mark.exhaustive
@settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow])
@given(case=kernel_cases())
def test_each_op_of_triton_agrees_on_random_problems(case: Case):
    compare_each_op("triton", "float32", case)


@pytest.mark.exhaustive
@settings(max_examples=6, suppress_health_check=[HealthCheck.too_slow])
@given(case=kernel_cases())
def test_gradients_of_triton_agree_on_random_problems(case: Case):
    arrays = random_arrays(case, "float32")
    ids = None if arrays.segment_ids is None else jnp.asarray(arrays.segment_ids)
    offset = jnp.int32(case.offset) if case.traced_offset else case.offset
    inputs = AttentionInputs(*jax.tree.map(jnp.asarray, arrays[:3]), ids, offset)
    assert_matches_reference(inputs, case.config, implementation="triton", scale=case.scale)


def compare_each_op(implementation, dtype, case: Case):
    arrays = random_arrays(case, dtype)
    options = dict(config=case.config, scale=case.scale, query_offset=case.offset)
    expected = run_brute_force(arrays, **options)
    with precision(dtype):
        actual = run_each_op(
            arrays, expected, dtype, traced_offset=case.traced_offset, implementation=implementation, **options
        )
    assert_each_op_agrees(actual, expected, dtype)


@each_dtype
@each_implementation
@settings(max_examples=6, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases())
def test_whole_nsa_agrees_on_random_problems(implementation, dtype, case: Case):
    arrays = random_arrays(case, dtype)
    options = dict(config=case.config, scale=case.scale, query_offset=case.offset)
    expected = brute_force.nsa_attention(arrays.q, arrays.kv, arrays.gates, segment_ids=arrays.segment_ids, **options)
    with precision(dtype):
        actual = run(whole, arrays, traced_offset=case.traced_offset, implementation=implementation, **options)
    rows = decided_rows(run_brute_force(arrays, **options), dtype)
    rows = np.repeat(rows, case.group, axis=1).swapaxes(1, 2)  # [B, Tq, H]
    assert_close("nsa", actual["nsa"][rows], expected[rows], TOLERANCE[dtype])


# Directed problems. Sizes are shared where they can be, so that little is compiled.
SMALL = NSAConfig(
    compress_block=4, compress_stride=2, select_block=8, num_selected=4, num_init=1, num_local=2, window=10
)
NOTHING_FORCED = dataclasses.replace(SMALL, num_selected=3, num_init=0, num_local=0)


def problem(tokens, config=SMALL, batch=1, kv_heads=2, group=2, seed=0, segment_ids=None):
    """Random arrays of the whole call over `tokens` tokens."""
    case = Case(
        batch=batch,
        tokens=tokens,
        kv_heads=kv_heads,
        group=group,
        key_size=5,
        value_size=3,
        config=config,
        scale=None,
        segments=False,
        offset=0,
        queries=tokens,
        traced_offset=False,
        seed=seed,
    )
    return random_arrays(case, "float64")._replace(segment_ids=segment_ids)


def run_library_alone(arrays, config, implementation, **options):
    """All ops, selection and selected attention starting from the library's own results; float64."""
    with precision("float64"):
        return run(chained_ops, arrays, config=config, implementation=implementation, **options)


def chained_ops(arrays, **options):
    q, kv = arrays.q, arrays.kv
    options["segment_ids"] = arrays.segment_ids
    o, lse = nsa_jax.compressed_attention(q, kv.cmp_k, kv.cmp_v, **options)
    block_indices = nsa_jax.select_blocks(q, kv.cmp_k, lse, **options)
    return {
        "compressed": o,
        "lse": lse,
        "block_indices": block_indices,
        "selected": nsa_jax.selected_attention(q, kv.slc_k, kv.slc_v, block_indices, **options),
        "window": nsa_jax.window_attention(q, kv.win_k, kv.win_v, **options),
        "nsa": nsa_jax.nsa_attention(q, kv, arrays.gates, **options),
    }


def select_from_scores(scores, config, implementation, times):
    """Blocks for queries at `times`, where compressed token i has the probability exp(scores[row, i])."""
    rows, Nc = scores.shape
    q = scores[None, :, None, :]
    k = np.eye(Nc)[None, :, None, :]
    lse = np.zeros((1, 1, rows))
    options = dict(config=config, scale=1.0, query_offset=int(times[0]), implementation=implementation)
    with precision("float64"):
        return np.asarray(jax.jit(lambda q, k, lse: nsa_jax.select_blocks(q, k, lse, **options))(q, k, lse))[0, 0]


@each_implementation
def test_overlap_weights_are_1_2_2_2_1_at_the_paper_sizes(implementation):
    config = NSAConfig(num_selected=3, num_init=0, num_local=0)
    T = 512
    Nc = nsa_jax.num_compressed(T, config)
    times = np.arange(T - 64, T)  # the last query of all sees every compressed token
    p = np.random.default_rng(0).uniform(0.1, 1.0, size=(64, Nc))
    chosen = select_from_scores(np.log(p), config, implementation, times)
    for row, t in enumerate(times):
        seen = {i: p[row, i] for i in range(Nc) if 16 * i + 31 <= t}
        scores = [
            sum(
                weight * seen.get(4 * j + shift, 0.0)
                for shift, weight in zip(range(-1, 4), (1, 2, 2, 2, 1), strict=True)
            )
            for j in range(t // 64 + 1)
        ]
        assert chosen[row].tolist() == sorted(np.argsort(scores)[-3:].tolist())


@pytest.mark.exhaustive
@pytest.mark.parametrize("implementation", ["reference", "xla", "triton"])
@pytest.mark.parametrize("forced", [(0, 0), (0, 1), (1, 0), (2, 2)], ids="{0[0]} first, {0[1]} last".format)
@pytest.mark.parametrize("sizes", [(16, 8, 16), (8, 8, 24), (24, 8, 32), (16, 4, 48)], ids=str)
def test_selection_at_every_alignment_where_the_newest_token_decides(sizes, forced, implementation, monkeypatch):
    """T - l is a multiple of d and not; Triton's kernels are cut at a quarter and a half of the blocks."""
    monkeypatch.setattr(block_selection, "_LEAST_BLOCKS_TO_CUT", 2)
    config = NSAConfig(*sizes, num_selected=sum(forced) + 1, num_init=forced[0], num_local=forced[1])
    rng = np.random.default_rng(0)
    for T in (128, 128 + config.compress_stride // 2, 129, 127):
        Nc = nsa_jax.num_compressed(T, config)
        scores = rng.normal(size=(T, Nc)) - 4
        for t in range(config.compress_block - 1, T):
            scores[t, nsa_jax.num_compressed(t + 1, config) - 1] = 0
        q, k = (scores[None, :, None, :], np.eye(Nc)[None, :, None, :])
        q, k = (np.pad(x, ((0, 0), (0, 0), (0, 0), (0, max(0, 16 - Nc)))).astype(np.float32) for x in (q, k))
        options = dict(config=config, scale=1.0)
        lse = np.zeros((1, 1, T), np.float32)
        expected, margin = brute_force.select_blocks_and_margin(q, k, lse, **options)
        for offset in (0, 50):
            call = dict(options, query_offset=offset, implementation=implementation)
            run = jax.jit(lambda *a, call=call: nsa_jax.select_blocks(*a, **call), compiler_options=FAST_COMPILATION)
            actual = np.asarray(run(q[:, offset:], k, lse[:, :, offset:]))
            rows = margin[:, :, offset:] > SMALLEST_FLOAT32_MARGIN
            np.testing.assert_array_equal(actual[rows], expected[:, :, offset:][rows], err_msg=f"{T}, {offset}")


@each_implementation
def test_exact_ties_go_to_the_lower_block(implementation):
    config = dataclasses.replace(NOTHING_FORCED, compress_block=2)  # blocks of four whole compressed tokens
    times = np.arange(40, 48)
    scores = np.zeros((8, 24))
    chosen = select_from_scores(scores, config, implementation, times)
    # Identical keys: the five complete blocks tie exactly, the last one is incomplete until t = 47.
    np.testing.assert_array_equal(chosen, np.tile([0, 1, 2], (8, 1)))
    scores[:, 12:16] = np.log(2.0)  # block 3 stands out, the others still tie
    np.testing.assert_array_equal(select_from_scores(scores, config, implementation, times), np.tile([0, 1, 3], (8, 1)))
    scores[:] = -1000.0  # exp underflows: no block has any importance
    scores[:, 8:12] = 0.0  # but block 2
    np.testing.assert_array_equal(select_from_scores(scores, config, implementation, times), np.tile([0, 1, 2], (8, 1)))


@each_implementation
@pytest.mark.parametrize("tokens", [1, 3])
def test_sequences_shorter_than_a_compressed_token(implementation, tokens):
    arrays = problem(tokens)
    actual = run_library_alone(arrays, SMALL, implementation)
    assert arrays.kv.cmp_k.shape[1] == 0
    np.testing.assert_array_equal(actual["compressed"], 0)
    assert np.isneginf(actual["lse"]).all()
    np.testing.assert_array_equal(actual["block_indices"], np.broadcast_to([0, -1, -1, -1], (1, 2, tokens, 4)))
    expected = run_brute_force(arrays, config=SMALL)
    for name in ("selected", "window"):
        assert_close(name, actual[name], expected[name], 1e-12)
    gates = arrays.gates[..., None]
    whole_expected = gates[:, :, :, 1] * expected["selected"] + gates[:, :, :, 2] * expected["window"]
    assert_close("nsa", actual["nsa"], whole_expected, 1e-12)


@each_implementation
def test_selection_is_ascending_padded_at_the_end_and_holds_every_forced_block(implementation):
    T = 53
    segment_ids = np.zeros((2, T), np.int32)
    segment_ids[1, 19:] = 1  # starts inside block 2
    chosen = run_library_alone(problem(T, batch=2, segment_ids=segment_ids), SMALL, implementation)["block_indices"]
    for b, kv_head, t in np.ndindex(2, 2, T):
        row = chosen[b, kv_head, t].tolist()
        first = 2 if b == 1 and t >= 19 else 0
        last = t // 8
        count = min(4, last - first + 1)
        assert row[:count] == sorted(set(row[:count]))
        assert row[count:] == [-1] * (4 - count)
        assert {first, last, max(first, last - 1)} <= set(row[:count])
        assert all(first <= j <= last for j in row[:count])


@each_implementation
def test_traced_offset_of_a_slice_equals_the_whole_call(implementation):
    T, Tq = 53, 9
    segment_ids = np.repeat(np.array([[0, 3, 4]], np.int32), [11, 20, 22], axis=1)
    arrays = problem(T, segment_ids=segment_ids)
    expected = run_library_alone(arrays, SMALL, implementation)

    @jax.jit
    def slice_at(offset, arrays):
        return chained_ops(arrays, query_offset=offset, config=SMALL, implementation=implementation)

    for offset in (0, 17, T - Tq):
        here = slice(offset, offset + Tq)
        part = arrays._replace(q=arrays.q[:, here], gates=arrays.gates[:, here])
        with precision("float64"):
            actual = jax.tree.map(np.asarray, slice_at(np.int32(offset), part))
        np.testing.assert_array_equal(actual["block_indices"], expected["block_indices"][:, :, here])
        lse, expected_lse = actual["lse"], expected["lse"][:, :, here]
        np.testing.assert_allclose(lse, expected_lse, rtol=1e-12, atol=1e-12)
        for name in ("compressed", "selected", "window", "nsa"):
            assert_close(name, actual[name], expected[name][:, here], 1e-12)


@each_implementation
def test_packed_documents_equal_the_documents_alone(implementation):
    s, d = SMALL.select_block, SMALL.compress_stride
    lengths = [21, 3, 17]
    starts = [0, 24, 32]  # multiples of s; the gaps are padding and belong to the document before them
    T = 53
    segment_ids = np.repeat(np.array([[0, 1, 2]], np.int32), [24, 8, T - 32], axis=1)
    arrays = problem(T, segment_ids=segment_ids)
    packed = run_library_alone(arrays, SMALL, implementation)
    for start, length in zip(starts, lengths, strict=True):
        assert start % s == 0
        here = slice(start, start + length)
        compressed_here = slice(start // d, start // d + nsa_jax.num_compressed(length, SMALL))
        kv = arrays.kv
        alone = Arrays(
            q=arrays.q[:, here],
            kv=BranchKV(kv.cmp_k[:, compressed_here], kv.cmp_v[:, compressed_here], *(x[:, here] for x in kv[2:])),
            gates=arrays.gates[:, here],
            segment_ids=None,
        )
        expected = run_library_alone(alone, SMALL, implementation)
        for name in ("compressed", "selected", "window", "nsa"):
            assert_close(name, packed[name][:, here], expected[name], 1e-12)
        np.testing.assert_allclose(packed["lse"][:, :, here], expected["lse"], rtol=1e-12, atol=1e-12)
        indices = expected["block_indices"]
        np.testing.assert_array_equal(
            packed["block_indices"][:, :, here], np.where(indices >= 0, indices + start // s, -1)
        )


@pytest.mark.parametrize("tokens", [3, 4, 17])
@pytest.mark.parametrize("method", ["mlp", "linear", "mean"])
def test_compression_equals_phi_of_each_window(method, tokens):
    config = dataclasses.replace(SMALL, compress_block=6)  # three chunks, so that windows overlap twice
    rng = np.random.default_rng(0)
    size, hidden = 3, 5
    x = rng.normal(size=(2, tokens, 2, size))
    shapes = {
        "position": (6, size),
        "in_kernel": (6, size, hidden if method == "mlp" else size),
        "in_bias": (hidden,),
        "out_kernel": (hidden, size),
        "out_bias": (size,),
    }
    parameters = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    in_kernel = parameters["in_kernel"].reshape(6 * size, -1)

    def mlp(flat):
        inner = flat @ in_kernel + parameters["in_bias"]
        return inner / (1 + np.exp(-inner)) @ parameters["out_kernel"] + parameters["out_bias"]

    phi = {"mlp": mlp, "linear": lambda flat: flat @ in_kernel, "mean": lambda flat: flat.reshape(6, size).mean(axis=0)}
    position = 0 if method == "mean" else parameters["position"]
    expected = brute_force.compress(x, position, phi[method], config=config)
    with precision("float64"):
        actual = np.asarray(compress(x, parameters, config=config, method=method))
    assert_close(method, actual, expected, 1e-12)
