"""`pallas_call` on the Pallas Triton backend, as every kernel here uses it."""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import jax
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
    return jax.named_call(call, name=name)
