"""Mosaic GPU kernels as they are launched here: a persistent grid, one program for each multiprocessor."""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.devices import current_device
from pallas_kernels.mosaic.products import Products

SHARED_MEMORY = 232448  # bytes that a thread block of compute capability 9.0 may use
WARPS = 4  # of a warpgroup
COPIED_TO = 128  # bytes: a copy to or from shared memory starts at a multiple of it; the interpreter does not mind
INTERPRETED_PROGRAMS = 2  # more show nothing new, and every program of the interpreter costs threads
_versioned: Any = plgpu  # what other versions of JAX declare otherwise
_PROGRAMS = 132  # multiprocessors of an H100 or H200 that is not there
_REDUCTION_BYTES = 256  # of shared memory for sums over columns; JAX's own choice of 2048 costs a stage of a ring
_ALIGNMENT = 1024  # bytes: what lies in shared memory starts at multiples of it
_BARRIER_BYTES = 8


def check_version(interpret: bool, warpgroups: int = 4) -> None:
    """Raises NotImplementedError for versions of JAX without what the kernels use, and for hosts that would hang."""
    if not hasattr(plgpu, "InterpretGPUParams"):
        raise NotImplementedError(f"jax = {jax.__version__}: expected 0.11 or later")
    threads = max(os.cpu_count() or 1, jax.local_device_count())
    if interpret and threads <= warpgroups:
        raise NotImplementedError(
            f"interpreted with {threads} processors: expected more than {warpgroups}, one for each warpgroup"
        )


def num_programs(interpret: bool) -> int:
    """Programs of a persistent grid: one for each multiprocessor of the device that is traced for."""
    if interpret:
        return INTERPRETED_PROGRAMS
    device = jax.devices()[0]
    there = device.platform == "gpu" and current_device().device_kind == device.device_kind
    return getattr(device, "core_count", None) or _PROGRAMS if there else _PROGRAMS


@dataclasses.dataclass(frozen=True)
class Matrix:
    """Shared memory for a stack of matrices, laid out as `wgmma` and the copy engine want it."""

    shape: tuple[int, ...]  # the last axis: a multiple of 64; the one before it: of 8
    dtype: Any

    def ref(self) -> Any:
        """As a scratch type of Pallas."""
        transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
        return plgpu.SMEM(self.shape, self.dtype, transforms=transforms)


@dataclasses.dataclass(frozen=True)
class Vectors:
    """Shared memory for rows of numbers. What is copied to or from it starts at a multiple of `COPIED_TO` bytes."""

    shape: tuple[int, ...]
    dtype: Any

    def ref(self) -> Any:
        """As a scratch type of Pallas."""
        return plgpu.SMEM(self.shape, self.dtype)


@dataclasses.dataclass(frozen=True)
class Barriers:
    """`number` barriers, a phase of which ends when `arrivals` copies or warpgroups have arrived."""

    number: int
    arrivals: int = 1

    def ref(self) -> Any:
        """As a scratch type of Pallas."""
        return plgpu.Barrier(num_arrivals=self.arrivals, num_barriers=self.number)


Scratch = Matrix | Vectors | Barriers


def shared_memory(scratch: Sequence[Scratch]) -> int:
    """Bytes of shared memory that a program takes."""

    def aligned(size: int) -> int:
        return -(-size // _ALIGNMENT) * _ALIGNMENT

    barriers = sum(x.number for x in scratch if isinstance(x, Barriers))
    arrays = [x for x in scratch if not isinstance(x, Barriers)]
    used = sum(aligned(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize) for x in arrays)
    return used + aligned(_REDUCTION_BYTES) + _BARRIER_BYTES * barriers


def launch(
    kernel: Callable[..., None],
    *,
    name: str,
    out_shape: Sequence[jax.ShapeDtypeStruct],
    scratch: Sequence[Scratch],
    warpgroups: int,
    interpret: bool,
) -> Callable[..., Any]:
    """A function of arrays that runs `kernel(products, *input refs, *output refs, *scratch refs)`.

    The kernel runs in every warpgroup of every program: axes "program" and "warpgroup". Calls with equal arguments give
    the same function, so that a model of many layers traces and lowers a kernel once, which takes seconds.
    """
    check_version(interpret, warpgroups)
    sizes = (num_programs(interpret), warpgroups, interpret)
    return _launched(_by_value(kernel), name, tuple(out_shape), tuple(scratch), *sizes)


@dataclasses.dataclass(frozen=True)
class _Partial:
    """A `functools.partial` that equals others of the same function and options."""

    function: Callable[..., Any]
    options: tuple[tuple[str, Any], ...]

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments, **dict(self.options))


def _by_value(x: Any) -> Any:
    if not isinstance(x, functools.partial):
        return x
    if x.args:
        raise TypeError(f"kernel: {x}: expected options by keyword")
    return _Partial(x.func, tuple((name, _by_value(value)) for name, value in x.keywords.items()))


@functools.cache
def _launched(
    kernel: Callable[..., None],
    name: str,
    out_shape: tuple[jax.ShapeDtypeStruct, ...],
    scratch: tuple[Scratch, ...],
    programs: int,
    warpgroups: int,
    interpret: bool,
) -> Callable[..., Any]:
    types = [x.ref() for x in scratch]
    options: dict[str, Any] = {}
    if interpret:
        options["interpret"] = _versioned.InterpretGPUParams()
        dtype = next((x.dtype for x in scratch if isinstance(x, Matrix)), jnp.bfloat16)
        types.append(Matrix((warpgroups, 64, 256), dtype).ref())  # see `Products`

    def body(*refs: Any) -> None:
        spare = refs[-1] if interpret else None
        refs = refs[:-1] if interpret else refs
        # Kernels multiply 16-bit values by float32 ones, whatever promotion the caller allows.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            kernel(Products(spare), *refs)

    body.__name__ = name
    call = plgpu.kernel(
        body,
        out_type=out_shape,
        scratch_types=types,
        grid=(programs,),
        grid_names=("program",),
        num_threads=warpgroups,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=_REDUCTION_BYTES
        ),
        **options,
    )
    return jax.jit(jax.named_call(jax.custom_batching.sequential_vmap(call), name=name))


def each_warp(body: Callable[[Any], None]) -> None:
    """Runs body(number) in the four warps of a warpgroup, each by itself."""
    _versioned.warp_map(body)
