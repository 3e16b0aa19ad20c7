"""Which kernels there are. A kernel is added by its file and one line of `TRITON` or `MOSAIC`."""

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import jax

from pallas_kernels.devices import Capability, Device
from pallas_kernels.mosaic.faster import FASTER, Table, check_faster


@dataclasses.dataclass(frozen=True)
class Kernels:
    """The kernels of one backend, imported on first use.

    Attributes:
      name: of the backend.
      least_capability: compute capability of the oldest GPUs that the kernels run on.
      functions: by the names that `pallas_kernels.nsa_attention.contract.Parts` has, "decode_attention",
        "append_tokens" and "one_row_product": "module:function" under pallas_kernels.
      newest_capability: of the newest GPUs that the kernels run on; None: of all that are newer.
      faster: for which calls each function is chosen by default, a table by name; None: for all.
    """

    name: str
    least_capability: Capability
    functions: Mapping[str, str] = dataclasses.field(hash=False)
    newest_capability: Capability | None = None
    faster: Mapping[str, Table] | None = dataclasses.field(default=None, hash=False)

    def function(self, name: str) -> Callable[..., Any]:
        """A function, as its op's contract has it; KeyError where there is none of this name."""
        module, function = self.functions[name].split(":")
        return getattr(importlib.import_module(f"pallas_kernels.{module}"), function)

    def supports(self, op: str, device: Device) -> bool:
        """Whether the kernels run on a device as they are made to: compiled, on a GPU of a capability they are for."""
        return device.platform == "gpu" and self.check_capability(device)

    def by_default(self, name: str, q: jax.Array, k: jax.Array, v: jax.Array | None) -> bool:
        """Whether a function may be chosen for such arrays by default: where it is known to be the fastest."""
        if self.faster is not None:
            check_faster(self.faster, name, q, k, v)
        return True

    def check_capability(self, device: Device) -> bool:
        """True for a device of a capability that the kernels are for; raises NotImplementedError for any other."""
        least = ".".join(map(str, self.least_capability))
        newest = self.newest_capability
        if device.compute_capability is None:
            raise NotImplementedError(f"{device}: expected an NVIDIA GPU of a known compute capability")
        if device.compute_capability < self.least_capability:
            raise NotImplementedError(f"{device}: expected compute capability {least}" + " or later" * (newest is None))
        if newest is not None and device.compute_capability > newest:
            raise NotImplementedError(f"{device}: expected compute capability at most {'.'.join(map(str, newest))}")
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
    faster=FASTER,
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
        "one_row_product": "one_row_product.triton:one_row_product",
    },
)
