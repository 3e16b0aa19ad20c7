"""New tokens in a paged cache, place by place, by every backend that has kernels for it and by those in pure JAX."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nsa_jax import NSAConfig, backends
from nsa_jax.quantization import dequantize, quantize
from nsa_jax.testing import tolerance_of
from pallas_kernels.append_tokens.contract import Gates, Heads, Places
from pallas_kernels.triton.tiles import AppendTile
from tests.pallas_kernels import cases

SMALL = NSAConfig(8, 4, 16, 4, 1, 2, 20)


@dataclasses.dataclass(frozen=True)
class Append:
    """New tokens of a few rows, up to dtype and values."""

    lengths: tuple[int, ...]  # of each row, without the new tokens
    num_tokens: tuple[int, ...]  # new tokens that count
    m: int  # new tokens
    K: int
    Dk: int
    Dv: int
    config: NSAConfig
    finished: tuple[bool, bool] = (False, False)  # whether compressed keys and values are given
    pages: int | None = None  # that every row has; None: as many as its tokens need
    H: int | None = None  # query heads, if the kernel rotates them, and keys; the six arrays are then columns of one


APPENDS = {
    "one token, ragged": Append((0, 6, 7, 8, 11, 63, 64, 150), (1, 1, 1, 0, 1, 1, 1, 1), 1, 2, 32, 32, SMALL),
    "drafts that finish two, heads of odd sizes": Append((0, 3, 5, 40, 131), (6, 5, 6, 1, 0), 6, 3, 80, 40, SMALL),
    "compressed values are given": Append((7, 15, 9), (1, 2, 2), 2, 1, 16, 24, SMALL, (False, True)),
    "compressed tokens are given": Append((7, 15, 9, 4), (5, 5, 3, 4), 5, 2, 64, 64, SMALL, (True, True)),
    "rows without a page": Append((15, 16, 30, 32), (2, 1, 4, 3), 4, 1, 32, 32, SMALL, pages=2),
    "rotated, ragged, group of 3": Append((0, 6, 7, 8, 63, 150), (1, 1, 1, 0, 1, 1), 1, 2, 32, 32, SMALL, H=6),
    "rotated drafts, odd heads": Append((0, 3, 5, 40, 131), (6, 5, 6, 1, 0), 6, 1, 80, 40, SMALL, H=4),
    "no overlap, odd sizes": Append((47, 30, 95), (1, 1, 1), 1, 2, 32, 16, NSAConfig(24, 24, 48, 4, 1, 2, 7)),
}
GPU_APPENDS = {
    "paper, rotated": Append((31, 4000, 9007, 0), (1, 1, 1, 1), 1, 4, 128, 128, NSAConfig(), H=64),
    "drafts, 192 and 128, rotated": Append((31, 3000, 90), (4, 4, 2), 4, 2, 192, 128, NSAConfig(), H=6),
    "paper": Append((31, 4000, 9007, 0), (1, 1, 1, 1), 1, 4, 128, 128, NSAConfig()),
    "drafts, 192 and 128": Append((31, 3000, 90), (4, 4, 2), 4, 4, 192, 128, NSAConfig()),
    "compressed tokens are given": Append((31, 47), (1, 1), 1, 1, 64, 48, NSAConfig(), (True, True)),
}


# Between them given and made compressed tokens, several of them, odd heads, rotation and rows without a page.
IN_8_BITS = (
    "drafts that finish two, heads of odd sizes",
    "compressed values are given",
    "rows without a page",
    "rotated, ragged, group of 3",
)
POOLS = Places._fields[:4]


def inputs(case: Append, dtype: Any) -> tuple[Any, ...]:
    """Arguments of the op. What the cache must keep are random numbers, with NaN in every place that holds no token."""
    config, B, m = case.config, len(case.lengths), case.m
    l, d, s = config.compress_block, config.compress_stride, config.select_block  # noqa: E741
    rng = np.random.default_rng(0)
    N = -(-max(a + b for a, b in zip(case.lengths, case.num_tokens, strict=True)) // s)
    pages = N if case.pages is None else case.pages
    tables = rng.permutation(B * N + 2)[: B * N].reshape(B, N).astype(np.int32)
    tables[:, pages:] = -1

    def normal(*shape: int) -> np.ndarray:
        return np.array(jnp.asarray(rng.standard_normal(shape), dtype))

    def ring(R: int, D: int) -> np.ndarray:
        x = np.full((B, R, case.K, D), np.nan, normal(1).dtype)
        for b, length in enumerate(case.lengths):
            for position in range(max(0, length - R), length):
                x[b, position % R] = normal(case.K, D)
        return x

    sizes = (case.Dk, case.Dv)
    places = Places(
        *(normal(B * N + 2, case.K, s, D) for D in sizes),
        *(normal(B * N + 2, case.K, s // d, D) for D in sizes),
        *(ring(l + m - 1, D) for D in sizes),
        *(ring(config.window + m - 1, D) for D in sizes),
    )
    widths = [case.K * D for D in sizes * 3]
    if case.H is not None:
        widths = [case.H * case.Dk, *widths, 150, 7]  # of which the last are something else
    joined = normal(B, m, sum(widths))
    for b, count in enumerate(case.num_tokens):
        joined[b, count:] = np.nan
    columns = [sum(widths[:i]) for i in range(len(widths))]
    q, rotation, gates = None, None, None
    if case.H is None:
        new = [Heads(joined[:, :, i : i + width]) for i, width in zip(columns, widths, strict=True)]
    else:
        q, *new, hidden = (Heads(joined, column) for column in columns[:-1])
        gates = Gates(hidden, normal(150), 0.1 * normal(150, case.H, 3), normal(case.H, 3))
        angle = rng.standard_normal((2, B, m, case.Dk // 2)).astype(np.float32)
        rotation = (np.cos(angle[0]), np.sin(angle[1]))
    finished = [
        normal(B, -(-m // d), case.K, D) if given else None for D, given in zip(sizes, case.finished, strict=True)
    ]
    return (q, *new, *finished, rotation, gates, places, np.int32(case.lengths), np.int32(case.num_tokens), tables)


def expected(case: Append, given: tuple[Any, ...]) -> tuple[np.ndarray | None, np.ndarray | None, Places]:
    """Rotated queries, gates, and the cache after the loop that the contract describes."""
    q, *heads, finished_k, finished_v, rotation, gates, places, lengths, counts, tables = given
    finished = finished_k, finished_v

    def taken(heads: Heads, count: int, D: int, rotates: bool) -> np.ndarray:
        x = heads.array[:, :, heads.column : heads.column + count * D].reshape(*heads.array.shape[:2], count, D)
        if rotation is None or not rotates:
            return x
        cos, sin = (each[:, :, None] for each in rotation)
        low, high = np.split(np.float32(x), 2, axis=3)
        return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=3).astype(x.dtype)

    rotated = None if q is None else taken(q, case.H or 0, case.Dk, True)
    opened = None
    if gates is not None:
        wide = [np.float32(x) for x in (gates.hidden.array, *gates[1:])]
        h = wide[0][:, :, gates.hidden.column : gates.hidden.column + 150] + wide[1]
        opened = 1 / (1 + np.exp(-(np.tensordot(h / (1 + np.exp(-h)), wide[2], 1) + wide[3])))
    tokens = [taken(each, case.K, (case.Dk, case.Dv)[i % 2], i % 2 == 0) for i, each in enumerate(heads)]
    pooled, selected, window = tokens[:2], tokens[2:4], tokens[4:]
    config, after = case.config, Places(*map(np.copy, places))
    l, d, s = config.compress_block, config.compress_stride, config.select_block  # noqa: E741
    for b, kind in itertools.product(range(len(lengths)), (0, 1)):
        slc, cmp, tail, win = after[kind::2]
        length, end = lengths[b], lengths[b] + counts[b]
        number = 0
        for i in range(end):
            if not length < i * d + l <= end:
                continue
            values = finished[kind]
            if values is None:
                old, R = places[4 + kind], tail.shape[1]
                each = [old[b, p % R] if p < length else pooled[kind][b, p - length] for p in range(i * d, i * d + l)]
                value = np.mean(np.float32(each), axis=0)
            else:
                value = values[b, number]
            number += 1
            if (page := tables[b, i * d // s]) >= 0:
                cmp[page, :, i * d % s // d] = value
        for j, p in enumerate(range(length, end)):
            if (page := tables[b, p // s]) >= 0:
                slc[page, :, p % s] = selected[kind][b, j]
            tail[b, p % tail.shape[1]] = pooled[kind][b, j]
            win[b, p % win.shape[1]] = window[kind][b, j]
    return rotated, opened, after


def call(append: Any, case: Append, given: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    """The op as a function of arrays alone, and these."""
    gates = given[10]
    heads = [*given[:7], None if gates is None else gates.hidden]
    columns = [None if each is None else each.column for each in heads]

    def run(arrays: tuple[Any, ...], rest_of_gates: Any, finished: Any, rotation: Any, *rest: Any) -> Any:
        *heads, hidden = (None if x is None else Heads(x, i) for x, i in zip(arrays, columns, strict=True))
        opened = None if hidden is None else Gates(hidden, *rest_of_gates)
        sizes = {"config": case.config, "num_heads": case.H or case.K}
        return append(*heads, *finished, rotation, opened, *rest, **sizes)

    arrays = tuple(None if each is None else each.array for each in heads)
    return run, (arrays, () if gates is None else tuple(gates[1:]), given[7:9], given[9], *given[11:])


def check(append: Any, case: Append, dtype: Any, tolerance: float) -> None:
    given = inputs(case, dtype)
    run, arrays = call(append, case, given)
    *of_tokens, written = jax.jit(run)(*jax.tree.map(jnp.asarray, arrays))
    *wanted_of_tokens, wanted = expected(case, given)
    close = functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance)
    for x, y in zip(of_tokens, wanted_of_tokens, strict=True):
        assert (x is None) == (y is None) == (case.H is None)
        for b, count in enumerate(case.num_tokens if x is not None else ()):
            close(np.float32(x[b, :count]), np.float32(y[b, :count]))
    if case.H is not None:
        assert of_tokens[0].dtype == dtype
        assert of_tokens[1].dtype == jnp.float32
    for name, actual, place in zip(Places._fields, written, wanted, strict=True):
        assert actual.dtype == dtype
        actual, place = np.asarray(actual, np.float32), np.asarray(place, np.float32)
        if name.startswith("cmp") or (name.endswith("k") and case.H is not None):
            close(actual, place, err_msg=name)
        else:
            np.testing.assert_array_equal(actual, place, err_msg=name)


def in_8_bits(places: Places) -> Places:
    """The same with all pools of pages in 8 bits."""
    return places._replace(**{name: quantize(jnp.asarray(getattr(places, name))) for name in POOLS})


def check_in_8_bits(append: Any, case: Append, dtype: Any, tolerance: float) -> None:
    """What is read of a place is within half a factor of what an exact cache holds there; others stay as they are."""
    given = inputs(case, dtype)
    run, arrays = call(append, case, given)
    *arrays, lengths, counts, tables = jax.tree.map(jnp.asarray, arrays)
    *front, places = arrays
    before = in_8_bits(places)
    _, _, written = jax.jit(run)(*front, before, lengths, counts, tables)
    _, _, wanted = expected(case, given)
    for name in POOLS:
        old, held, exact = getattr(before, name), getattr(written, name), np.float32(getattr(wanted, name))
        assert (held.values.dtype, held.scale.dtype) == (jnp.int8, jnp.float32)
        stays = (exact == np.float32(getattr(given[11], name))).all(axis=-1)
        for a, b in zip(held, old, strict=True):
            np.testing.assert_array_equal(np.asarray(a)[stays], np.asarray(b)[stays], err_msg=name)
        assert stays.any()
        assert not stays.all() or name.startswith("cmp")
        error = np.abs(np.asarray(dequantize(held)) - exact)[~stays]
        most = 0.501 * np.asarray(held.scale)[~stays] + tolerance * np.abs(exact[~stays])
        assert (error <= most).all(), name
    for name in Places._fields[len(POOLS) :]:
        np.testing.assert_allclose(
            *(np.float32(getattr(each, name)) for each in (written, wanted)), rtol=tolerance, atol=tolerance
        )


@pytest.mark.parametrize("backend", ["reference", "xla", "triton"])
@pytest.mark.parametrize("name", APPENDS)
def test_every_place_holds_what_the_contract_says(backend, name):
    append = backends.get(backend).append_tokens if backend != "triton" else cases.function(backend, "append_tokens")
    check(append, APPENDS[name], jnp.float32, 2e-6)


@pytest.mark.parametrize("backend", [pytest.param("reference", marks=pytest.mark.exhaustive), "xla", "triton"])
@pytest.mark.parametrize("name", IN_8_BITS)
def test_every_place_in_8_bits_holds_what_the_contract_says(backend, name):
    append = backends.get(backend).append_tokens if backend != "triton" else cases.function(backend, "append_tokens")
    check_in_8_bits(append, APPENDS[name], jnp.float32, 2e-6)


def test_gates_may_be_opened_by_other_chunks():
    append = functools.partial(cases.function("triton", "append_tokens"), tile=AppendTile(32, 8))
    check(append, APPENDS["rotated drafts, odd heads"], jnp.float32, 2e-6)


def programs() -> list[Any]:
    """Every call, GPU and width: by default one GPU with each width, and in 8 bits two of them."""
    gpus = ((jnp.bfloat16, "NVIDIA H100"), (jnp.float32, "NVIDIA A100"))
    shown = (("paper, rotated", True), ("compressed tokens are given", False))

    def is_shown(name: str, of: tuple, x64: bool, quantized: bool) -> bool:
        return (of == gpus[1]) == x64 and (not quantized or (name, x64) in shown)

    return [
        pytest.param(
            name, *of, x64, quantized, marks=[pytest.mark.exhaustive] * (not is_shown(name, of, x64, quantized))
        )
        for name, of, x64, quantized in itertools.product(GPU_APPENDS, gpus, (False, True), (False, True))
    ]


@pytest.mark.parametrize(("name", "dtype", "kind", "x64", "quantized"), programs())
def test_lowers_for_gpus_to_one_kernel_that_writes_in_place(name, dtype, kind, x64, quantized):
    case = GPU_APPENDS[name]
    given = inputs(case, dtype)
    given = (*given[:11], in_8_bits(given[11]) if quantized else given[11], *given[12:])
    with jax.enable_x64(x64), cases.abstract(kind):
        run, arrays = call(cases.function("triton", "append_tokens"), case, given)
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays)
        text = jax.jit(run).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.custom_call") == 1
    assert text.count("output_operand_alias<") == len(jax.tree.leaves(given[11]))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("name", [*APPENDS, *GPU_APPENDS])
def test_every_place_on_a_gpu_holds_what_the_contract_says(name, dtype):
    check(cases.function("triton", "append_tokens"), (APPENDS | GPU_APPENDS)[name], dtype, tolerance_of(dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("name", [*APPENDS, *GPU_APPENDS])
def test_every_place_in_8_bits_on_a_gpu_holds_what_the_contract_says(name, dtype):
    case = (APPENDS | GPU_APPENDS)[name]
    check_in_8_bits(cases.function("triton", "append_tokens"), case, dtype, tolerance_of(dtype))


def test_triton_refuses_a_branch_that_is_off_and_another_dtype():
    case = APPENDS["one token, ragged"]
    run, arrays = call(cases.function("triton", "append_tokens"), case, inputs(case, jnp.float32))
    arrays = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays)
    places = arrays[4]
    assert isinstance(places, Places)
    for change, message in (
        ({"win_k": jax.ShapeDtypeStruct((8, 0, 2, 32), jnp.float32)}, "win_k: expected places"),
        ({"cmp_v": jax.ShapeDtypeStruct(places.cmp_v.shape, jnp.bfloat16)}, "bfloat16 beside float32: expected one"),
    ):
        with pytest.raises(NotImplementedError, match=message):
            jax.eval_shape(run, *arrays[:4], places._replace(**change), *arrays[5:])
