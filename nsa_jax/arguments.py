"""Arguments in one form, whatever people pass: array-likes, NumPy and JAX scalars, integers of any dtype.

What does not fit is refused by name: `name = value: expected X`, or `name: dtype shape: expected X` for arrays.
"""

import functools
import math
import operator
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.export import is_symbolic_dim
from jaxtyping import Array, Int

_SHOWN = 60  # characters of a value in a message


def size(name: str, value: Any, *, least: int = 1) -> int:
    """A size as a Python int: of any integer type, NumPy's and JAX's included, and at least `least`.

    A symbolic dimension of `jax.export` stays what it is.
    """
    if is_symbolic_dim(value):
        return cast(int, value)
    try:
        if isinstance(value, bool) or getattr(value, "dtype", None) == np.bool_:
            raise TypeError
        number = operator.index(value)
    except (TypeError, jax.errors.ConcretizationTypeError):
        number = least - 1
    if number < least:
        raise ValueError(f"{name} = {shown(value)}: expected an integer of at least {least}")
    return number


def optional_size(name: str, value: Any, *, least: int = 1) -> int | None:
    """A size, or None."""
    return None if value is None else size(name, value, least=least)


def real(name: str, value: Any) -> float:
    """A finite number as a Python float. Its value must be known when a program is traced."""
    try:
        if isinstance(value, str | bytes | bool | np.bool_):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, jax.errors.ConcretizationTypeError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{name} = {shown(value)}: expected a finite number that is known when tracing")
    return number


def float_dtype(name: str, value: Any) -> jnp.dtype:
    """A floating dtype from anything that names one."""
    try:
        dtype = jnp.dtype(value)
    except TypeError:
        dtype = jnp.dtype(bool)
    if value is None or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{name} = {shown(value)}: expected a floating dtype")
    return dtype


def check_precision(name: str, value: Any) -> None:
    """Raises ValueError for what `jax.lax.dot_general` does not take as its precision."""
    try:
        one = jax.ShapeDtypeStruct((1, 1), jnp.float32)
        jax.eval_shape(functools.partial(jax.numpy.matmul, precision=value), one, one)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} = {shown(value)}: expected a precision of jax.lax.dot_general") from error


def array(name: str, value: Any) -> Array:
    """A JAX array from anything that `jnp.asarray` takes."""
    if isinstance(value, jax.Array):
        return value
    try:
        if value is None or isinstance(value, str | bytes):
            raise TypeError
        return jnp.asarray(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name} = {shown(value)}: expected an array, or what jnp.asarray makes one of") from error


def integers(name: str, value: Any, shape: tuple[Any, ...], dimensions: str = "") -> Int[Array, "..."]:
    """An int32 array of a shape, from integers of any dtype. `dimensions` names the dimensions in the message."""
    x = array(name, value)
    if x.shape != shape or not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(
            f"{name}: {describe(x)}: expected integers of shape {dimensions + ' = ' * bool(dimensions)}{shape}"
        )
    return x.astype(jnp.int32)


def offset(name: str, value: Any) -> int | Int[Array, ""]:
    """A position: a Python int where it is one of Python's or NumPy's, otherwise an int32 scalar array."""
    scalar = isinstance(value, int | np.integer | np.ndarray | jax.Array) and not isinstance(value, bool)
    if not scalar or np.ndim(value) != 0 or not jnp.issubdtype(jnp.asarray(value).dtype, jnp.integer):
        found = f": {describe(value)}" if hasattr(value, "dtype") else f" = {shown(value)}"
        raise ValueError(f"{name}{found}: expected an int or an integer scalar")
    return value.astype(jnp.int32) if isinstance(value, jax.Array) else int(value)


def describe(x: Any) -> str:
    """Dtype and shape, as messages give them."""
    return f"{x.dtype} {x.shape}"


def shown(value: Any) -> str:
    """A value as messages give it, cut if it is long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
