"""What tiles are timed on: a program of each op that takes the tile as an argument."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.append_tokens.contract import Gates, Heads, Places
from pallas_kernels.append_tokens.triton import append_tokens
from pallas_kernels.benchmarks import decode
from pallas_kernels.benchmarks.cases import Shape, inputs
from pallas_kernels.benchmarks.ops import decode_attention, parts_of
from pallas_kernels.benchmarks.patterns import Pattern
from pallas_kernels.one_row_product.contract import Norm
from pallas_kernels.one_row_product.triton import one_row_product


@dataclasses.dataclass(frozen=True)
class Problem:
    """One call of an op; each op reads what is for it."""

    shape: Shape
    pattern: Pattern = "random"  # of a selection
    batch: int = 1  # rows of a decoding step
    matrix: tuple[int, int] = (2560, 1024)  # rows and columns

    def __str__(self) -> str:
        return f"T {self.shape.T}, {self.shape.H}/{self.shape.K} heads"


@dataclasses.dataclass(frozen=True)
class Program:
    """A function of arrays for each tile, and the arrays.

    A call of the function is several `calls` of the op where one is so short that the host would be behind.
    """

    function: Callable[[Any], Callable[..., Any]]
    arrays: tuple[Any, ...]
    calls: int = 1


def program(op: str, backend: str, argument: str, problem: Problem, interpret: bool = False) -> Program:
    """The program of an op of one backend, whose `argument` takes the tile."""
    if op == "one_row_product":
        return _product(problem, interpret)
    if op == "append_tokens":
        return _append(problem, interpret)
    shape = problem.shape
    options: dict[str, Any] = {"config": shape, "scale": shape.Dk**-0.5, "interpret": interpret}
    if op == "decode_attention":
        arrays = decode.inputs(shape, problem.batch, seed=0)
        return Program(lambda tile: lambda *arrays: decode_attention(*arrays, **options, tile=tile), arrays)
    parts = parts_of(backend)
    q, keys, gates, block_indices = inputs(shape, problem.pattern)
    if op == "block_selection":
        o, lse = jax.jit(lambda *a: parts.compressed_attention(*a, None, 0, **options))(q, *keys[:2])
        arrays = (q, keys.cmp_k, lse)
        return Program(lambda tile: lambda *a: parts.select_blocks(*a, None, 0, **options, tile=tile), arrays)
    branch = ("compressed_attention", "selected_attention", "window_attention").index(op)
    arrays = (q, *keys[2 * branch : 2 * branch + 2], *([block_indices] if op == "selected_attention" else []))
    forward, backward = getattr(parts, op), getattr(parts, op + "_backward")
    if argument == "tile":
        return Program(lambda tile: lambda *a: forward(*a, None, 0, **options, tile=tile), arrays)
    o, lse = jax.jit(lambda *a: forward(*a, None, 0, **options))(*arrays)

    def gradients(tile: Any) -> Callable[..., Any]:
        return lambda *a: backward(*a[:-1], None, 0, gate=a[-1], **options, **{argument: tile})

    return Program(gradients, (*arrays, o, lse, o, gates[..., branch]))


def _product(problem: Problem, interpret: bool) -> Program:
    """With a norm, of as many matrices as it takes for no cache of the GPU to hold them all."""
    F, D = problem.matrix
    of_x, *of_matrices = jax.random.split(jax.random.key(0), 1 + decode.MOST_LAYERS)
    x = jax.random.normal(of_x, (D,), jnp.dtype(problem.shape.dtype))
    matrices = [jax.random.normal(key, (F, D), x.dtype) for key in of_matrices]

    def products(tile: Any) -> Callable[..., list[Array]]:
        def run(x: Array, scale: Array, matrices: list[Array]) -> list[Array]:
            results: list[Array] = []
            for matrix in matrices:
                x, matrix, *_ = jax.lax.optimization_barrier((x, matrix, *results[-1:]))  # one after the other
                results.append(one_row_product(x, matrix, norm=Norm(scale, 1e-6), interpret=interpret, tile=tile))
            return results

        return run

    return Program(products, (x, jnp.ones_like(x), matrices), len(matrices))


def _append(problem: Problem, interpret: bool) -> Program:
    """One token of each row, rotated, that finishes a compressed token, with gates; written again and again."""
    shape, B = problem.shape, problem.batch
    H, K, Dk, Dv, s = shape.H, shape.K, shape.Dk, shape.Dv, shape.select_block
    hidden = H * Dk // 4
    widths = [H * Dk, *[K * Dk, K * Dv] * 3, hidden]
    columns = [sum(widths[:i]) for i in range(len(widths))]
    keys = iter(jax.random.split(jax.random.key(0), 16))

    def normal(*size: int) -> Array:
        return jax.random.normal(next(keys), size, jnp.dtype(shape.dtype))

    # A page for each row, as only one is written to.
    sizes = ((B, K, s), (B, K, s // shape.compress_stride), (B, shape.compress_block, K), (B, shape.window, K))
    places = Places(*(normal(*size, D) for size in sizes for D in (Dk, Dv)))
    tables = jnp.broadcast_to(jnp.arange(B, dtype=jnp.int32)[:, None], (B, shape.T // s))
    lengths = (shape.T - shape.compress_block) // shape.compress_stride * shape.compress_stride
    rows = jnp.full((B,), lengths + shape.compress_block - 1, jnp.int32), jnp.ones((B,), jnp.int32), tables
    angle = jax.random.normal(next(keys), (B, 1, Dk // 2))
    of_gates = normal(hidden), normal(hidden, H, 3), normal(H, 3)

    def appends(tile: Any) -> Callable[..., Any]:
        options: dict[str, Any] = {"config": shape, "num_heads": H, "interpret": interpret, "tile": tile}

        def run(product: Array, of_gates: Any, rotation: Any, places: Places, *rows: Array) -> Any:
            *heads, first = (Heads(product, column) for column in columns)
            of_tokens = []
            for _ in range(calls):
                arguments: list[Any] = [*heads, None, None, rotation, Gates(first, *of_gates), places, *rows]
                *found, places = append_tokens(*arguments, **options)
                of_tokens.append(found)
            return of_tokens, places

        return run

    calls = decode.STEPS
    arrays = (normal(B, 1, sum(widths)), of_gates, (jnp.cos(angle), jnp.sin(angle)), places, *rows)
    return Program(appends, arrays, calls)
