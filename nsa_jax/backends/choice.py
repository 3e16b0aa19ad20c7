"""Which backend runs an op: the one that is named, or the first in order that takes it."""

import contextlib
import contextvars
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from nsa_jax.backends import registry
from nsa_jax.backends.protocol import BRANCHES, Backend
from nsa_jax.config import NSAConfig
from nsa_jax.precision import wide_dtype
from pallas_kernels.contract import Gradients
from pallas_kernels.devices import current_device
from pallas_kernels.differentiable import Op

Result = TypeVar("Result")
BACKWARD = "_backward"
_log = logging.getLogger("nsa_jax")


@dataclasses.dataclass(frozen=True)
class Choice:
    """What was chosen for an op.

    Attributes:
      op: a name in `OPS`.
      backend: the backend's name; for `nsa_attention` also "fused" (one op made of kernels of any backends) or "parts"
        (one op after the other).
      refusals: (backend, reason) of those that were asked before.
    """

    op: str
    backend: str
    refusals: tuple[tuple[str, str], ...] = ()


_recorded: contextvars.ContextVar[list[Choice] | None] = contextvars.ContextVar("recorded", default=None)


@contextlib.contextmanager
def recording() -> Iterator[list[Choice]]:
    """The choices that are made inside, in their order."""
    choices: list[Choice] = []
    token = _recorded.set(choices)
    try:
        yield choices
    finally:
        _recorded.reset(token)


def refusal_of(backend: Backend, op: str, arguments: tuple[Any, ...]) -> str | None:
    """Why `implementation=None` passes over a backend for arguments that it has not been asked about; None if not."""
    try:
        _check_has(backend, op)
        _check_automatic(backend, op, arguments)
    except NotImplementedError as refusal:
        return str(refusal)
    return None


def record(choice: Choice) -> None:
    """Adds a choice to what `recording` collects."""
    choices = _recorded.get()
    if choices is not None and choice not in choices:
        choices.append(choice)


def run(
    op: str,
    implementation: str | None,
    arguments: tuple[Any, ...],
    *,
    config: NSAConfig,
    scale: float,
    return_lse: bool = False,
) -> Any:
    """The result of an op: of a branch o, or with `return_lse` (o, lse).

    Raises:
      ValueError: there is no backend of this name.
      NotImplementedError: the named backend does not support the arguments, or no backend does.
    """

    def attempt(backend: Backend) -> Any:
        if op not in BRANCHES:
            return getattr(backend, op)(*arguments, config=config, scale=scale)
        if not is_differentiable(backend):
            forward, backward = Forward(op, backend.name, return_lse), Backward(op, implementation)
            return Op(forward, backward, return_lse)(*arguments, config=config, scale=scale)
        o, lse = run_forward(op, backend, arguments, config=config, scale=scale, needs_lse=return_lse)
        return (o, lse) if return_lse else o

    return first_that_takes(op, implementation, arguments, attempt)


def first_that_takes(
    op: str,
    implementation: str | None,
    arguments: tuple[Any, ...],
    attempt: Callable[[Backend], Result],
    kernels_alone: bool = False,
) -> Result:
    """attempt(backend) of the named backend, or of the first that does not refuse.

    With `kernels_alone`, pure JAX whose turn it is refuses for all that come after it.
    """
    refusals: list[tuple[str, str]] = []
    for backend in candidates(implementation):
        try:
            _check_has(backend, op)
            if implementation is None:
                _check_automatic(backend, op, arguments)
            if kernels_alone and is_differentiable(backend):
                refusals.append((backend.name, "not a kernel"))
                break
            with recording():  # what the backend asks of others is its own affair
                result = attempt(backend)
        except NotImplementedError as refusal:
            if implementation is not None:
                raise NotImplementedError(f"implementation = {implementation!r}: {op}: {refusal}") from refusal
            refusals.append((backend.name, str(refusal)))
            continue
        if implementation is None and backend.name == "xla" and current_device().platform == "gpu":
            _log_once(op, tuple(refusals))
        record(Choice(op, backend.name, tuple(refusals)))
        return result
    raise NotImplementedError(f"no backend takes {op}: " + "; ".join(f"{name}: {reason}" for name, reason in refusals))


