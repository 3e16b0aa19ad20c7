"""What is timed: each op, the whole attention and the dense baseline, with the work each must do."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.benchmarks.ops import DEFAULT, parts_of
from pallas_kernels.benchmarks.patterns import Pattern, block_indices
from pallas_kernels.differentiable import Op, Positions
from pallas_kernels.nsa_attention.contract import Keys
from pallas_kernels.nsa_attention.fused import nsa_attention

Arguments = Mapping[Pattern | None, tuple[Array, ...]]  # by the selection that is attended to, if there is one


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

    @property
    def num_compressed(self) -> int:
        """Compressed tokens."""
        return max(0, (self.T - self.compress_block) // self.compress_stride + 1)


@dataclasses.dataclass(frozen=True)
class Case:
    """Something to time, on one or several tuples of arguments of the same shapes."""

    name: str
    backend: str
    forward: Callable[..., Any]
    arguments: Arguments
    differentiable: int  # how many of the arguments, from the first, the backward pass is taken for
    flops: float  # of the forward pass: two for each multiply-add of scores and outputs that causality leaves


class Inputs(NamedTuple):
    """Random arguments of the ops."""

    q: Array
    keys: Keys
    gates: Array
    block_indices: Array


def inputs(shape: Shape, pattern: Pattern, seed: int = 0) -> Inputs:
    """Standard normal arrays, gates in (0, 1) and a selection of the pattern."""
    T, H, K, Dk, Dv = shape.T, shape.H, shape.K, shape.Dk, shape.Dv
    keys = jax.random.split(jax.random.key(seed), 9)

    def normal(i: int, *dims: int) -> Array:
        return jax.random.normal(keys[i], (1, *dims), jnp.dtype(shape.dtype))

    return Inputs(
        q=normal(0, T, H, Dk),
        keys=Keys(*(normal(1 + i, (shape.num_compressed, T, T)[i // 2], K, (Dk, Dv)[i % 2]) for i in range(6))),
        gates=jax.nn.sigmoid(jax.random.normal(keys[7], (1, T, H, 3))),
        block_indices=selection(shape, pattern, seed),
    )


def selection(shape: Shape, pattern: Pattern, seed: int = 0) -> Array:
    """The selection alone, of the same seed."""
    key = jax.random.split(jax.random.key(seed), 9)[8]
    sizes = {"select_block": shape.select_block, "num_selected": shape.num_selected}
    return block_indices(key, pattern=pattern, K=shape.K, T=shape.T, **sizes)


def lse_of(shape: Shape, arrays: Inputs) -> Array:
    """What block selection is given: the lse of compressed attention, of the backend by default."""
    forward = jax.jit(parts_of(DEFAULT).compressed_attention, static_argnames=("config", "scale"))
    return forward(arrays.q, *arrays.keys[:2], None, 0, config=shape, scale=shape.Dk**-0.5)[1]


def cases(shape: Shape, backend: str, arrays: Inputs, selections: Mapping[Pattern, Array], lse: Array) -> list[Case]:
    """Every op alone and all of them as one attention, by one of `ops.BACKENDS`.

    Args:
      shape: of the layer.
      backend: whose kernels are timed.
      arrays: as `inputs` makes them.
      selections: what selected attention and the whole attention are timed on instead of `arrays.block_indices`.
      lse: see `lse_of`.
    """
    q, keys, gates, _ = arrays
    cmp_kv, slc_kv, win_kv = keys[:2], keys[2:4], keys[4:]
    options: dict[str, Any] = {"config": shape, "scale": shape.Dk**-0.5}
    parts = parts_of(backend)
    compressed_attention = Op(parts.compressed_attention, parts.compressed_attention_backward, returns_lse=True)
    selected_attention = Op(parts.selected_attention, parts.selected_attention_backward)
    window_attention = Op(parts.window_attention, parts.window_attention_backward)

    def compress(q: Array, k: Array, v: Array) -> Array:
        return compressed_attention(q, k, v, None, 0, **options)[0]

    def select(q: Array, k: Array, lse: Array) -> Array:
        return parts.select_blocks(q, k, lse, None, 0, **options)

    def selected(q: Array, k: Array, v: Array, indices: Array) -> Array:
        return selected_attention(q, k, v, indices, None, 0, **options)

    def window(q: Array, k: Array, v: Array) -> Array:
        return window_attention(q, k, v, None, 0, **options)

    def whole(q: Array, *arrays: Array) -> Array:
        *keys, gates, lse, indices = arrays
        # The selection is computed and paid for, but random inputs choose at random: the pattern's is attended to. A
        # barrier does not do: the compiler drops what comes out of it unused, and the selection with it.
        found = select(*jax.lax.stop_gradient((q, keys[0])), lse)
        indices = jnp.where(found < -1, found, indices)
        positions = Positions(None, 0)
        return nsa_attention(q, Keys(*keys), gates, positions, positions, indices, parts=parts, **options)

    def on_each(*arguments: Array) -> Arguments:
        return {pattern: (*arguments, indices) for pattern, indices in selections.items()}

    ops: list[tuple[str, Callable[..., Array], Arguments, int]] = [
        ("compressed_attention", compress, {None: (q, *cmp_kv)}, 3),
        ("block_selection", select, {None: (q, cmp_kv[0], lse)}, 0),
        ("selected_attention", selected, on_each(q, *slc_kv), 3),
        ("window_attention", window, {None: (q, *win_kv)}, 3),
        ("nsa", whole, on_each(q, *keys, gates, lse), 8),
    ]
    flops = _flops(shape)
    return [
        Case(name, backend, forward, arguments, differentiable, flops[name])
        for name, forward, arguments, differentiable in ops
    ]


def dense_cases(shape: Shape, arrays: Inputs) -> list[Case]:
    """CuDNN's attention: dense, and the window alone."""
    Dk, Dv = shape.Dk, shape.Dv

    def dense(q: Array, k: Array, v: Array, local_window_size: Any = None) -> Array:
        size = max(Dk, Dv)
        q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, size - x.shape[-1]))) for x in (q, k, v))
        o = jax.nn.dot_product_attention(
            q, k, v, scale=Dk**-0.5, is_causal=True, local_window_size=local_window_size, implementation="cudnn"
        )
        return o[..., :Dv]

    def dense_window(q: Array, k: Array, v: Array) -> Array:
        # With a window, cuDNN sees the future unless it is told that it is causal.
        return dense(q, k, v, (shape.window - 1, 0))

    arguments: Arguments = {None: (arrays.q, *arrays.keys[4:])}
    flops = _flops(shape)
    return [
        Case("dense", "cudnn", dense, arguments, 3, flops["dense"]),
        Case("dense_window", "cudnn", dense_window, arguments, 3, flops["window_attention"]),
    ]


def _flops(shape: Shape) -> dict[str, float]:
    """Of each op's forward pass."""
    T, H, Dk, Dv = shape.T, shape.H, shape.Dk, shape.Dv
    read = shape.num_selected * shape.select_block
    pairs = {
        "compressed_attention": T * shape.num_compressed / 2,
        "block_selection": T * shape.num_compressed / 2,
        "selected_attention": sum(min(t, read) for t in range(T)),
        "window_attention": sum(min(t, shape.window) for t in range(T)),
    }
    flops = {name: 2 * H * n * (Dk if name == "block_selection" else Dk + Dv) for name, n in pairs.items()}
    return {**flops, "nsa": sum(flops.values()), "dense": H * T * T * (Dk + Dv)}
