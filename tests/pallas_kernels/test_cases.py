"""What is timed: by which backend, the whole attention with all of its work, each program compiled once."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from nsa_jax import BranchKV, NSAConfig, backends, nsa_attention
from pallas_kernels.benchmarks import cases, ops, timing
from pallas_kernels.kernels import Kernels
from pallas_kernels.nsa_attention.contract import Parts
from tests.pallas_kernels.cases import abstract, skip_without_mosaic

TRITON_KERNELS = (
    "compressed_attention_forward",
    "block_selection_score",
    "block_selection_top_n",
    "selected_attention_",
    "window_attention_forward",
)
PASSES = [field.name for field in dataclasses.fields(Parts)]


def cases_of(shape, backend, make=lambda function: function()):
    """Each op and the whole attention; `make` may be `jax.eval_shape`, so that the arrays are only described."""
    arrays = make(functools.partial(cases.inputs, shape, "random"))
    lse = make(lambda: jnp.zeros((1, shape.H, shape.T)))
    found = cases.cases(shape, backend, arrays, {"random": arrays.block_indices}, lse)
    return {case.name: case for case in found}


@pytest.fixture
def taken(monkeypatch):
    """By which kernels each pass was traced last."""
    found = {}
    function_of = Kernels.function

    def function(kernels, name):
        def call(*arguments, **options):
            result = function_of(kernels, name)(*arguments, **options)
            found[name] = kernels.name
            return result

        return call

    monkeypatch.setattr(Kernels, "function", function)
    return found


def choices_of_none(shape):
    """Which backend `implementation=None` takes for each pass of the whole attention."""
    arrays = jax.eval_shape(functools.partial(cases.inputs, shape, "random"))
    made = backends.explain(nsa_attention, arrays.q, BranchKV(*arrays.keys), arrays.gates, config=NSAConfig())
    return {name: made[name].backend for name in PASSES}


SHAPES = (
    cases.Shape(T=65536),
    cases.Shape(T=8192),
    cases.Shape(T=65536, H=16),
    cases.Shape(T=65536, Dk=192),
    cases.Shape(T=65536, dtype="float32"),
)


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        *((shape, "NVIDIA H100") for shape in SHAPES),
        (SHAPES[0], "NVIDIA A100"),
        *(pytest.param(shape, "NVIDIA A100", marks=pytest.mark.exhaustive) for shape in SHAPES[1:]),
    ],
    ids=str,
)
def test_passes_timed_by_default_are_those_of_the_automatic_choice(shape, kind, taken):
    with abstract(kind):
        expected = choices_of_none(shape)
        taken.clear()
        for case in cases_of(shape, ops.DEFAULT, jax.eval_shape).values():
            timing.trace(case)
            assert taken.items() <= expected.items()
    assert taken == expected


@pytest.mark.parametrize("name", ["block_selection", "window_attention", "nsa"])
@pytest.mark.parametrize("backend", ops.BACKENDS)
def test_programs_are_made_of_kernels_of_their_backend(name, backend):
    """Of the whole attention the forward pass only, which takes seconds to lower."""
    if backend != "triton":
        skip_without_mosaic(interpreted=False)
    with abstract("NVIDIA H100"):
        programs = timing.trace(cases_of(cases.Shape(T=65536), backend, jax.eval_shape)[name])
        assert len(programs) == (1 if name == "block_selection" else 2)
        for program in programs[:1] if name == "nsa" else programs:
            text = program.lower(lowering_platforms=("cuda",)).as_text()
            # At this length the tables have every pass.
            assert ("__gpu$xla.gpu.triton" in text) == (backend == "triton")
            assert ("mosaic_gpu" in text) == (backend != "triton")


def test_the_compiler_does_not_drop_the_selection_of_the_whole_attention(monkeypatch):
    """The selection attended to is a pattern's, so nothing but the benchmark's own care keeps the one computed."""

    def select_blocks(q, k, lse, *_, config, **__):
        order = jnp.sort(jnp.sin(lse[:, : k.shape[2]]), axis=-1)
        return jnp.repeat((order[..., None] > 0).astype(jnp.int32), config.num_selected, axis=-1)

    def attention(q, *others, **_):
        return q + others[-1].sum()

    parts = Parts(**{**dict.fromkeys(PASSES), "select_blocks": select_blocks})
    monkeypatch.setattr(cases, "parts_of", lambda backend: parts)
    monkeypatch.setattr(cases, "nsa_attention", attention)
    whole = cases_of(cases.Shape(T=256, H=4, K=2, Dk=32, Dv=32, dtype="float32"), "triton")["nsa"]
    assert " sort(" in jax.jit(whole.forward).lower(*whole.arguments["random"]).compile().as_text()


def test_a_case_is_compiled_once_and_timed_on_each_selection():
    traced = []

    def forward(x, y):
        traced.append(x)
        return x * y

    x, y = jnp.ones((4, 4)), jnp.ones((4, 4))
    case = cases.Case("nsa", "triton", forward, {"random": (x, y), "local": (x, 2 * y)}, 1, flops=32.0)
    rows = list(timing.measure([case]))
    assert len(traced) == 2  # forward; forward and backward
    assert [(row["op"], row["backend"], row["selection"]) for row in rows] == [
        ("nsa", "triton", "random"),
        ("nsa", "triton", "local"),
    ]
    for row in rows:
        median = row["forward_ms"]["median"]
        assert median > 0
        assert row["backward_ms"] == row["forward_backward_ms"]["median"] - median
        assert row["forward_gbytes_per_s"] == pytest.approx(3 * 64 / median / 1e6)
        assert row["forward_tflops"] == pytest.approx(32 / median / 1e9)
        assert row["forward_backward_memory_gib"] > row["forward_memory_gib"] > 0


def test_a_case_that_is_refused_does_not_lose_the_figures_of_others():
    def refused(x):
        raise NotImplementedError("heads of 7")

    def case(forward):
        return cases.Case("window_attention", "mosaic", forward, {None: (jnp.ones(3),)}, 0, flops=3.0)

    first, second = timing.measure([case(refused), case(jnp.sin)])
    assert first == {
        "op": "window_attention",
        "backend": "mosaic",
        "selection": None,
        "error": "NotImplementedError: heads of 7",
    }
    assert second["forward_ms"]["median"] > 0


@pytest.mark.gpu
def test_the_whole_attention_runs_every_kernel():
    whole = cases_of(cases.Shape(T=4096), "triton")["nsa"]
    program = jax.jit(whole.forward).lower(*whole.arguments["random"]).compile().as_text()
    assert [name for name in TRITON_KERNELS if name not in program] == []
    (row,) = timing.measure([whole])
    assert row["forward_ms"]["median"] > 0


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ops.BACKENDS)
def test_every_case_is_timed_by_every_backend(backend):
    if backend == "mosaic":
        skip_without_mosaic(interpreted=False)
    rows = list(timing.measure([*cases_of(cases.Shape(T=8192), backend).values()]))
    assert [row.get("error") for row in rows] == [None] * 5
