"""What a backend does not support, each of its ops refuses by the same rule, forward and backward, uncomputed."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from nsa_jax import NSAConfig, backends
from tests.pallas_kernels import cases
from tests.pallas_kernels.cases import BACKENDS, BRANCHES, Case

PASSES = (*BRANCHES, *(op + "_backward" for op in BRANCHES), "select_blocks", "decode_attention")
CASE = Case(64, 4, 2, 32, 32, NSAConfig(16, 8, 16, 4, 1, 1, 20), traced=False)
SIZES = {"triton": (16, 256), "mosaic": (64, 256)}  # the smallest head and the largest


def call(
    backend: str, op: str, case: Case = CASE, scale: float = 1.0, tiles: dict[str, Any] | None = None, **dtypes: Any
) -> Any:
    """Traces an op on arrays of a case, of other dtypes where they are named."""
    options, function = dict(tiles or {}, config=case.config, scale=scale), cases.function(backend, op)
    dtype = dtypes.pop("dtype", cases.INTERPRETED_DTYPE[backend])
    x = cases.shapes(case, dtype)
    if op == "decode_attention":
        arrays = decode_shapes(case, dtype)
        places: tuple[Any, ...] = ()
    elif op == "select_blocks":
        arrays, places = (x.q, x.kv.cmp_k, x.dlse), (None, 0)
    else:
        arrays, places = cases.arguments(op.removesuffix("_backward"), x), (None, 0)
        if op.endswith("_backward"):
            o = jax.ShapeDtypeStruct(x.do.shape, dtype)
            arrays = (*arrays, o, x.dlse, x.do)
    changed = [
        jax.ShapeDtypeStruct(array.shape, dtypes.get({0: "q", 1: "k"}.get(i, ""), array.dtype))
        for i, array in enumerate(arrays)
    ]
    return jax.eval_shape(lambda *arrays: function(*arrays, *places, **options), *changed)


def decode_shapes(case: Case, dtype: Any, num_blocks: int = 4) -> list[jax.ShapeDtypeStruct]:
    B, m, s = case.B, 1, case.config.select_block
    pool = functools.partial(jax.ShapeDtypeStruct, dtype=dtype)
    per_block = s // case.config.compress_stride
    return [
        pool((B, m, case.H, case.Dk)),
        *(pool((8, case.K, length, D)) for length in (per_block, s) for D in (case.Dk, case.Dv)),
        *(pool((B, case.config.window + m, case.K, D)) for D in (case.Dk, case.Dv)),
        jax.ShapeDtypeStruct((B, m, case.H, 3), jnp.float32),
        *(jax.ShapeDtypeStruct((B,), jnp.int32),) * 2,
        jax.ShapeDtypeStruct((B, num_blocks), jnp.int32),
    ]


# A new backend adds its own rule.
REFUSED = {
    "triton": {
        "q of float64": ({"q": jnp.float64}, r"q\.dtype = float64: expected bfloat16, float16 or float32"),
        "all of float64": ({"dtype": jnp.float64}, r"q\.dtype = float64: expected bfloat16, float16 or float32"),
        "keys of another dtype": ({"k": jnp.bfloat16}, r"k\.dtype = bfloat16: expected q's, float32"),
        "small heads": ({"Dk": 8}, "head_dim of q = 8: expected 16 to 256"),
        "large heads": ({"Dk": 320}, "head_dim of q = 320: expected 16 to 256"),
        "small values": ({"Dv": 8}, "head_dim of v = 8: expected 16 to 256"),
        "large values": ({"Dv": 257}, "head_dim of v = 257: expected 16 to 256"),
        "many heads a group": ({"H": 65, "K": 1}, "query heads per K/V head = 65: expected at most 64"),
        "many rows": ({"B": 32768, "K": 2}, r"batch x K/V heads = 65536: expected at most 65535"),
        "negative scale": ({"scale": -1.0}, r"scale = -1\.0: expected a positive number"),
        "no scale": ({"scale": 0.0}, r"scale = 0\.0: expected a positive number"),
    },
    "mosaic": {
        "q of float32": ({"q": jnp.float32}, r"q\.dtype = float32: expected bfloat16 or float16"),
        "all of float32": ({"dtype": jnp.float32}, r"q\.dtype = float32: expected bfloat16 or float16"),
        "keys of another dtype": ({"k": jnp.float16}, r"k\.dtype = float16: expected q's, bfloat16"),
        "small heads": ({"Dk": 32}, "head_dim of q = 32: expected 64, 128, 192 or 256"),
        "odd heads": ({"Dk": 80}, "head_dim of q = 80: expected 64, 128, 192 or 256"),
        "large heads": ({"Dk": 320}, "head_dim of q = 320: expected 64, 128, 192 or 256"),
        "small values": ({"Dv": 40}, "head_dim of v = 40: expected 64, 128, 192 or 256"),
        "a group of three": ({"H": 6}, "query heads per K/V head = 3: expected a divisor of 64"),
        "many heads a group": ({"H": 128, "K": 1}, "query heads per K/V head = 128: expected a divisor of 64"),
        "negative scale": ({"scale": -1.0}, r"scale = -1\.0: expected a positive number"),
        "no scale": ({"scale": 0.0}, r"scale = 0\.0: expected a positive number"),
    },
}


def each_refusal():
    return [
        pytest.param(backend, op, *refusal, id=f"{backend}-{op}-{name}")
        for backend in BACKENDS
        for name, refusal in REFUSED[backend].items()
        for op in PASSES
        if not (name.endswith("values") and op == "select_blocks")  # which has none
        and hasattr(backends.get(backend), op)
    ]


@pytest.mark.parametrize(("backend", "op", "change", "message"), each_refusal())
def test_every_op_refuses_the_same_with_the_same_words(backend, op, change, message):
    fields = {name: value for name, value in change.items() if hasattr(CASE, name) and name != "scale"}
    others = {name: value for name, value in change.items() if name not in fields}
    with jax.enable_x64(True), pytest.raises(NotImplementedError, match=message):
        call(backend, op, dataclasses.replace(cases.fitted(backend, CASE), **fields), **others)


@pytest.mark.parametrize(("index", "name"), list(enumerate(("cmp_k", "cmp_v", "slc_k", "slc_v", "k", "v"), 1)), ids=str)
def test_triton_decodes_over_no_array_of_another_dtype(index, name):
    arrays = decode_shapes(CASE, jnp.float32)
    arrays[index] = jax.ShapeDtypeStruct(arrays[index].shape, jnp.bfloat16)
    decode = functools.partial(cases.function("triton", "decode_attention"), config=CASE.config, scale=1.0)
    with pytest.raises(NotImplementedError, match=rf"^{name}\.dtype = bfloat16: expected q's, float32"):
        jax.eval_shape(decode, *arrays)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", PASSES)
@pytest.mark.parametrize("size", [0, 1])
def test_the_smallest_and_the_largest_head_are_taken_by_every_op(backend, op, size):
    head_dim = SIZES[backend][size]
    if op.endswith("_backward"):
        head_dim = min(head_dim, cases.largest_backward(backend, op) // 2)
    call(backend, op, dataclasses.replace(cases.fitted(backend, CASE), Dk=head_dim, Dv=head_dim))


@pytest.mark.parametrize("select_block", [8, 144])
@pytest.mark.parametrize("op", ["selected_attention", "selected_attention_backward"])
def test_triton_takes_blocks_of_one_tile_of_keys(op, select_block):
    case = dataclasses.replace(CASE, config=NSAConfig(8, 8, select_block, 4, 1, 1, 20))
    with pytest.raises(NotImplementedError, match=f"select_block = {select_block}: expected 16 to 128"):
        call("triton", op, case)


def test_triton_takes_so_many_blocks_and_no_more():
    decode = functools.partial(cases.function("triton", "decode_attention"), config=CASE.config, scale=1.0)
    with pytest.raises(NotImplementedError, match="num_blocks = 40000: expected at most 32768"):
        jax.eval_shape(decode, *decode_shapes(CASE, jnp.float32, num_blocks=40000))
    with pytest.raises(NotImplementedError, match="num_blocks = 33001: expected at most 32768"):
        call("triton", "select_blocks", dataclasses.replace(CASE, T=16 * 33000, query_offset=16 * 33000 - 8))


@pytest.mark.parametrize("op", ["compressed_attention_backward", "window_attention_backward"])
def test_mosaic_has_no_gradients_of_keys_whose_heads_do_not_fit_in_registers(op):
    case = dataclasses.replace(cases.fitted("mosaic", CASE), Dk=192, Dv=128)
    with pytest.raises(NotImplementedError, match="192 and 128: expected at most 256 together"):
        call("mosaic", op, case)


@pytest.mark.parametrize("backward", ["", "_backward"])
@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        ({"H": 8}, NSAConfig(), "query heads per K/V head = 4: expected at least 8"),
        ({}, NSAConfig(16, 8, 32, 4, 1, 1), "select_block = 32: expected 64"),
        ({}, NSAConfig(num_selected=20), r"block_indices\.shape\[3\] = 20: expected at most 16"),
    ],
)
def test_mosaic_attends_to_selected_blocks_of_64_with_8_heads_or_more(change, config, message, backward):
    if not hasattr(backends.get("mosaic"), "selected_attention" + backward):
        pytest.skip("mosaic has no such pass")
    case = dataclasses.replace(cases.fitted("mosaic", CASE), config=config, **change)
    with pytest.raises(NotImplementedError, match=message):
        call("mosaic", "selected_attention" + backward, case)


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        ({"H": 64, "K": 1}, CASE.config, "query heads per K/V head = 64: expected at most 32"),
        ({}, NSAConfig(24, 8, 32, 4, 1, 1), "compress_block = 24: expected compress_stride = 8 or twice as much"),
        ({}, NSAConfig(16, 8, 16, 33, 1, 1), "num_selected = 33: expected at most 32"),
        ({"T": 17600}, NSAConfig(16, 8, 16, 4, 1, 1), "num_blocks = 1100: expected at most 1088"),
        (
            {"T": 17000, "H": 32, "K": 1, "Dk": 256},
            NSAConfig(16, 8, 16, 4, 1, 1),
            "head_dim = 256 with 32 query heads per K/V head and 1063 blocks: expected less",
        ),
    ],
)
def test_mosaic_selects_blocks_as_far_as_its_registers_and_shared_memory_reach(change, config, message):
    case = dataclasses.replace(cases.fitted("mosaic", CASE), config=config, **change)
    with pytest.raises(NotImplementedError, match=message):
        call("mosaic", "select_blocks", case)
