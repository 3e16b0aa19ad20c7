"""Decoding of every backend against the reference's ops on the same rows laid out whole."""

import dataclasses
import functools
import itertools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nsa_jax import NSAConfig, num_compressed, reference
from nsa_jax.quantization import dequantize, quantize
from nsa_jax.testing import normwise_error, tolerance_of
from nsa_jax.visibility import gated_sum
from pallas_kernels.decode_attention.contract import bytes_read
from pallas_kernels.quantized import Quantized
from pallas_kernels.triton.tiles import DecodeTile
from tests.pallas_kernels import cases
from tests.pallas_kernels.cases import BACKENDS

SMALL = NSAConfig(8, 4, 16, 4, 1, 2, 20)
ODD = NSAConfig(32, 16, 48, 5, 1, 2, 70, select_in_window=False)


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of a few rows, up to dtype and values."""

    lengths: tuple[int, ...]  # of each row, its queries included
    m: int  # queries a row
    H: int
    K: int
    Dk: int
    Dv: int
    config: NSAConfig

    @property
    def options(self) -> dict[str, Any]:
        return {"config": self.config, "scale": self.Dk**-0.5}


STEPS = {
    "one token, ragged, group of 2": Step((1, 7, 8, 64, 65, 150), 1, 4, 2, 32, 32, SMALL),
    "drafts, group of 3, odd heads": Step((3, 40, 131), 3, 6, 2, 80, 40, SMALL),
    "one head a group": Step((100,), 2, 3, 3, 16, 16, dataclasses.replace(SMALL, compress_block=4)),
    "few blocks, group of 16": Step((57, 31), 1, 16, 1, 64, 64, dataclasses.replace(SMALL, num_selected=3)),
    "blocks of no power of two, 192 and 128": Step((97, 200), 1, 4, 1, 192, 128, ODD),
}
GPU_STEPS = {
    "paper": Step((1, 31, 4000, 9001), 1, 64, 4, 128, 128, NSAConfig()),
    "192 and 128, drafts": Step((5, 3000), 4, 64, 4, 192, 128, NSAConfig()),
    "one head a group": Step((700, 3000), 1, 4, 4, 64, 64, NSAConfig()),
    "64 heads a group, drafts": Step((900,), 3, 64, 1, 32, 48, NSAConfig()),
    "blocks of no power of two, odd": Step((333, 500), 2, 12, 2, 40, 96, ODD),
    "large heads, 128 a block": Step((2000,), 1, 8, 2, 256, 256, NSAConfig(64, 16, 128)),
}
POOLS = ("cmp_k", "cmp_v", "slc_k", "slc_v")
NAMES = (*POOLS, "win_k", "win_v")

each_backend = pytest.mark.parametrize("backend", BACKENDS)


class Inputs(NamedTuple):
    """Whole sequences (float32 numbers that the dtype holds), and the same in pages that lie anywhere."""

    q: np.ndarray
    gates: np.ndarray
    whole: dict[str, np.ndarray]
    paged: dict[str, Any]
    offsets: np.ndarray
    lengths: np.ndarray
    tables: np.ndarray

    def arguments(self, dtype: Any) -> tuple[Any, ...]:
        """What the op takes."""
        arrays = [self.q, *(self.paged[name] for name in NAMES)]
        arrays = [x if isinstance(x, Quantized) else jnp.asarray(x, dtype) for x in arrays]
        return *arrays, *map(jnp.asarray, (self.gates, self.offsets, self.lengths, self.tables))


def inputs(step: Step, dtype: Any) -> Inputs:
    """Places that no query may see, and pages that no row has, hold NaN. The last row has got one of its m tokens."""
    B, s, d, m = len(step.lengths), step.config.select_block, step.config.compress_stride, step.m
    N = -(-max(step.lengths) // s)
    P, ring = B * N + 3, step.config.window + m + 1
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return np.array(jnp.asarray(rng.standard_normal(shape), dtype).astype(jnp.float32))

    whole = {
        name: normal(B, N * s // (d if name.startswith("cmp") else 1), step.K, step.Dk if name[-1] == "k" else step.Dv)
        for name in NAMES
    }
    lengths = np.maximum(np.array(step.lengths, np.int32), m)
    offsets = lengths - m
    lengths[-1] = offsets[-1] + 1
    tables = np.full((B, N), -1, np.int32)
    order = rng.permutation(P)
    paged = {
        name: np.full((B, ring, *x.shape[2:]), np.nan, np.float32)
        if "win" in name
        else np.full((P, step.K, x.shape[1] // N, x.shape[3]), np.nan, np.float32)
        for name, x in whole.items()
    }
    for b, tokens in enumerate(lengths):
        used = -(-tokens // s)
        tables[b, :used] = order[b * N : b * N + used]
        for name in POOLS:
            size = whole[name].shape[1] // N
            row = whole[name][b].copy()
            row[num_compressed(tokens, step.config) if name.startswith("cmp") else tokens :] = np.nan
            for j in range(used):
                paged[name][tables[b, j]] = row[j * size : (j + 1) * size].swapaxes(0, 1)
        for p in range(max(0, tokens - ring), tokens):
            for name in ("win_k", "win_v"):
                paged[name][b, p % ring] = whole[name][b, p]
    q, gates = normal(B, m, step.H, step.Dk), rng.random((B, m, step.H, 3)).astype(np.float32)
    return Inputs(q, gates, whole, paged, offsets, lengths, tables)


def in_8_bits(given: Inputs) -> Inputs:
    """The same with pools in 8 bits, and whole sequences as they are read from these."""
    whole = {name: np.asarray(dequantize(quantize(given.whole[name]))) for name in POOLS}
    paged = {name: jax.jit(quantize)(given.paged[name]) for name in POOLS}
    return given._replace(whole=given.whole | whole, paged=given.paged | paged)


def expected(step: Step, given: Inputs) -> tuple[np.ndarray, np.ndarray]:
    """o and block indices of every row, at one length: what a row does not have yet lies past its queries."""

    def one_row(q: Any, gates: Any, whole: Any, offset: Any) -> Any:
        q, gates, whole = jax.tree.map(lambda x: x[None], (q, gates, whole))
        k, v, slc_k, slc_v, win_k, win_v = (whole[name] for name in NAMES)
        o_cmp, lse = reference.compressed_attention(q, k, v, None, offset, **step.options)
        indices = reference.select_blocks(q, k, lse, None, offset, **step.options)
        o_slc, _ = reference.selected_attention(q, slc_k, slc_v, indices, None, offset, **step.options)
        o_win, _ = reference.window_attention(q, win_k, win_v, None, offset, **step.options)
        return gated_sum(gates, o_cmp, o_slc, o_win)[0], indices[0]

    rows = jax.device_put((given.q, given.gates, given.whole, given.offsets), jax.devices("cpu")[0])
    o, indices = jax.jit(jax.vmap(one_row))(*rows)
    return np.asarray(o), np.asarray(indices)


def check(
    backend: str, step: Step, dtype: Any, tolerance: float, quantized: bool = False, **tile: DecodeTile
) -> tuple[Any, Any]:
    decode = functools.partial(cases.function(backend, "decode_attention"), **step.options, **tile)
    given = in_8_bits(inputs(step, dtype)) if quantized else inputs(step, dtype)
    run = functools.partial(jax.jit(decode), *given.arguments(dtype))
    o, indices = run()
    assert o.dtype == dtype
    assert indices.dtype == jnp.int32
    wanted, blocks = expected(step, given)
    for b, length in enumerate(step.lengths):
        count = min(step.m, length, given.lengths[b] - given.offsets[b])  # queries that mean something
        same = np.all(np.asarray(indices[b]) == blocks[b], axis=(0, 2))[:count]
        assert same.all() or dtype != jnp.float32, b
        got = np.asarray(o[b].astype(jnp.float32))
        assert np.isfinite(got).all(), b
        assert normwise_error(got[:count][same], wanted[b][:count][same]) <= tolerance, b
    return run, (o, indices)


REPEATED = ("one head a group", "few blocks, group of 16")


@each_backend
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.exhaustive] * (name in REPEATED)) for name in STEPS]
)
def test_equals_the_reference_on_whole_rows(backend, name):
    run, results = check(backend, STEPS[name], jnp.float32, 2e-6)
    for a, b in zip(results, run(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "name",
    [
        "drafts, group of 3, odd heads",
        pytest.param("blocks of no power of two, 192 and 128", marks=pytest.mark.exhaustive),
    ],
)
def test_a_cache_in_8_bits_is_read_as_the_reference_reads_it(name):
    check("triton", STEPS[name], jnp.float32, 2e-6, quantized=True)


def test_triton_decodes_with_a_tile_of_ones_own():
    check("triton", STEPS["few blocks, group of 16"], jnp.float32, 2e-6, tile=DecodeTile(16, 2, chunk=32))


def test_a_step_reads_the_keys_that_it_attends_to_and_a_dense_one_all():
    sizes = {"num_kv_heads": 2, "head_dim": 32, "v_head_dim": 16, "itemsize": 2}
    for T, compressed in ((7, 0), (8, 1), (150, 36)):
        keys = compressed + min(T, 4 * 16) + min(T, 20)
        assert bytes_read(T, SMALL, **sizes) == bytes_read(T, SMALL, **sizes, dense=False) == keys * 2 * (32 + 16) * 2
        assert bytes_read(T, SMALL, **sizes, dense=True) == T * 2 * (32 + 16) * 2
        in_8_bits = (compressed + min(T, 4 * 16)) * 2 * (32 + 4 + 16 + 4) + min(T, 20) * 2 * (32 + 16) * 2
        assert bytes_read(T, SMALL, **sizes, quantized=True) == in_8_bits


@pytest.mark.parametrize("batch", [1, 20, 300])
def test_triton_cuts_a_long_cache_into_at_most_128_parts_or_as_its_tile_says(batch):
    blocks, per_block = 32768, SMALL.select_block // SMALL.compress_stride
    step = dataclasses.replace(STEPS["few blocks, group of 16"], lengths=(1,) * batch)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs(step, jnp.float32).arguments(jnp.float32)]
    shapes[-1] = jax.ShapeDtypeStruct((batch, blocks), jnp.int32)

    def parts(tile: DecodeTile | None) -> int:
        decode = functools.partial(cases.function("triton", "decode_attention"), **step.options, tile=tile)
        grids = re.findall(r"grid=\((\d+), ", str(jax.make_jaxpr(decode)(*shapes)))
        return int(grids[0])  # of the first kernel

    assert 64 < parts(None) - 1 <= 128  # one is for the window
    assert parts(DecodeTile(32, 4, chunk=32)) - 1 == blocks * per_block // 32


def programs() -> list[Any]:
    """Every step, dtype and GPU, with 64-bit numbers and without by turns, in 8 bits or not; most are exhaustive."""
    ways = list(itertools.product((jnp.bfloat16, jnp.float16, jnp.float32), ("NVIDIA H100", "NVIDIA A100")))
    return [
        pytest.param(
            name, *way, (i + turn) % 2 == 0, bits, marks=[pytest.mark.exhaustive] * (i != turn or turn < least)
        )
        for turn, name in enumerate(GPU_STEPS)
        for i, way in enumerate(ways)
        for bits, least in ((None, 0), (8, 4))
    ]


@each_backend
@pytest.mark.parametrize(("name", "dtype", "kind", "x64", "bits"), programs())
def test_lowers_for_gpus(backend, name, dtype, kind, x64, bits):
    step = dataclasses.replace(GPU_STEPS[name], lengths=tuple(70 for _ in GPU_STEPS[name].lengths))
    given = in_8_bits(inputs(step, dtype)) if bits else inputs(step, dtype)
    given = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), given.arguments(dtype))
    with jax.enable_x64(x64), cases.abstract(kind):
        decode = functools.partial(cases.function(backend, "decode_attention"), **step.options)
        jax.jit(decode).trace(*given).lower(lowering_platforms=("cuda",))


@pytest.mark.gpu
@pytest.mark.parametrize("quantized", [False, True])
@each_backend
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("name", GPU_STEPS)
def test_gpu_equals_the_reference_on_whole_rows_twice(backend, name, dtype, quantized):
    with cases.poisoned(backend):
        run, results = check(backend, GPU_STEPS[name], dtype, tolerance_of(dtype), quantized)
    for a, b in zip(results, run(), strict=True):
        np.testing.assert_array_equal(a, b)
