"""The ops that are timed, as each backend has them."""

import dataclasses
from typing import Any

from pallas_kernels.decode_attention.triton import decode_attention
from pallas_kernels.devices import current_device
from pallas_kernels.kernels import MOSAIC, TRITON
from pallas_kernels.nsa_attention.contract import Parts

__all__ = ["BACKENDS", "DEFAULT", "decode_attention", "parts_of"]

DEFAULT = "default"  # what `implementation=None` takes: Mosaic where its tables say so, otherwise Triton
BACKENDS = (DEFAULT, "triton", "mosaic")


@dataclasses.dataclass(frozen=True)
class Default:
    """The pass of this name on the kernels that `implementation=None` takes; pure JAX is not timed."""

    name: str

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """What the pass returns."""
        refusals = []
        q, k, v = arguments[:3]
        for kernels in (MOSAIC, TRITON):
            try:
                kernels.check_capability(current_device())
                kernels.by_default(self.name, q, k, None if self.name == "select_blocks" else v)
                return kernels.function(self.name)(*arguments, **options)
            except NotImplementedError as refusal:
                refusals.append(f"{kernels.name}: {refusal}")
        raise NotImplementedError("; ".join(refusals))


def parts_of(backend: str) -> Parts:
    """All passes of one of `BACKENDS`."""
    kernels = {each.name: each for each in (TRITON, MOSAIC)}
    names = [field.name for field in dataclasses.fields(Parts)]
    return Parts(**{name: kernels[backend].function(name) if backend in kernels else Default(name) for name in names})
