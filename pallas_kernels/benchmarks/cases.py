"""What is timed: each op, the whole attention and the dense baseline, with the work each must do."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.benchmarks.patterns import Pattern, block_indices
from pallas_kernels.block_selection import select_blocks
from pallas_kernels.compressed_attention import compressed_attention
from pallas_kernels.nsa_attention import nsa_attention
from pallas_kernels.selected_attention import selected_attention
from pallas_kernels.window_attention import window_attention


@dataclasses.dataclass(frozen=True)
class Shape:
    """One attention layer on one sequence."""

    T: int
    H: int = 64
    K: int = 4
    Dk: int = 128
    Dv: int = 128
    compress_block: int = 32
    compress_stride: int = 16
    select_block: int = 64
    num_selected: int = 16
    num_init: int = 1
    num_local: int = 2
    window: int = 512
    dtype: str = "bfloat16"


@dataclasses.dataclass(frozen=True)
class Case:
    """Something to time."""

    name: str
    forward: Callable[..., Any]
    arguments: tuple[Array, ...]
    differentiable: int  # how many of the arguments, from the first, the backward pass is taken for
    flops: float  # of the forward pass: two for each multiply-add of scores and outputs that causality leaves
    bytes: float  # the forward pass must move: each argument read once, the output written once


def cases(shape: Shape, pattern: Pattern, seed: int = 0) -> list[Case]:
    """Every op alone, all of them as one attention, then cuDNN: dense attention, and the window alone."""
    T, H, K, Dk, Dv = shape.T, shape.H, shape.K, shape.Dk, shape.Dv
    dtype = jnp.dtype(shape.dtype)
    compressed = max(0, (T - shape.compress_block) // shape.compress_stride + 1)
    keys = jax.random.split(jax.random.key(seed), 9)

    def normal(i: int, *dims: int) -> Array:
        return jax.random.normal(keys[i], (1, *dims), dtype)

    q = normal(0, T, H, Dk)
    cmp_kv = (normal(1, compressed, K, Dk), normal(2, compressed, K, Dv))
    slc_kv = (normal(3, T, K, Dk), normal(4, T, K, Dv))
    win_kv = (normal(5, T, K, Dk), normal(6, T, K, Dv))
    gates = jax.nn.sigmoid(jax.random.normal(keys[7], (1, T, H, 3)))
    chosen = block_indices(
        keys[8], pattern=pattern, K=K, T=T, select_block=shape.select_block, num_selected=shape.num_selected
    )
    scale = Dk**-0.5
    blocks: dict[str, Any] = {
        "compress_block": shape.compress_block,
        "compress_stride": shape.compress_stride,
        "scale": scale,
    }
    choice: dict[str, Any] = {
        "select_block": shape.select_block,
        "num_selected": shape.num_selected,
        "num_init": 1,
        "num_local": 2,
    }

    def compress(q, k, v):
        return compressed_attention(q, k, v, None, 0, **blocks)

    def select(q, k, lse):
        return select_blocks(q, k, lse, None, 0, **blocks, **choice)

    def selected(q, k, v, indices):
        return selected_attention(q, k, v, indices, None, 0, select_block=shape.select_block, scale=scale)

    def window(q, k, v):
        return window_attention(q, k, v, None, 0, window=shape.window, scale=scale)

    def whole(q, cmp_k, cmp_v, slc_k, slc_v, win_k, win_v, gates, indices, lse):
        # The selection is computed and paid for, but random inputs choose at random: the pattern's is attended to. A
        # barrier does not do: the compiler drops what comes out of it unused, and the selection with it.
        found = select(*jax.lax.stop_gradient((q, cmp_k)), lse)
        indices = jnp.where(found < -1, found, indices)
        sizes = {**blocks, **choice, "window": shape.window}
        return nsa_attention(q, cmp_k, cmp_v, slc_k, slc_v, win_k, win_v, gates, None, 0, indices, **sizes)

    def dense(q, k, v, local_window_size=None):
        size = max(Dk, Dv)
        q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, size - x.shape[-1]))) for x in (q, k, v))
        o = jax.nn.dot_product_attention(
            q, k, v, scale=scale, is_causal=True, local_window_size=local_window_size, implementation="cudnn"
        )
        return o[..., :Dv]

    def dense_window(q, k, v):  # with a window, cuDNN sees the future unless it is told that it is causal
        return dense(q, k, v, (shape.window - 1, 0))

    _, lse = jax.jit(compress)(q, *cmp_kv)
    read = shape.num_selected * shape.select_block
    pairs = {
        "compressed_attention": T * compressed / 2,
        "block_selection": T * compressed / 2,
        "selected_attention": sum(min(t, read) for t in range(T)),
        "window_attention": sum(min(t, shape.window) for t in range(T)),
        "dense": T * T / 2,
    }
    flops = {name: 2 * H * n * (Dk if name == "block_selection" else Dk + Dv) for name, n in pairs.items()}
    flops["nsa"] = sum(n for name, n in flops.items() if name != "dense")
    flops["dense_window"] = flops["window_attention"]

    def case(name: str, forward: Callable, arguments: tuple[Array, ...], differentiable: int) -> Case:
        out = jax.eval_shape(forward, *arguments)
        moved = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((arguments, out)))
        return Case(name, forward, arguments, differentiable, flops[name], moved)

    everything = (q, *cmp_kv, *slc_kv, *win_kv, gates, chosen, lse)
    return [
        case("compressed_attention", lambda *a: compress(*a)[0], (q, *cmp_kv), 3),
        case("block_selection", select, (q, cmp_kv[0], lse), 0),
        case("selected_attention", selected, (q, *slc_kv, chosen), 3),
        case("window_attention", window, (q, *win_kv), 3),
        case("nsa", whole, everything, 8),
        case("dense", dense, (q, *win_kv), 3),
        case("dense_window", dense_window, (q, *win_kv), 3),
    ]
