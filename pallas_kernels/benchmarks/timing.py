"""Device time of compiled programs."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import jax
from jaxtyping import Array

from pallas_kernels.benchmarks.cases import Case

Result = TypeVar("Result")


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


def measure(cases: Sequence[Case]) -> Iterator[dict[str, Any]]:
    """Times of the forward pass and of forward and backward together, rates, and the compiler's count of memory.

    The backward time is (forward and backward) - forward. Memory is arguments, results and temporary buffers. The rate
    of bytes counts each argument and each result once.

    Yields:
      A row for each case and each of its selections. A case that fails has an "error" instead of figures, so that it
      does not lose the others'.
    """
    for case, programs in zip(cases, compile_all(cases), strict=True):
        for selection, arguments in case.arguments.items():
            found = programs if isinstance(programs, Exception) else _attempt(_figures, case, programs, arguments)
            if isinstance(found, Exception):
                found = {"error": f"{type(found).__name__}: {found}"[:500]}
            yield {"op": case.name, "backend": case.backend, "selection": selection, **found}


def trace(case: Case) -> list[Any]:
    """The forward pass, and forward and backward together, if there is a backward pass."""
    arguments = next(iter(case.arguments.values()))
    forward = jax.jit(case.forward).trace(*arguments)
    if not case.differentiable:
        return [forward]

    def both(cotangent: Any, *arguments: Any) -> Any:
        moving, fixed = arguments[: case.differentiable], arguments[case.differentiable :]
        out, vjp = jax.vjp(lambda *a: case.forward(*a, *fixed), *moving)
        return out, vjp(cotangent)

    return [forward, jax.jit(both).trace(forward.out_info, *arguments)]


def compile_all(cases: Sequence[Case]) -> list[list[Any] | Exception]:
    """The compiled programs of each case, or why there are none.

    They are compiled at the same time, and before any is timed, so that nothing else runs then.
    """
    with ThreadPoolExecutor() as pool:

        def start(case: Case) -> list[Future[Any]]:  # lowering holds Python's lock: only the compiler runs beside it
            return [pool.submit(program.lower().compile) for program in trace(case)]

        def finish(started: list[Future[Any]]) -> list[Any]:
            return [future.result() for future in started]

        started = [_attempt(start, case) for case in cases]
        return [found if isinstance(found, Exception) else _attempt(finish, found) for found in started]


def _figures(case: Case, programs: list[Any], arguments: tuple[Array, ...]) -> dict[str, Any]:
    forward, *both = programs
    out = forward(*arguments)
    timed = time_call(forward, arguments)
    row: dict[str, Any] = {
        "forward_ms": dataclasses.asdict(timed),
        "forward_tflops": case.flops / timed.median / 1e9,
        "forward_gbytes_per_s": sum(x.nbytes for x in (*arguments, out)) / timed.median / 1e6,
        "forward_memory_gib": memory_gib(forward),
    }
    for program in both:
        cotangent = jax.random.normal(jax.random.key(1), out.shape, out.dtype)
        both_timed = time_call(program, (cotangent, *arguments))
        row["forward_backward_ms"] = dataclasses.asdict(both_timed)
        row["backward_ms"] = both_timed.median - timed.median
        row["forward_backward_memory_gib"] = memory_gib(program)
    return row


def _attempt(function: Callable[..., Result], *arguments: Any) -> Result | Exception:
    """What a function returns, or the error that it raises."""
    try:
        return function(*arguments)
    except Exception as error:
        return error


def memory_gib(compiled: Any) -> float:
    """Arguments, results and temporary buffers of a compiled program on one device, by the compiler's count."""
    counted = compiled.memory_analysis()
    return (counted.argument_size_in_bytes + counted.output_size_in_bytes + counted.temp_size_in_bytes) / 2**30
