"""The built-in backends. The kernels that there are stand in `pallas_kernels.kernels`."""

import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax

from nsa_jax.config import NSAConfig
from pallas_kernels import kernels
from pallas_kernels.devices import Device, current_device
from pallas_kernels.kernels import Kernels


class BuiltIn:
    """What the built-in backends share: the whole attention from their own parts."""

    name: str

    def nsa_attention(
        self, q: Any, kv: Any, gates: Any, segment_starts: Any, query_offset: Any, *, config: NSAConfig, scale: float
    ) -> jax.Array:
        """All branches by this backend, and their gated sum: o [B, Tq, H, Dv]."""
        from nsa_jax.backends.whole import nsa_attention
        from pallas_kernels.differentiable import Positions

        positions = Positions(segment_starts, query_offset)
        return nsa_attention(q, kv, gates, positions, positions, self.name, config=config, scale=scale)


@dataclasses.dataclass(frozen=True)
class KernelBackend(BuiltIn, Kernels):
    """A backend of GPU kernels. Where there is no GPU, a call by name runs them interpreted."""

    def __getattr__(self, op: str) -> Callable[..., Any]:
        if op.startswith("_") or op not in self.functions:
            raise AttributeError(f"backend {self.name!r} has no {op}")
        return functools.partial(self._call, op)

    def _call(self, op: str, *arguments: Any, **options: Any) -> Any:
        device = current_device()
        interpret = device.platform != "gpu"
        if not interpret:
            self.check_capability(device)
        return self.function(op)(*arguments, **options, interpret=interpret)


@dataclasses.dataclass(frozen=True)
class Functions(BuiltIn):
    """A backend in pure JAX, through which JAX differentiates.

    Attributes:
      name: what `implementation` calls it.
      module: where its functions are.
      automatic: whether `implementation=None` may choose it.
    """

    name: str
    module: str
    automatic: bool
    differentiable = True

    def __getattr__(self, op: str) -> Callable[..., Any]:
        if op.startswith("_"):
            raise AttributeError(op)
        return getattr(importlib.import_module(self.module), op)

    def supports(self, op: str, device: Device) -> bool:
        """Every device."""
        if not self.automatic:
            raise NotImplementedError("only by name")
        return True


MOSAIC = KernelBackend(**vars(kernels.MOSAIC))
TRITON = KernelBackend(**vars(kernels.TRITON))
XLA = Functions("xla", "nsa_jax.xla", automatic=True)
REFERENCE = Functions("reference", "nsa_jax.reference", automatic=False)
