"""What ran on GPUs, from a trace of JAX's profiler."""

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax

Result = TypeVar("Result")


class Kernel(NamedTuple):
    """One kernel or copy on a GPU."""

    name: str
    begin_ns: float
    end_ns: float


def record(run: Callable[[], Result]) -> tuple[Result, Any]:
    """The result of a call, which is waited for, and the `jax.profiler.ProfileData` of the call."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            result = jax.block_until_ready(run())
        (trace_file,) = Path(folder).rglob("*.xplane.pb")
        return result, jax.profiler.ProfileData.from_file(str(trace_file))


def kernels(profile: Any) -> list[list[Kernel]]:
    """The kernels of each GPU in a trace, in the order in which they began.

    Raises:
      ValueError: the trace has no kernel of a GPU.
    """
    of_gpus = [
        sorted(
            (
                Kernel(event.name, event.start_ns, event.start_ns + event.duration_ns)
                for line in plane.lines
                if line.name.startswith("Stream")
                for event in line.events
            ),
            key=lambda kernel: kernel.begin_ns,
        )
        for plane in profile.planes
        if plane.name.startswith("/device:GPU")
    ]
    if not any(of_gpus):
        raise ValueError("profile: no kernel of a GPU in it")
    return [found for found in of_gpus if found]


def union(intervals: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The same points in intervals that do not overlap, ascending."""
    joined: list[tuple[float, float]] = []
    for begin, end in sorted(intervals):
        if joined and begin <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(joined[-1][1], end)
        else:
            joined.append((begin, end))
    return joined


def length(intervals: Iterable[tuple[float, float]]) -> float:
    """The sum of the lengths of intervals."""
    return sum(end - begin for begin, end in intervals)
