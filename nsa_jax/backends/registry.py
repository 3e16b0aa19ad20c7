"""The ordered registry of backends."""

from collections.abc import Iterable

from nsa_jax.backends.builtin import MOSAIC, REFERENCE, TRITON, XLA
from nsa_jax.backends.protocol import OPS, Backend

_order: list[Backend] = [MOSAIC, TRITON, XLA, REFERENCE]


def register(backend: Backend, *, before: str | None = None) -> None:
    """Adds a backend to those that `implementation=None` asks in turn, and that `implementation` can name.

    What has been compiled before is not compiled again: register before the first call.

    Args:
      backend: see `Backend`.
      before: name of the backend that it goes in front of; None: in front of all.

    Raises:
      ValueError: `backend` has no name, a name that is taken, or none of the functions in `OPS`; `before` is unknown.
    """
    name = getattr(backend, "name", None)
    if not isinstance(name, str) or not name:
        raise ValueError(f"backend = {backend!r}: expected an object with a name")
    if name in ("fused", "parts"):
        raise ValueError(f"backend.name = {name!r}: expected another name, because `explain` uses this one")
    if name in names():
        raise ValueError(f"backend.name = {name!r}: expected a name other than {', '.join(names())}")
    if not any(callable(getattr(backend, op, None)) for op in OPS):
        raise ValueError(f"backend = {name!r}: expected at least one of the functions {', '.join(OPS)}")
    _order.insert(0 if before is None else _position(before, "before"), backend)


def unregister(name: str) -> None:
    """Takes a backend out of the registry.

    Raises:
      ValueError: there is none of this name, or it is a built-in one.
    """
    if name in (MOSAIC.name, TRITON.name, XLA.name, REFERENCE.name):
        raise ValueError(f"name = {name!r}: expected a backend that was added by `register`")
    del _order[_position(name, "name")]


def get(name: str) -> Backend:
    """The backend of this name, whose functions one's own backend can call.

    Raises:
      ValueError: there is none.
    """
    return _order[_position(name, "name")]


def names() -> tuple[str, ...]:
    """Names of all backends, in the order in which they are asked."""
    return tuple(backend.name for backend in _order)


def in_order() -> Iterable[Backend]:
    """All backends, in the order in which they are asked."""
    return tuple(_order)


def _position(name: str, argument: str) -> int:
    if name not in names():
        raise ValueError(f"{argument} = {name!r}: expected one of {', '.join(names())}")
    return names().index(name)
