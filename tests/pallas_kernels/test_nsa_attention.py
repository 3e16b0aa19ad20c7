"""All branches as one op against the reference's branches and their gated sum, forward and every gradient."""

import contextlib
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nsa_jax import backends, nsa_attention, reference
from nsa_jax.backends.choice import Backward, Forward
from nsa_jax.testing import normwise_error, tolerance_of
from nsa_jax.visibility import gated_sum
from pallas_kernels.differentiable import Positions
from pallas_kernels.nsa_attention import fused
from pallas_kernels.nsa_attention.contract import Keys, Parts
from tests.pallas_kernels import cases
from tests.pallas_kernels.cases import BACKENDS, BRANCHES, FUSED_CASES, GPU_CASES, Case

NAMES = ("o", "dq", "dcmp_k", "dcmp_v", "dslc_k", "dslc_v", "dwin_k", "dwin_v", "dgates")

each_backend = pytest.mark.parametrize("backend", BACKENDS)


def parts_of(backend: str, case: Case | None = None, backward: str | None = None) -> Parts:
    """The passes of one backend, or with the backward passes of another; of XLA, what JAX derives from the forward's.

    A backward pass that does not take heads of a case's sizes is Triton's.
    """
    if backend == "xla":
        passes = {op: Forward(op, backend) for op in BRANCHES}
        passes |= {op + "_backward": Backward(op, backend) for op in BRANCHES}
        return Parts(select_blocks=backends.get(backend).select_blocks, **passes)
    forward = {op: cases.function(backend, op) for op in (*BRANCHES, "select_blocks")}
    ops = [op + "_backward" for op in BRANCHES]
    return Parts(**forward, **{op: cases.function(backward or backend, op, case) for op in ops})


def interpreted(backend: str) -> tuple[Any, float]:
    """The dtype in which passes are tested without a GPU, and the tolerance."""
    return cases.INTERPRETED_DTYPE.get(backend, jnp.float32), cases.INTERPRETED_TOLERANCE.get(backend, 2e-6)


def results(op: Any, q: Any, kv: Any, gates: Any, do: Any) -> tuple[Any, ...]:
    """o and the gradients, in the order of `NAMES`."""
    o, pullback = jax.vjp(op, q, kv, gates)
    dq, dkv, dgates = pullback(do.astype(o.dtype))
    return o, dq, *dkv, dgates


def check(parts: Parts, case: Case, dtype: Any, tolerance: float) -> tuple[Any, Any]:
    q, kv, gates, starts, _, do, *_ = cases.inputs(case, dtype)
    gates = gates.astype(jnp.float32)

    def places(starts: Any, offset: Any) -> tuple[Positions, Positions]:
        positions = Positions(starts, offset)
        return positions, positions

    @jax.jit
    def run(q: Any, kv: Any, gates: Any, do: Any, starts: Any, offset: Any) -> Any:
        def attend(q: Any, kv: Any, gates: Any) -> Any:
            return fused.nsa_attention(q, Keys(*kv), gates, *places(starts, offset), parts=parts, **case.options)

        return results(attend, q, kv, gates, do)

    @jax.jit
    def select(q: Any, k: Any, v: Any, starts: Any, offset: Any) -> Any:
        """The blocks that the fused op chooses: those of its own two parts."""
        _, lse = parts.compressed_attention(q, k, v, starts, offset, **case.options)
        return parts.select_blocks(q, k, lse, starts, offset, **case.options)

    actual = run(q, kv, gates, do, starts, case.offset)
    block_indices = select(q, *kv[:2], starts, case.offset)
    given = jax.jit(
        lambda q, kv, gates, block_indices, starts, offset: fused.nsa_attention(
            q, Keys(*kv), gates, *places(starts, offset), block_indices, parts=parts, **case.options
        )
    )
    np.testing.assert_array_equal(given(q, kv, gates, block_indices, starts, case.offset), actual[0])

    @jax.jit
    def expect(q: Any, kv: Any, gates: Any, do: Any, starts: Any, block_indices: Any) -> Any:
        def composed(q: Any, kv: Any, gates: Any) -> Any:
            at = (starts, case.query_offset)
            o_cmp, _ = reference.compressed_attention(q, *kv[:2], *at, **case.options)
            o_slc, _ = reference.selected_attention(q, *kv[2:4], block_indices, *at, **case.options)
            o_win, _ = reference.window_attention(q, *kv[4:], *at, **case.options)
            return gated_sum(gates, o_cmp, o_slc, o_win)

        return results(composed, q, kv, gates, do)

    expected = expect(*cases.exact((q, kv, gates, do, starts, block_indices)))
    for name, a, b in zip(NAMES, actual, expected, strict=True):
        assert a.dtype == (jnp.float32 if name == "dgates" else dtype), name
        error = normwise_error(a, b)
        assert error <= tolerance, f"{name}: normwise error {error:.3g} above {tolerance:.3g}"
    return functools.partial(run, q, kv, gates, do, starts, case.offset), actual


