"""int32 arithmetic of kernels, which `jax_enable_x64` would otherwise turn into int64.

Constants are NumPy's: they are literals of the traced program and not captured arrays.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def iota(size: int) -> jax.Array:
    """0 .. size - 1."""
    return jnp.arange(size, dtype=jnp.int32)


def div(x: Any, y: int) -> Any:
    """x // y for x >= 0, without the sign fix-up of `//`."""
    return lax.div(x, np.int32(y))


def cdiv(x: Any, y: int) -> Any:
    """ceil(x / y) for x >= 0; at most 0 for x < 0."""
    return lax.div(x + np.int32(y - 1), np.int32(y))


def rem(x: Any, y: int) -> Any:
    """x % y for x >= 0."""
    return lax.rem(x, np.int32(y))


def count(condition: jax.Array) -> jax.Array:
    """How many are true."""
    return jnp.sum(condition.astype(jnp.int32), dtype=jnp.int32)


def loop(begin: Any, end: Any, step: Callable[[Any, Any], Any], carry: Any) -> Any:
    """`lax.fori_loop` whose counter is int32.

    Written out, because `lax.fori_loop` makes a scan of a loop with known bounds, and a scan counts in int64.
    """
    begin, end = (np.int32(bound) if isinstance(bound, int) else bound for bound in (begin, end))

    def body(state: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        i, end, carry = state
        return lax.add(i, np.int32(1)), end, step(i, carry)

    return lax.while_loop(lambda state: lax.lt(state[0], state[1]), body, (begin, end, carry))[2]


def next_power_of_two(n: int) -> int:
    """The least power of two that is at least `n`."""
    return 1 << max(0, n - 1).bit_length()
