"""The whole attention: one fused op where its parts are kernels, otherwise one op after the other."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
from jaxtyping import Array, Float

from nsa_jax.backends import choice, registry
from nsa_jax.backends.builtin import BuiltIn
from nsa_jax.backends.protocol import BRANCHES, Backend, branches_of
from nsa_jax.config import NSAConfig
from nsa_jax.visibility import gated_sum
from pallas_kernels.differentiable import Positions
from pallas_kernels.nsa_attention import fused
from pallas_kernels.nsa_attention.contract import Keys, Parts


def nsa_attention(
    q: Float[Array, "B Tq H Dk"],
    kv: Any,
    gates: Float[Array, "B Tq H 3"],
    positions: Positions,
    window_positions: Positions,
    implementation: str | None,
    *,
    config: NSAConfig,
    scale: float,
) -> Float[Array, "B Tq H Dv"]:
    """`nsa_jax.nsa_attention` of checked arguments.

    A backend with a `nsa_attention` of its own is taken if no backend in front of it takes one of the parts on this
    device. Otherwise the parts are chosen one by one, and if all of them are kernels, they become one fused op.

    Args:
      q, kv, gates, implementation, config, scale: see `nsa_jax.nsa_attention`.
      positions: of the queries among the T tokens that blocks are chosen from.
      window_positions: of the queries among the window's keys, which may be others.
    """
    refusals: list[tuple[str, str]] = []
    for backend, refusal in _with_an_op_of_their_own(implementation, q, kv, positions is window_positions):
        try:
            if refusal is not None:
                raise NotImplementedError(refusal)
            with choice.recording():  # what the backend asks of others is its own affair
                o = _own(q, kv, gates, positions, backend.name, config, scale)
        except NotImplementedError as reason:
            if implementation is not None:
                raise NotImplementedError(f"implementation = {implementation!r}: nsa_attention: {reason}") from reason
            refusals.append((backend.name, str(reason)))
            continue
        choice.record(choice.Choice("nsa_attention", backend.name, tuple(refusals)))
        return o
    arguments = (q, kv, gates, positions, window_positions)
    return _of_parts(*arguments, implementation, tuple(refusals), config=config, scale=scale)


def _of_parts(
    q: Array,
    kv: Any,
    gates: Array,
    positions: Positions,
    window_positions: Positions,
    implementation: str | None,
    refusals: tuple[tuple[str, str], ...] = (),
    *,
    config: NSAConfig,
    scale: float,
) -> Float[Array, "B Tq H Dv"]:
    """One fused op of the parts' kernels, or one op after the other."""
    arguments = (q, kv, gates, positions, window_positions, implementation)
    try:
        with choice.recording() as made:
            o = _fused(*arguments, config=config, scale=scale)
        for one in (*made, choice.Choice("nsa_attention", "fused", refusals)):
            choice.record(one)
        return o
    except NotImplementedError as refusal:
        refusals = (*refusals, ("fused", str(refusal)))
    o = _one_after_the_other(*arguments, config=config, scale=scale)
    choice.record(choice.Choice("nsa_attention", "parts", refusals))
    return o


def _fused(
    q: Array,
    kv: Any,
    gates: Array,
    positions: Positions,
    window_positions: Positions,
    implementation: str | None,
    *,
    config: NSAConfig,
    scale: float,
) -> Float[Array, "B Tq H Dv"]:
    if kv.cmp_k.shape[1] == 0:
        raise NotImplementedError("no compressed token")
    for op in branches_of(config):
        first = _first_that_may_take(op, implementation, q, kv)
        if first is None or choice.is_differentiable(first):
            raise NotImplementedError(f"no kernel for {op}" + (f" before {first.name}" if first else ""))
    forward = {op: choice.FirstForward(op, implementation) for op in (*BRANCHES, "select_blocks")}
    backward = {op + choice.BACKWARD: choice.Backward(op, implementation) for op in BRANCHES}
    return fused.nsa_attention(
        q,
        Keys(*kv),
        gates,
        positions,
        window_positions,
        parts=Parts(**forward, **backward),
        config=config,
        scale=scale,
    )