@dataclasses.dataclass(frozen=True)
class Forward:
    """The forward pass of an op by one backend, as `pallas_kernels.differentiable` takes it.

    Unless `needs_lse`, lse may be None.
    """

    op: str
    backend: str
    needs_lse: bool = False

    def __call__(self, *arguments: Any, **options: Any) -> tuple[Array, Array | None]:
        """(o, lse)."""
        return run_forward(self.op, registry.get(self.backend), arguments, **options, needs_lse=self.needs_lse)


@dataclasses.dataclass(frozen=True)
class FirstForward:
    """The forward pass of an op by the named backend or the first in order, of those that are made of kernels."""

    op: str
    implementation: str | None

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """(o, lse) of a branch, or the blocks that `select_blocks` chose."""

        def attempt(backend: Backend) -> Any:
            if self.op in BRANCHES:
                return run_forward(self.op, backend, arguments, **options)
            return getattr(backend, self.op)(*arguments, **options)

        return first_that_takes(self.op, self.implementation, arguments, attempt, kernels_alone=self.op in BRANCHES)


@dataclasses.dataclass(frozen=True)
class Backward:
    """The backward pass of an op by the named backend, if it has one, or by the first in order that takes it."""

    op: str
    implementation: str | None

    def __call__(self, q: Array, k: Array, v: Array, *rest: Any, **options: Any) -> Gradients:
        """Gradients, as the contract of the op's `Backward` says."""
        *block_indices, o, lse, do, segment_starts, query_offset = rest
        inputs, positions = (q, k, v, *block_indices), (segment_starts, query_offset)
        backward = self.op + BACKWARD
        implementation = implementation_with(backward, self.implementation)
        sizes = {name: options[name] for name in ("config", "scale")}

        def attempt(backend: Backend) -> Gradients:
            if not _has_own(backend, backward):
                return _by_differentiation(self.op, backend, inputs, o, do, positions, options)
            known = _lse_of(self.op, (*inputs, *positions), sizes) if lse is None else lse
            return Gradients(*getattr(backend, backward)(*inputs, o, known, do, *positions, **options))

        return first_that_takes(backward, implementation, inputs, attempt)


def _lse_of(op: str, arguments: tuple[Any, ...], sizes: dict[str, Any]) -> Array:
    """The lse of an op by the first backend that returns one."""

    def attempt(backend: Backend) -> Array:
        return run_forward(op, backend, arguments, **sizes, needs_lse=True)[1]

    return first_that_takes(op, None, arguments, attempt)


def _by_differentiation(
    op: str,
    backend: Backend,
    inputs: tuple[Array, ...],
    o: Array,
    do: Array,
    positions: tuple[Any, Any],
    options: dict[str, Any],
) -> Gradients:
    """The backward pass that JAX makes of a forward pass, which is computed again."""
    sizes = {name: options[name] for name in ("config", "scale")}
    gate, dlse, dq_before = (options.get(name) for name in ("gate", "dlse", "dq"))
    q, k, v, *block_indices = inputs
    wide = wide_dtype(q.dtype)
    delta = jnp.swapaxes(jnp.sum(o.astype(wide) * do.astype(wide), axis=-1), 1, 2)
    if dlse is not None:
        delta = delta - dlse
    gated = do if gate is None else (do * gate[..., None]).astype(do.dtype)

    def forward(q: Array, k: Array, v: Array) -> tuple[Array, ...]:
        arguments = (q, k, v, *block_indices, *positions)
        o, lse = run_forward(op, backend, arguments, **sizes, needs_lse=dlse is not None)
        return (o,) if dlse is None else (o, lse)

    dq, dk, dv = jax.vjp(forward, q, k, v)[1]((gated,) if dlse is None else (gated, dlse))
    return Gradients(dq if dq_before is None else (dq + dq_before).astype(q.dtype), dk, dv, delta)


