"""The logical axis names of parameters, and those that other codebases have for the same axes.

Every parameter of a layer names its axes. A codebase's rules place parameters by such names, or its models name mesh
axes directly. `logical_axes` of a layer gives the names that its parameters get instead of ours.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from nsa_jax.sharding import check_mesh_axes

# Our names, and what they stand for.
LOGICAL_AXES: Mapping[str, str] = MappingProxyType(
    {
        "embed": "the layer's input and output",
        "heads": "query heads",
        "kv_heads": "key/value heads",
        "head_dim": "the numbers of a head",
        "compress_block": "the tokens of a block that phi compresses",
        "phi_hidden": "the hidden layer of an mlp phi",
        "phi_out": "the outputs of a linear phi",
        "gate_hidden": "the hidden layer of the gates",
        "branch": "the three branches",
    }
)
_WHOLE = dict.fromkeys(("compress_block", "phi_hidden", "phi_out", "gate_hidden", "branch"))

# For the rules of MaxText (`logical_axis_rules` of its base.yml).
MAXTEXT_AXES: Mapping[str, str | None] = MappingProxyType(
    {**_WHOLE, "embed": "embed", "heads": "q_heads", "kv_heads": "kv_heads", "head_dim": "kv"}
)
# For the rules of Flax's examples, which descend from those of T5X.
FLAX_AXES: Mapping[str, str | None] = MappingProxyType(
    {**_WHOLE, "embed": "embed", "heads": "heads", "kv_heads": "heads", "head_dim": "kv"}
)
# No names: add mesh axes to it, as in {**UNNAMED_AXES, "heads": "tensor", "kv_heads": "tensor"}.
UNNAMED_AXES: Mapping[str, None] = MappingProxyType(dict.fromkeys(LOGICAL_AXES))


def renamed(axes: tuple[str, ...], logical_axes: Mapping[str, Any] | None) -> tuple[Any, ...]:
    """Names of a parameter's axes, with those that `logical_axes` has instead; None for an axis without a name.

    Example:
      >>> renamed(("embed", "heads", "head_dim"), MAXTEXT_AXES)
      ('embed', 'q_heads', 'kv')

    Raises:
      ValueError: `logical_axes` has a name that is not among `LOGICAL_AXES`, or names something else than axes.
    """
    if logical_axes is None:
        return axes
    if not isinstance(logical_axes, Mapping):
        raise ValueError(f"logical_axes = {logical_axes!r}: expected names by those of {', '.join(LOGICAL_AXES)}")
    for name, given in logical_axes.items():
        if name not in LOGICAL_AXES:
            raise ValueError(f"logical_axes[{name!r}]: expected one of {', '.join(LOGICAL_AXES)}")
        if given is not None:
            check_mesh_axes(f"logical_axes[{name!r}]", given)
    return tuple(logical_axes.get(axis, axis) for axis in axes)
