"""What is timed: each op, the whole attention and the dense baseline, with the work each must do."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.benchmarks.ops import (
    PARTS,
    compressed_attention,
    select_blocks,
    selected_attention,
    window_attention,
)
from pallas_kernels.benchmarks.patterns import Pattern, block_indices
from pallas_kernels.differentiable import Positions
from pallas_kernels.nsa_attention.contract import Keys
from pallas_kernels.nsa_attention.fused import nsa_attention


@dataclasses.dataclass(frozen=True)
class Shape:
    """One attention layer on one sequence; it is the `config` of the ops, too."""

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
    select_in_window: bool = True
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


class Inputs(NamedTuple):
    """Random arguments of the ops."""

    q: Array
    keys: Keys
    gates: Array
    block_indices: Array


def inputs(shape: Shape, pattern: Pattern, seed: int = 0) -> Inputs:
    """Standard normal arrays, gates in (0, 1) and a selection of the pattern."""
    T, H, K, Dk, Dv = shape.T, shape.H, shape.K, shape.Dk, shape.Dv
    compressed = max(0, (T - shape.compress_block) // shape.compress_stride + 1)
    keys = jax.random.split(jax.random.key(seed), 9)

    def normal(i: int, *dims: int) -> Array:
        return jax.random.normal(keys[i], (1, *dims), jnp.dtype(shape.dtype))

    return Inputs(
        q=normal(0, T, H, Dk),
        keys=Keys(*(normal(1 + i, (compressed, T, T)[i // 2], K, (Dk, Dv)[i % 2]) for i in range(6))),
        gates=jax.nn.sigmoid(jax.random.normal(keys[7], (1, T, H, 3))),
        block_indices=block_indices(
            keys[8], pattern=pattern, K=K, T=T, select_block=shape.select_block, num_selected=shape.num_selected
        ),
    )


def cases(shape: Shape, pattern: Pattern, seed: int = 0) -> list[Case]:
    """Every op alone, all of them as one attention, then cuDNN: dense attention, and the window alone."""
    T, H, Dk, Dv = shape.T, shape.H, shape.Dk, shape.Dv
    q, keys, gates, chosen = inputs(shape, pattern, seed)
    cmp_kv, slc_kv, win_kv = keys[:2], keys[2:4], keys[4:]
    scale = Dk**-0.5
    options: dict[str, Any] = {"config": shape, "scale": scale}

    def compress(q: Array, k: Array, v: Array) -> Any:
        return compressed_attention(q, k, v, None, 0, **options)

    def select(q: Array, k: Array, lse: Array) -> Array:
        return select_blocks(q, k, lse, None, 0, **options)

    def selected(q: Array, k: Array, v: Array, indices: Array) -> Array:
        return selected_attention(q, k, v, indices, None, 0, **options)

    def window(q: Array, k: Array, v: Array) -> Array:
        return window_attention(q, k, v, None, 0, **options)

    def whole(q: Array, *arrays: Array) -> Array:
        *keys, gates, indices, lse = arrays
        # The selection is computed and paid for, but random inputs choose at random: the pattern's is attended to. A
        # barrier does not do: the compiler drops what comes out of it unused, and the selection with it.
        found = select(*jax.lax.stop_gradient((q, keys[0])), lse)
        indices = jnp.where(found < -1, found, indices)
        positions = Positions(None, 0)
        return nsa_attention(q, Keys(*keys), gates, positions, positions, indices, parts=PARTS, **options)

    def dense(q: Array, k: Array, v: Array, local_window_size: Any = None) -> Array:
        size = max(Dk, Dv)
        q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, size - x.shape[-1]))) for x in (q, k, v))
        o = jax.nn.dot_product_attention(
            q, k, v, scale=scale, is_causal=True, local_window_size=local_window_size, implementation="cudnn"
        )
        return o[..., :Dv]

    def dense_window(
        q: Array, k: Array, v: Array
    ) -> Array:  # with a window, cuDNN sees the future unless it is told that it is causal
        return dense(q, k, v, (shape.window - 1, 0))

    _, lse = jax.jit(compress)(q, *cmp_kv)
    read = shape.num_selected * shape.select_block
    num_compressed = keys.cmp_k.shape[1]
    pairs = {
        "compressed_attention": T * num_compressed / 2,
        "block_selection": T * num_compressed / 2,
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

    everything = (q, *keys, gates, chosen, lse)
    return [
        case("compressed_attention", lambda *a: compress(*a)[0], (q, *cmp_kv), 3),
        case("block_selection", select, (q, cmp_kv[0], lse), 0),
        case("selected_attention", selected, (q, *slc_kv, chosen), 3),
        case("window_attention", window, (q, *win_kv), 3),
        case("nsa", whole, everything, 8),
        case("dense", dense, (q, *win_kv), 3),
        case("dense_window", dense_window, (q, *win_kv), 3),
    ]