def run_forward(
    op: str,
    backend: Backend,
    arguments: tuple[Any, ...],
    *,
    config: NSAConfig,
    scale: float,
    needs_lse: bool = False,
) -> tuple[Array, Any]:
    """(o, lse) of a branch by one backend; lse is None where the backend returns o alone.

    Raises:
      ValueError: what the backend returned is not what the contract says.
      NotImplementedError: the backend returns o alone although the call `needs_lse`.
    """
    result = getattr(backend, op)(*arguments, config=config, scale=scale)
    o, lse = result if isinstance(result, tuple | list) and len(result) == 2 else (result, None)
    q, v = arguments[0], arguments[2]
    _check_returned(backend, op, "o", o, (*q.shape[:3], v.shape[3]), q.dtype)
    if lse is not None:
        shape = (q.shape[0], q.shape[2], q.shape[1])
        _check_returned(backend, op, "lse", lse, shape, wide_dtype(q.dtype))
    elif op == "compressed_attention":
        raise ValueError(f"backend {backend.name!r}: {op} returned no lse: expected (o, lse)")
    elif needs_lse:
        raise NotImplementedError("returns no lse")
    return o, lse


def _check_returned(backend: Backend, op: str, name: str, array: Any, shape: tuple[int, ...], dtype: Any) -> None:
    found = (getattr(array, "shape", None), getattr(array, "dtype", None))
    if found != (shape, dtype):
        raise ValueError(
            f"backend {backend.name!r}: {op} returned {name} of dtype {found[1]} and shape {found[0]}: expected "
            f"{jnp.dtype(dtype)} of shape {shape}"
        )


def is_differentiable(backend: Backend) -> bool:
    """Whether JAX differentiates through the backend's functions."""
    return bool(getattr(backend, "differentiable", False))


def implementation_with(op: str, implementation: str | None) -> str | None:
    """The name of a backend that has a function besides what it was named for; None, for the others', if it has not."""
    return implementation if implementation is None or _has(named(implementation), op) else None


def candidates(implementation: str | None) -> tuple[Backend, ...]:
    """The backends to ask, in order: the named one alone, or all of them."""
    return tuple(registry.in_order()) if implementation is None else (named(implementation),)


def named(implementation: str) -> Backend:
    """The backend that `implementation` names; ValueError where there is none."""
    if implementation not in registry.names():
        raise ValueError(f"implementation = {implementation!r}: expected one of {', '.join(registry.names())}, or None")
    return registry.get(implementation)


def _has_own(backend: Backend, op: str) -> bool:
    return callable(getattr(backend, op, None))


def _has(backend: Backend, op: str) -> bool:
    """Whether a backend has a function, or, of a backward pass, JAX can make it from the forward pass."""
    if _has_own(backend, op):
        return True
    return op.endswith(BACKWARD) and is_differentiable(backend) and _has_own(backend, op.removesuffix(BACKWARD))


def _check_has(backend: Backend, op: str) -> None:
    if not _has(backend, op):
        raise NotImplementedError(f"there is no {op}")


def _check_automatic(backend: Backend, op: str, arguments: tuple[Any, ...]) -> None:
    device = current_device()
    supports = getattr(backend, "supports", None)
    if supports is not None and not supports(op.removesuffix(BACKWARD), device):
        raise NotImplementedError(f"does not support {device}")
    by_default = getattr(backend, "by_default", None)
    q, k, v = arguments[:3]
    if by_default is not None and not by_default(op, q, k, None if op == "select_blocks" else v):
        raise NotImplementedError("not by default")


@functools.cache
def _log_once(op: str, refusals: tuple[tuple[str, str], ...]) -> None:
    reasons = "; ".join(f"{name}: {reason}" for name, reason in refusals)
    _log.warning("%s runs on XLA, without a kernel (%s)", op, reasons)
