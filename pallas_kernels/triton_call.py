"""`pallas_call` on the Pallas Triton backend, as every kernel here uses it."""

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu


@dataclasses.dataclass(frozen=True)
class TritonParams(plgpu.CompilerParams):
    """Compiler parameters of the Triton backend whose lowering keeps quiet about that backend's deprecation."""


def _register_quiet_lowering() -> bool:
    """JAX warns while lowering, long after `triton_call` has returned, so the silence has to sit in the lowering."""
    try:
        from jax._src.pallas import core
        from jax._src.pallas.triton import pallas_call_registration

        lower = pallas_call_registration.pallas_call_lowering
        register = core.register_lowering_rule
    except (ImportError, AttributeError):
        return False

    def lower_quietly(*args: Any, **kwargs: Any) -> Any:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)
            return lower(*args, **kwargs)

    register(TritonParams, lower_quietly, "gpu")
    return True


_PARAMS = TritonParams if _register_quiet_lowering() else plgpu.CompilerParams
_poisoned = False
MOST_PROGRAMS = 65535  # along every axis of a CUDA grid but the first


@contextlib.contextmanager
def poisoned_outputs() -> Iterator[None]:
    """For tests: outputs of compiled kernels traced inside hold NaN (the least integer) until a kernel writes them.

    Interpreted kernels always behave so.
    """
    global _poisoned
    before, _poisoned = _poisoned, True
    try:
        yield
    finally:
        _poisoned = before


def triton_call(
    kernel: Callable[..., None],
    *,
    name: str,
    grid: tuple[int, ...],
    in_specs: Any,
    out_specs: Any,
    out_shape: Any,
    num_warps: int,
    num_stages: int,
    interpret: bool,
) -> Callable[..., Any]:
    """`pl.pallas_call` of a kernel body written for the Triton backend; the arguments are those of `pl.pallas_call`."""
    if _poisoned and not interpret:
        call = _poisoning_call(kernel, name, grid, in_specs, out_specs, out_shape, num_warps, num_stages)
    else:
        call = pl.pallas_call(
            kernel,
            name=name,
            grid=grid,
            in_specs=in_specs,
            out_specs=out_specs,
            out_shape=out_shape,
            compiler_params=_PARAMS(num_warps=num_warps, num_stages=num_stages),
            interpret=interpret,
        )
    return jax.named_call(_checking_vmap(call, name, grid), name=name)


def _checking_vmap(call: Callable[..., Any], name: str, grid: tuple[int, ...]) -> Callable[..., Any]:
    """The same call; `vmap` moves the grid's first axis to one that CUDA holds to 65535, and is refused beyond it."""
    checked = jax.custom_batching.custom_vmap(call)

    def batched(axis_size: int, is_batched: Any, *arguments: Any) -> Any:
        if grid[0] > MOST_PROGRAMS:
            raise ValueError(
                f"vmap of {name} with {grid[0]} programs along the sequence: expected at most {MOST_PROGRAMS}; "
                "give the batch axis of the arguments instead"
            )
        axes = jax.tree.map(lambda x: 0 if x else None, is_batched)
        out = jax.vmap(call, in_axes=tuple(axes), axis_size=axis_size)(*arguments)
        return out, jax.tree.map(lambda _: True, out)

    checked.def_vmap(batched)
    return checked


def _poisoning_call(
    kernel: Callable[..., None],
    name: str,
    grid: tuple[int, ...],
    in_specs: Any,
    out_specs: Any,
    out_shape: Any,
    num_warps: int,
    num_stages: int,
) -> Callable[..., Any]:
    """The same call whose outputs lie over inputs full of poison."""
    shapes = jax.tree.leaves(out_shape)

    def call(*arguments: Any) -> Any:
        given = len(arguments)
        first = len(jax.tree.leaves(arguments))
        poison = [
            jnp.full(x.shape, jnp.nan if jnp.issubdtype(x.dtype, jnp.floating) else -(2**31), x.dtype) for x in shapes
        ]
        specs = in_specs if in_specs is pl.no_block_spec else [*in_specs, *jax.tree.leaves(out_specs)]
        return pl.pallas_call(
            lambda *refs: kernel(*refs[:given], *refs[given + len(shapes) :]),
            name=name,
            grid=grid,
            in_specs=specs,
            out_specs=out_specs,
            out_shape=out_shape,
            input_output_aliases={first + i: i for i in range(len(shapes))},
            compiler_params=_PARAMS(num_warps=num_warps, num_stages=num_stages),
        )(*arguments, *poison)

    return call