def _one_after_the_other(
    q: Array,
    kv: Any,
    gates: Array,
    positions: Positions,
    window_positions: Positions,
    implementation: str | None,
    *,
    config: NSAConfig,
    scale: float,
) -> Float[Array, "B Tq H Dv"]:
    def run(op: str, *arguments: Any, **options: Any) -> Any:
        return choice.run(op, implementation, arguments, config=config, scale=scale, **options)

    o_slc = o_win = None
    o_cmp, lse = run("compressed_attention", q, kv.cmp_k, kv.cmp_v, *positions, return_lse=True)
    if config.num_selected:
        block_indices = run("select_blocks", *jax.lax.stop_gradient((q, kv.cmp_k, lse)), *positions)
        o_slc = run("selected_attention", q, kv.slc_k, kv.slc_v, block_indices, *positions)
    if config.window:
        o_win = run("window_attention", q, kv.win_k, kv.win_v, *window_positions)
    return gated_sum(gates, o_cmp, o_slc, o_win)


def _arguments_of(op: str, q: Array, kv: Any) -> tuple[Array, Array, Array]:
    """The first arguments of an op."""
    if op in ("compressed_attention", "select_blocks"):
        return q, kv.cmp_k, kv.cmp_v
    return (q, kv.win_k, kv.win_v) if op == "window_attention" else (q, kv.slc_k, kv.slc_v)


def _first_that_may_take(op: str, implementation: str | None, q: Array, kv: Any) -> Backend | None:
    """The named backend, which says by itself what it does not take, or the first that is not passed over."""
    if implementation is not None:
        return choice.named(implementation)
    arguments = _arguments_of(op, q, kv)
    return next((one for one in registry.in_order() if choice.refusal_of(one, op, arguments) is None), None)


def _with_an_op_of_their_own(
    implementation: str | None, q: Array, kv: Any, one_sequence: bool
) -> Iterator[tuple[Backend, str | None]]:
    """Backends with a `nsa_attention` that is more than their parts, and why it is passed over (None: it is not)."""

    def refusal_of(backend: Backend, op: str) -> str | None:
        return choice.refusal_of(backend, op, _arguments_of(op, q, kv))

    parts_taken_by = None
    for backend in choice.candidates(implementation):
        built_in = getattr(type(backend), "nsa_attention", None) is BuiltIn.nsa_attention
        if not built_in and callable(getattr(backend, "nsa_attention", None)):
            refusal = None if implementation is not None else refusal_of(backend, "nsa_attention")
            if not one_sequence:
                refusal = "the window's keys are not those that blocks are selected from"
            elif parts_taken_by is not None:
                refusal = f"stands behind {parts_taken_by}, which takes one of the parts"
            yield backend, refusal
        if parts_taken_by is None and any(refusal_of(backend, op) is None for op in (*BRANCHES, "select_blocks")):
            parts_taken_by = backend.name


def _call_own(
    name: str, q: Array, kv: Any, gates: Array, positions: Positions, config: NSAConfig, scale: float
) -> Array:
    return registry.get(name).nsa_attention(q, kv, gates, *positions, config=config, scale=scale)  # type: ignore[attr-defined]


def _own(q: Array, kv: Any, gates: Array, positions: Positions, name: str, config: NSAConfig, scale: float) -> Array:
    """A backend's own `nsa_attention`; unless JAX differentiates through it, the gradients are those of the parts."""
    if choice.is_differentiable(registry.get(name)):
        return _call_own(name, q, kv, gates, positions, config, scale)
    return _own_with_gradients_of_parts(q, kv, gates, positions, name, config, scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _own_with_gradients_of_parts(
    q: Array, kv: Any, gates: Array, positions: Positions, name: str, config: NSAConfig, scale: float
) -> Array:
    return _call_own(name, q, kv, gates, positions, config, scale)


def _own_forward(
    q: Array, kv: Any, gates: Array, positions: Positions, name: str, config: NSAConfig, scale: float
) -> tuple[Array, Any]:
    return _call_own(name, q, kv, gates, positions, config, scale), (q, kv, gates, positions)


def _own_backward(name: str, config: NSAConfig, scale: float, residuals: Any, do: Array) -> tuple[Any, ...]:
    q, kv, gates, positions = residuals

    def parts(q: Array, kv: Any, gates: Array) -> Array:
        return _of_parts(q, kv, gates, positions, positions, None, config=config, scale=scale)

    with choice.recording():
        gradients = jax.vjp(parts, q, kv, gates)[1](do)
    choice.record(choice.Choice("nsa_attention" + choice.BACKWARD, "parts", ((name, "there is no backward pass"),)))
    return *gradients, None


_own_with_gradients_of_parts.defvjp(_own_forward, _own_backward)
