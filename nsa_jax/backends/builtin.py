"""The built-in backends. A kernel is added by its file and one line of `TRITON` or `MOSAIC`."""

import dataclasses
import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import jax

from nsa_jax.config import NSAConfig
from pallas_kernels.devices import Capability, Device, current_device
from pallas_kernels.mosaic.faster import BY_DEFAULT, FASTER, Table, check_faster


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
class Kernels(BuiltIn):
    """A backend of GPU kernels, imported on first use. Where there is no GPU, a call by name runs them interpreted.

    Attributes:
      name: what `implementation` calls it.
      least_capability: compute capability of the oldest GPUs that the kernels run on.
      functions: by name (see `OPS`), "module:function" under pallas_kernels.
      newest_capability: of the newest GPUs that the kernels run on; None: of all that are newer.
      faster: for which calls `implementation=None` chooses each function, a table by name; None: for all.
    """

    name: str
    least_capability: Capability
    functions: Mapping[str, str] = dataclasses.field(hash=False)
    newest_capability: Capability | None = None
    faster: Mapping[str, Table] | None = dataclasses.field(default=None, hash=False)

    def __getattr__(self, op: str) -> Callable[..., Any]:
        if op.startswith("_") or op not in self.functions:
            raise AttributeError(f"backend {self.name!r} has no {op}")
        return functools.partial(self._call, op)

    def supports(self, op: str, device: Device) -> bool:
        """Whether the kernels run on a device as they are made to: compiled, on a GPU of a capability they are for."""
        return device.platform == "gpu" and self._check_capability(device)

    def by_default(self, name: str, q: jax.Array, k: jax.Array, v: jax.Array | None) -> bool:
        """Whether `implementation=None` may choose a function for such arrays: where it is known to be the fastest."""
        if self.faster is not None:
            if not self.faster:
                raise NotImplementedError("only by name")
            check_faster(self.faster, name, q, k, v)
        return True

    def _call(self, op: str, *arguments: Any, **options: Any) -> Any:
        device = current_device()
        interpret = device.platform != "gpu"
        if not interpret:
            self._check_capability(device)
        module, function = self.functions[op].split(":")
        call = getattr(importlib.import_module(f"pallas_kernels.{module}"), function)
        return call(*arguments, **options, interpret=interpret)

    def _check_capability(self, device: Device) -> bool:
        least = ".".join(map(str, self.least_capability))
        newest = self.newest_capability
        if device.compute_capability is None:
            raise NotImplementedError(f"{device}: expected an NVIDIA GPU of a known compute capability")
        if device.compute_capability < self.least_capability:
            raise NotImplementedError(f"{device}: expected compute capability {least}" + " or later" * (newest is None))
        if newest is not None and device.compute_capability > newest:
            raise NotImplementedError(f"{device}: expected compute capability at most {'.'.join(map(str, newest))}")
        return True


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


MOSAIC = Kernels(
    "mosaic",
    (9, 0),
    {
        "compressed_attention": "compressed_attention.mosaic:forward",
        "compressed_attention_backward": "compressed_attention.mosaic:backward",
        "select_blocks": "block_selection.mosaic:select_blocks",
        "selected_attention": "selected_attention.mosaic:forward",
        "selected_attention_backward": "selected_attention.mosaic_backward:backward",
        "window_attention": "window_attention.mosaic:forward",
        "window_attention_backward": "window_attention.mosaic:backward",
    },
    newest_capability=(9, 0),
    faster=FASTER if BY_DEFAULT else {},
)
TRITON = Kernels(
    "triton",
    (8, 0),
    {
        "compressed_attention": "compressed_attention.triton:forward",
        "compressed_attention_backward": "compressed_attention.triton_backward:backward",
        "select_blocks": "block_selection.triton:select_blocks",
        "selected_attention": "selected_attention.triton:forward",
        "selected_attention_backward": "selected_attention.triton_backward:backward",
        "window_attention": "window_attention.triton:forward",
        "window_attention_backward": "window_attention.triton_backward:backward",
        "decode_attention": "decode_attention.triton:decode_attention",
        "append_tokens": "append_tokens.triton:append_tokens",
    },
)
XLA = Functions("xla", "nsa_jax.xla", automatic=True)
REFERENCE = Functions("reference", "nsa_jax.reference", automatic=False)
