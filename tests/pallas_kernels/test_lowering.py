"""Every op of every backend lowers for GPUs that need not be there, in every dtype, with and without 64-bit numbers."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from nsa_jax import NSAConfig, nsa_attention
from tests.pallas_kernels import cases
from tests.pallas_kernels.cases import BACKENDS, BRANCHES, CASES, GPU_CASES, LONG_CASES, Case

KINDS = {"triton": ("NVIDIA H100", "NVIDIA A100"), "mosaic": ("NVIDIA H100", "NVIDIA H200")}
OPS = (*BRANCHES, "select_blocks", "nsa_attention")
# What a program must be made of, by the start of a kernel's name.
KERNELS = {
    "triton": {
        "compressed_attention": (
            "compressed_attention_forward",
            "compressed_attention_query_gradient",
            "compressed_attention_key_gradient",
            "compressed_attention_key_gradient_sum",
        ),
        "select_blocks": ("block_selection_score", "block_selection_top_n"),
        "selected_attention": ("selected_attention_",),
        "window_attention": ("window_attention_",),
    },
    "mosaic": {
        "compressed_attention": (
            "compressed_attention_forward",
            "compressed_attention_query_gradient",
            "compressed_attention_key_gradient",
        ),
        "select_blocks": ("block_selection",),
        "selected_attention": (
            "selected_attention_union",
            "selected_attention_forward",
            "selected_attention_query_gradient",
            "selected_attention_key_gradient",
            "selected_attention_key_gradient_sum",
        ),
        "window_attention": (
            "window_attention_forward",
            "window_attention_query_gradient",
            "window_attention_key_gradient",
        ),
    },
}
for names in KERNELS.values():
    names["nsa_attention"] = tuple(itertools.chain(*names.values()))


def programs() -> list[Any]:
    """Every backend, op, case, dtype and GPU, with 64-bit numbers and without by turns.

    Of an op and a large case only one is not exhaustive. Each dtype, GPU and width comes up for each op by itself.
    """
    all_cases = GPU_CASES | LONG_CASES | {name: case for name, case in CASES.items() if case.num_compressed}
    found = []
    for backend, op in itertools.product(BACKENDS, OPS):
        ways = list(itertools.product(cases.DTYPES[backend], KINDS[backend]))
        names = [
            name
            for name, case in all_cases.items()
            if op in case.ops and backend in case.backends and not (op == "nsa_attention" and is_mixed(backend, case))
        ]
        for turn, name in enumerate(names):
            for i, way in enumerate(ways):
                shown = i == turn % len(ways)
                if name not in CASES or shown:
                    marks = [] if shown and name not in CASES else [pytest.mark.exhaustive]
                    found.append(pytest.param(backend, op, name, *way, (turn + i // 2 + i) % 2 == 0, marks=marks))
    return found


def is_mixed(backend: str, case: Case) -> bool:
    """Whether some backward passes of the whole attention are another backend's, which a call by name refuses."""
    return any(case.Dk + case.Dv > cases.largest_backward(backend, op) for op in BRANCHES)


def program(backend: str, op: str, case: Case, dtype: Any, kind: str, tile: Any = None, **backward_tiles: Any) -> str:
    shapes = cases.shapes(case, dtype)
    forward_tile = {} if tile is None else {"tile": tile}
    offset = jax.ShapeDtypeStruct((), jnp.int32) if case.traced else case.query_offset
    if op == "select_blocks":
        shaped = (shapes.q, shapes.kv.cmp_k, shapes.dlse, shapes.starts)
    elif op == "nsa_attention":
        ids = jax.ShapeDtypeStruct((case.B, case.T), jnp.int32) if case.segments else None
        shaped = (shapes.q, shapes.kv, shapes.gates, ids)
    else:
        shaped = (shapes,)

    with cases.abstract(kind):
        if op == "nsa_attention":
            for part in (*BRANCHES, "select_blocks"):
                cases.function(backend, part)
            attend = functools.partial(nsa_attention, config=case.config, implementation=backend)

            def call(q: Any, kv: Any, gates: Any, segment_ids: Any, offset: Any) -> Any:
                def total(q: Any, kv: Any, gates: Any) -> Any:
                    return attend(q, kv, gates, segment_ids=segment_ids, query_offset=offset).astype(jnp.float32).sum()

                return jax.value_and_grad(total, (0, 1, 2))(q, kv, gates)
        elif op == "select_blocks":
            call = functools.partial(cases.function(backend, op), **case.options, **forward_tile)
        else:
            forward = functools.partial(cases.function(backend, op), **forward_tile)
            backward = functools.partial(cases.function(backend, op + "_backward", case), **backward_tiles)
            call = functools.partial(cases.results, forward, backward, op, case)
        if not case.traced:
            known = functools.partial(lambda call, *shaped: call(*shaped, case.query_offset), call)
            return jax.jit(known).trace(*shaped).lower(lowering_platforms=("cuda",)).as_text()
        return jax.jit(call).trace(*shaped, offset).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(("backend", "op", "name", "dtype", "kind", "x64"), programs())
def test_lowers_for_gpus(backend, op, name, dtype, kind, x64):
    case = (GPU_CASES | LONG_CASES | CASES)[name]
    with jax.enable_x64(x64):
        text = program(backend, op, case, dtype, kind)
    for kernel in KERNELS.get(backend, {}).get(op, ()):
        assert kernel in text


@pytest.mark.parametrize(("backend", "op"), [(backend, op) for backend, ops in cases.TILES.items() for op in ops])
def test_lowers_for_gpus_with_tiles_of_ones_own(backend, op):
    case = Case(256, 16, 1, 128, 128, NSAConfig(16, 8, 64, 2, 1, 1, 100), traced=False)
    text = program(backend, op, case, jnp.bfloat16, "NVIDIA H100", **cases.TILES[backend][op])
    for kernel in KERNELS[backend][op]:
        assert kernel in text
