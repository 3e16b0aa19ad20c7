"""Which backend each op takes, and why the others refused."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from nsa_jax.backends.choice import BACKWARD, Choice, recording
from nsa_jax.backends.protocol import BRANCHES
from pallas_kernels.devices import Device, current_device


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What `explain` found: `print` it, iterate over its choices, or ask for one by the op's name.

    Attributes:
      device: what was traced for.
      choices: in the order in which they were made; backward passes are called `<op>_backward`.
    """

    device: Device
    choices: tuple[Choice, ...]

    def __iter__(self) -> Iterator[Choice]:
        return iter(self.choices)

    def __getitem__(self, op: str) -> Choice:
        for choice in self.choices:
            if choice.op == op:
                return choice
        raise KeyError(f"{op!r}: expected one of {', '.join(choice.op for choice in self.choices)}")

    def __str__(self) -> str:
        rows = [("op", "backend", "refused")]
        for choice in self.choices:
            refused = "; ".join(f"{name}: {reason}" for name, reason in choice.refusals)
            rows.append((choice.op, choice.backend, refused or "-"))
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
        lines = [f"{op:<{widths[0]}}  {backend:<{widths[1]}}  {refused}" for op, backend, refused in rows]
        if not self.choices:
            lines = ["no op was traced: the function calls none, or JAX has traced all of it before"]
        return "\n".join([f"on {self.device}", *lines])


def explain(op: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Which backend each op takes for some arguments, forward and backward, and why each one before it refused.

    Nothing is computed: `op(*args, **kwargs)` and its gradient are traced, for the device of the mesh in context.

    Example:
      >>> import jax
      >>> from nsa_jax import NSAConfig, window_attention
      >>> q, k = jax.ShapeDtypeStruct((1, 64, 4, 16), "float32"), jax.ShapeDtypeStruct((1, 64, 2, 16), "float32")
      >>> explain(window_attention, q, k, k, config=NSAConfig())["window_attention"].backend
      'xla'

    Args:
      op: a public op such as `nsa_jax.nsa_attention`, or any function that calls some, such as a layer's `apply`. A
        function that calls compiled functions shows only what these have not traced before.
      args, kwargs: its arguments. Arrays may be `jax.ShapeDtypeStruct`.

    Returns:
      The choices, in the order in which they were made.

    What `op` raises for these arguments, this raises too.
    """
    leaves, structure = jax.tree.flatten((args, kwargs))
    traced = [i for i, leaf in enumerate(leaves) if hasattr(leaf, "shape") and hasattr(leaf, "dtype")]
    floats = [i for i in traced if jnp.issubdtype(leaves[i].dtype, jnp.floating)]
    others = [i for i in traced if i not in floats]
    # What `jax.jit` made may have been traced before.
    plain: Callable[..., Any] = getattr(op, "__wrapped__", op) if hasattr(op, "lower") else op

    def call(float_leaves: list[Any], other_leaves: list[Any]) -> Any:
        given = {**dict(zip(floats, float_leaves, strict=True)), **dict(zip(others, other_leaves, strict=True))}
        args, kwargs = jax.tree.unflatten(structure, [given.get(i, leaf) for i, leaf in enumerate(leaves)])
        return plain(*args, **kwargs)

    def total(float_leaves: list[Any], other_leaves: list[Any]) -> Any:
        results = jax.tree.leaves(call(float_leaves, other_leaves))
        return sum(jnp.sum(x.astype(jnp.float32)) for x in results if jnp.issubdtype(x.dtype, jnp.floating))

    arguments = ([leaves[i] for i in floats], [leaves[i] for i in others])
    with recording() as choices:
        jax.eval_shape(call, *arguments)
        differentiated = any(choice.op.endswith(BACKWARD) for choice in choices)
        if not differentiated and any(choice.op in (*BRANCHES, "nsa_attention") for choice in choices):
            with contextlib.suppress(Exception):  # a function without a gradient is explained all the same
                jax.eval_shape(jax.grad(total), *arguments)
    # Where JAX differentiates through a backend's own functions, no backward pass was chosen.
    chosen = {choice.op for choice in choices}
    made = [
        Choice(choice.op + BACKWARD, choice.backend)
        for choice in choices
        if choice.op in BRANCHES and choice.op + BACKWARD not in chosen
    ]
    return Explanation(current_device(), (*choices, *made))
