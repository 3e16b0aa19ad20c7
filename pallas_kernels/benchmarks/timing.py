"""Device time of compiled programs."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.benchmarks.cases import Case


@dataclasses.dataclass(frozen=True)
class Timing:
    """Milliseconds per call over several batches of calls."""

    median: float
    lowest: float
    highest: float


def time_call(function: Callable[..., Any], arguments: tuple, *, batches: int = 5, batch_ms: float = 60.0) -> Timing:
    """Times a compiled function: batches of back-to-back calls, each batch waited for once, after warming up."""
    jax.block_until_ready(function(*arguments))
    begin = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    calls = max(1, round(batch_ms / 1e3 / (time.perf_counter() - begin)))
    milliseconds = []
    for _ in range(batches):
        begin = time.perf_counter()
        for _ in range(calls):
            out = function(*arguments)
        jax.block_until_ready(out)
        milliseconds.append((time.perf_counter() - begin) / calls * 1e3)
    return Timing(statistics.median(milliseconds), min(milliseconds), max(milliseconds))


def measure(case: Case) -> dict[str, Any]:
    """Times of the forward pass and of forward and backward together, rates, and the compiler's count of memory.

    The backward time is (forward and backward) - forward. Memory is arguments, results and temporary buffers.
    """
    forward = jax.jit(case.forward).lower(*case.arguments).compile()
    timed = time_call(forward, case.arguments)
    row: dict[str, Any] = {
        "op": case.name,
        "forward_ms": dataclasses.asdict(timed),
        "forward_tflops": case.flops / timed.median / 1e9,
        "forward_gbytes_per_s": case.bytes / timed.median / 1e6,
        "forward_memory_gib": memory_gib(forward),
    }
    if case.differentiable:
        cotangent = jax.random.normal(jax.random.key(1), *_shape_of(case))

        def both(cotangent: Any, *arguments: Any) -> Any:
            moving, fixed = arguments[: case.differentiable], arguments[case.differentiable :]
            out, vjp = jax.vjp(lambda *a: case.forward(*a, *fixed), *moving)
            return out, vjp(cotangent)

        both_compiled = jax.jit(both).lower(cotangent, *case.arguments).compile()
        both_timed = time_call(both_compiled, (cotangent, *case.arguments))
        row["forward_backward_ms"] = dataclasses.asdict(both_timed)
        row["backward_ms"] = both_timed.median - timed.median
        row["forward_backward_memory_gib"] = memory_gib(both_compiled)
    return row


def _shape_of(case: Case) -> tuple[tuple[int, ...], jnp.dtype]:
    out = jax.eval_shape(case.forward, *case.arguments)
    return out.shape, out.dtype


def memory_gib(compiled: Any) -> float:
    """Arguments, results and temporary buffers of a compiled program on one device, by the compiler's count."""
    counted = compiled.memory_analysis()
    return (counted.argument_size_in_bytes + counted.output_size_in_bytes + counted.temp_size_in_bytes) / 2**30