@pytest.mark.parametrize(
    ("backend", "name"),
    [
        ("xla", "segments, offset, odd group, odd heads"),
        pytest.param("xla", "group of 4", marks=pytest.mark.exhaustive),
        *(
            pytest.param(backend, name, marks=pytest.mark.exhaustive)
            for backend in BACKENDS
            for name, case in FUSED_CASES.items()
            if backend in case.backends
        ),
    ],
)
def test_equals_the_gated_sum_of_the_references_branches(backend, name):
    check(parts_of(backend), FUSED_CASES[name], *interpreted(backend))


@each_backend
@pytest.mark.parametrize("gradients", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_the_public_op_is_fused_and_equals_the_sum_of_its_branches(backend, gradients):
    sizes = cases.NSAConfig(16, 8, 16, 3, 1, 1, 9)
    case = cases.fitted(backend, Case(70, 6, 2, 48, 40, sizes, query_offset=37, segments=(43,), traced=False))
    parts_of(backend)
    dtype, tolerance = interpreted(backend)
    q, kv, gates, _, _, do, *_ = cases.inputs(case, dtype)
    segment_ids = jnp.where(jnp.arange(case.T) >= 43, 1, 0).astype(jnp.int32)[None]
    options = {"config": case.config, "segment_ids": segment_ids, "query_offset": case.query_offset}
    made = backends.explain(nsa_attention, q, kv, gates, implementation=backend, **options)
    assert made["nsa_attention"].backend == "fused"
    assert all(made[op].backend == made[op + "_backward"].backend == backend for op in BRANCHES)

    def run(implementation: str) -> Any:
        attend = functools.partial(nsa_attention, implementation=implementation, **options)
        if not gradients:
            return [jax.jit(attend)(q, kv, gates)]
        return jax.jit(functools.partial(results, attend))(q, kv, gates, do)

    for name, a, b in zip(NAMES, run(backend), run("reference"), strict=gradients):
        assert normwise_error(a, b) <= tolerance, name


@each_backend
def test_without_compressed_tokens_there_is_no_fused_op(backend):
    cases.function(backend, "compressed_attention")  # skips the test where the backend cannot run
    case = cases.fitted(backend, Case(20, 4, 2, 32, 32, cases.NSAConfig(), traced=False))
    q, kv, gates, *_ = cases.inputs(case, cases.INTERPRETED_DTYPE[backend])
    made = backends.explain(nsa_attention, q, kv, gates, config=case.config, implementation=backend)
    assert made["nsa_attention"].backend == "parts"
    assert dict(made["nsa_attention"].refusals)["fused"] == "no compressed token"
    assert all(made[op].backend == backend for op in BRANCHES)


@each_backend
@pytest.mark.exhaustive
def test_vmap_scan_and_remat_give_the_same_gradients(backend):
    case = Case(48, 4, 2, 32, 32, cases.NSAConfig(16, 8, 16, 3, 1, 1, 20), B=2, traced=False)
    case, (dtype, tolerance) = cases.fitted(backend, case), interpreted(backend)
    parts, positions = parts_of(backend), Positions(None, 0)
    q, kv, gates, _, _, do, *_ = cases.inputs(case, dtype)

    def plain(q, kv, gates):
        return fused.nsa_attention(q, Keys(*kv), gates, positions, positions, parts=parts, **case.options)

    def one_row(row):
        return plain(*jax.tree.map(lambda x: x[None], row))[0]

    def each(*arrays):  # one sequence at a time, through the other axis
        return jax.vmap(lambda *row: one_row(row))(*arrays)

    def scanned(*arrays):
        step = cases.rematerialised(backend, lambda carry, row: (carry, one_row(row)))
        return jax.lax.scan(step, 0, arrays)[1]

    def gradients(op):
        def loss(arrays):
            return jnp.sum((op(*arrays) * do).astype(jnp.float32))

        return jax.tree.leaves(jax.jit(jax.value_and_grad(loss))((q, kv, gates)))

    wanted = gradients(plain)
    for other in (each, scanned):
        for a, b in zip(gradients(other), wanted, strict=True):
            assert normwise_error(a, b) <= tolerance


def compiled() -> list[Any]:
    """Every case with each backend's passes that takes it, and with forward and backward passes of two backends."""
    return [
        pytest.param(forward, backward, name, dtype, id=f"{forward}-{backward}-{name}-{jnp.dtype(dtype)}")
        for forward, backward in itertools.product(BACKENDS, BACKENDS)
        for name, case in GPU_CASES.items()
        for dtype in cases.DTYPES[forward]
        if "nsa_attention" in case.ops and {forward, backward} <= {*case.backends} and dtype in cases.DTYPES[backward]
    ]


@pytest.mark.gpu
@pytest.mark.parametrize(("forward", "backward", "name", "dtype"), compiled())
def test_gpu_equals_the_gated_sum_of_the_references_branches_twice(forward, backward, name, dtype):
    case = GPU_CASES[name]
    with contextlib.ExitStack() as poisons:
        for backend in {forward, backward}:
            poisons.enter_context(cases.poisoned(backend))
        run, actual = check(parts_of(forward, case, backward), case, dtype, tolerance_of(dtype))
    for a, b in zip(actual, run(), strict=True):
        np.testing.assert_array_equal(a, b)
