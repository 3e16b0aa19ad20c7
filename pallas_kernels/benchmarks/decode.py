"""Times one layer's decoding step, all branches, against cuDNN's dense attention; prints a table and writes JSON.

Both read caches in the dtype of the queries, and Native Sparse Attention also pages in 8 bits.
"""

import argparse
import dataclasses
import itertools
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.benchmarks.cases import Shape
from pallas_kernels.benchmarks.ops import decode_attention
from pallas_kernels.benchmarks.provenance import provenance
from pallas_kernels.benchmarks.timing import Timing, time_call
from pallas_kernels.decode_attention.contract import bytes_read
from pallas_kernels.quantized import MOST, Quantized

BYTES = 400e6  # read by the layers that the steps go through, so that no cache of the GPU holds them all
MOST_LAYERS = 16
STEPS = 16  # of one timed program, so that the host is ahead


def inputs(shape: Shape, batch: int, seed: int, quantized: bool = False) -> tuple[Any, ...]:
    """Arguments of `decode_attention` for the last of T tokens of each row, with pages anywhere in the pools.

    If these are `quantized`, their numbers are int8, and any factors.
    """
    T, H, K, Dk, Dv, s = shape.T, shape.H, shape.K, shape.Dk, shape.Dv, shape.select_block
    N = T // s
    keys = iter(jax.random.split(jax.random.key(seed), 9))

    def normal(*dims: int) -> Array:
        return jax.random.normal(next(keys), dims, jnp.dtype(shape.dtype))

    def pool(*dims: int) -> Array | Quantized:
        if not quantized:
            return normal(*dims)
        values = jax.random.randint(next(keys), dims, -MOST, MOST + 1, jnp.int8)
        return Quantized(values, jnp.full((*dims[:-1], 1), 2 / MOST))  # as of numbers between -2 and 2

    pools = [pool(batch * N, K, size, D) for size in (s // shape.compress_stride, s) for D in (Dk, Dv)]
    rings = [normal(batch, shape.window, K, D) for D in (Dk, Dv)]
    gates = jax.nn.sigmoid(jax.random.normal(next(keys), (batch, 1, H, 3)))
    tables = jax.random.permutation(next(keys), batch * N).astype(jnp.int32).reshape(batch, N)
    lengths = jnp.full((batch,), T, jnp.int32)
    return (normal(batch, 1, H, Dk), *pools, *rings, gates, lengths - 1, lengths, tables)


def sparse_step(shape: Shape) -> Callable[..., Array]:
    """Native Sparse Attention of one new token of each row."""

    def step(*arguments: Array) -> Array:
        return decode_attention(*arguments, config=shape, scale=shape.Dk**-0.5)[0]

    return step


def dense_step(shape: Shape) -> Callable[..., Array]:
    """CuDNN's attention of one new token of each row to all T, in arrays of the size of the selected branch's pools."""

    def step(q: Array, _: Array, __: Array, k: Array, v: Array, *rest: Array) -> Array:
        k, v = (x.reshape(q.shape[0], shape.T, shape.K, x.shape[3]) for x in (k, v))
        return jax.nn.dot_product_attention(q, k, v, scale=shape.Dk**-0.5, implementation="cudnn")

    return step


def time_step(step: Callable[..., Array], layers: list[tuple[Array, ...]]) -> Timing:
    """Milliseconds of one step, from a program of `STEPS` steps, one after the other, through the layers in turn."""

    def run(q: Array, layers: list[tuple[Array, ...]]) -> list[Array]:
        outputs = []
        for layer in itertools.islice(itertools.cycle(layers), STEPS):
            q, o = jax.lax.optimization_barrier((q, step(q, *layer)))  # the next step waits for this one
            outputs.append(o)
        return outputs

    arguments = (layers[0][0], [layer[1:] for layer in layers])
    timing = time_call(jax.jit(run).lower(*arguments).compile(), arguments)
    return Timing(*(x / STEPS for x in dataclasses.astuple(timing)))


def measure(shape: Shape, batch: int, peak_bandwidth: float) -> dict[str, Any]:
    """Times of all, the ratio, and the bandwidth of what must be read as a share of the card's.

    "int8" is "nsa" over pages in 8 bits.
    """
    row: dict[str, Any] = {"batch": batch, "T": shape.T}
    for name, step in (("nsa", sparse_step(shape)), ("int8", sparse_step(shape)), ("dense", dense_step(shape))):
        kind = {"dense": name == "dense", "quantized": name == "int8"}
        read = batch * bytes_read(
            shape.T,
            shape,
            num_kv_heads=shape.K,
            head_dim=shape.Dk,
            v_head_dim=shape.Dv,
            itemsize=jnp.dtype(shape.dtype).itemsize,
            **kind,
        )
        count = min(MOST_LAYERS, math.ceil(BYTES / read))
        layers = [inputs(shape, batch, seed, quantized=kind["quantized"]) for seed in range(count)]
        timing = time_step(step, layers)
        row[f"{name}_ms"] = dataclasses.asdict(timing)
        row[f"{name}_bytes"] = read
        row[f"{name}_bandwidth_share"] = read / timing.median / 1e6 / peak_bandwidth
        row[f"{name}_layers"] = count
    row["dense / nsa"] = row["dense_ms"]["median"] / row["nsa_ms"]["median"]
    row["nsa / int8"] = row["nsa_ms"]["median"] / row["int8_ms"]["median"]
    return row


def main(arguments: list[str]) -> int:
    """Runs the benchmark that the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.benchmarks.decode", description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768, 65536])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--heads", type=int, default=64, help="query heads")
    parser.add_argument("--kv-heads", type=int, default=4, help="key/value heads")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--bandwidth", type=float, default=3350.0, help="the card's, in GB/s; default: H100 SXM")
    parser.add_argument("--out", type=Path, default=None, help="write OUT.json")
    options = parser.parse_args(arguments)
    if jax.default_backend() != "gpu":
        parser.error("no GPU was found; the kernels are timed on one")
    rows: list[dict[str, Any]] = []
    print("batch | T | NSA ms | int8 ms | dense ms | dense / NSA | NSA / int8 | bandwidth of each", flush=True)
    for T in options.lengths:
        shape = Shape(T=T, H=options.heads, K=options.kv_heads, Dk=options.head_dim, Dv=options.head_dim)
        for batch in options.batches:
            row = measure(shape, batch, options.bandwidth)
            rows.append(row)
            kinds = ("nsa", "int8", "dense")
            times = " | ".join(f"{row[f'{kind}_ms']['median']:.4f}" for kind in kinds)
            shares = ", ".join(f"{row[f'{kind}_bandwidth_share']:.0%}" for kind in kinds)
            ratios = f"{row['dense / nsa']:.2f} | {row['nsa / int8']:.2f}"
            print(f"{batch} | {T} | {times} | {ratios} | {shares}", flush=True)
            if options.out is not None:
                result = {
                    "provenance": provenance(["python", "-m", "pallas_kernels.benchmarks.decode", *arguments]),
                    "shape": {k: v for k, v in dataclasses.asdict(shape).items() if k != "T"},
                    "units": "milliseconds per step; bandwidth as a share of " + str(options.bandwidth) + " GB/s",
                    "rows": rows,
                }
                options.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
