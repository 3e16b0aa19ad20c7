"""`pallas_call` on the Pallas Triton backend, as every kernel here uses it: whole arrays and a grid of programs."""

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
    """JAX warns while lowering, long after `launch` has returned, so the silence has to sit in the lowering."""
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


def launch(
    kernel: Callable[..., None],
    *,
    name: str,
    grid: tuple[int, ...],
    out_shape: Any,
    num_warps: int,
    num_stages: int,
    interpret: bool,
    in_place: int = 0,
) -> Callable[..., Any]:
    """A function of arrays that runs `kernel` once for each point of `grid`.

    Every reference that the kernel gets is a whole array, which it indexes by its program ids. For an argument that is
    None it gets None, and for a tree of arrays a tree of references. The first `in_place` results are the first arrays
    with what the kernel writes there; XLA copies an array that is still needed.
    """
    params = _PARAMS(num_warps=num_warps, num_stages=num_stages)
    options = dict(name=name, grid=grid, out_shape=out_shape, compiler_params=params, interpret=interpret)
    options["input_output_aliases"] = {i: i for i in range(in_place)}

    def call(*arguments: Any) -> Any:
        arrays, structure = jax.tree.flatten(arguments)

        def body(*refs: Any) -> None:
            given = jax.tree.unflatten(structure, refs[: len(arrays)])
            # Kernels multiply 16-bit values by float32 ones, whatever promotion the caller allows.
            with jax.numpy_dtype_promotion("standard"):
                kernel(*given, *refs[len(arrays) :])

        run = _poisoning_call(body, options) if _poisoned and not interpret else _call(body, options)
        return jax.named_call(_checking_vmap(run, name, grid), name=name)(*arrays)

    return call


def _call(body: Callable[..., None], options: dict[str, Any]) -> Callable[..., Any]:
    return pl.pallas_call(body, in_specs=pl.no_block_spec, out_specs=pl.no_block_spec, **options)


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


def _poisoning_call(body: Callable[..., None], options: dict[str, Any]) -> Callable[..., Any]:
    """The same call whose outputs, except those in place of an argument, lie over inputs full of poison."""
    in_place = options["input_output_aliases"]
    shapes = jax.tree.leaves(options["out_shape"])[len(in_place) :]

    def call(*arrays: Any) -> Any:
        given = len(arrays)
        poison = [
            jnp.full(x.shape, jnp.nan if jnp.issubdtype(x.dtype, jnp.floating) else -(2**31), x.dtype) for x in shapes
        ]
        aliases = in_place | {given + i: len(in_place) + i for i in range(len(shapes))}

        def without_poison(*refs: Any) -> None:
            body(*refs[:given], *refs[given + len(shapes) :])

        return _call(without_poison, {**options, "input_output_aliases": aliases})(*arrays, *poison)

    return call
