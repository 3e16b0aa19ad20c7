"""Native Sparse Attention as one differentiable op, made of the forward and backward passes of its branches."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.contract import Gradients, Sizes
from pallas_kernels.differentiable import Positions
from pallas_kernels.nsa_attention.contract import Keys, Parts
from pallas_kernels.residuals import named


def nsa_attention(
    q: Float[Array, "B Tq H Dk"],
    keys: Keys,
    gates: Float[Array, "B Tq H 3"],
    positions: Positions,
    window_positions: Positions,
    block_indices: Int[Array, "B K Tq n"] | None = None,
    *,
    parts: Parts,
    config: Sizes,
    scale: float,
) -> Float[Array, "B Tq H Dv"]:
    """All branches and their gated sum; the contract is in `pallas_kernels.nsa_attention.contract`.

    Args:
      q: queries.
      keys: keys and values of the branches, at least one compressed token among them.
      gates: of any float dtype.
      positions: of the queries among the tokens that blocks are selected from.
      window_positions: of the queries among the window's keys.
      block_indices: blocks to attend to instead of those that `parts.select_blocks` chooses.
      parts: forward and backward passes of the branches.
      config: sizes.
      scale: factor of the scores.

    Returns:
      o in q's dtype. Differentiable in q, keys and gates.

    Raises:
      NotImplementedError: what one of the parts does not support.
    """
    places = (positions, window_positions)
    return _attend(q, keys, gates.astype(jnp.float32), places, block_indices, parts, config, scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _attend(
    q: Array, keys: Keys, gates: Array, places: Any, given: Array | None, parts: Parts, config: Sizes, scale: float
) -> Array:
    return _forward(q, keys, gates, places, given, parts, config, scale)[0]


def _forward(
    q: Array, keys: Keys, gates: Array, places: Any, given: Array | None, parts: Parts, config: Sizes, scale: float
) -> tuple[Array, Any]:
    positions, window_positions = places
    options: dict[str, Any] = {"config": config, "scale": scale}
    compressed = named(parts.compressed_attention(q, keys.cmp_k, keys.cmp_v, *positions, **options))
    block_indices, selected, window = given, None, None
    if config.num_selected:
        if block_indices is None:
            block_indices = named(parts.select_blocks(q, keys.cmp_k, compressed[1], *positions, **options))
        selected = named(parts.selected_attention(q, keys.slc_k, keys.slc_v, block_indices, *positions, **options))
    if config.window:
        window = named(parts.window_attention(q, keys.win_k, keys.win_v, *window_positions, **options))
    outputs = (compressed, selected, window)
    o = functools.reduce(
        jnp.add,
        (gates[..., i : i + 1] * branch[0].astype(gates.dtype) for i, branch in enumerate(outputs) if branch),
    )
    return o.astype(q.dtype), (q, keys, gates, places, block_indices, outputs)


def _backward(parts: Parts, config: Sizes, scale: float, residuals: Any, do: Array) -> tuple[Any, ...]:
    q, keys, gates, (positions, window_positions), block_indices, outputs = residuals
    compressed, selected, window = outputs
    g_cmp, g_slc, g_win = gates[..., 0], gates[..., 1], gates[..., 2]
    options: dict[str, Any] = {"config": config, "scale": scale}
    cmp = parts.compressed_attention_backward(
        q, keys.cmp_k, keys.cmp_v, *compressed, do, *positions, gate=g_cmp, **options
    )
    slc = _of_no_branch(cmp, keys.slc_k, keys.slc_v)
    if selected:
        slc = parts.selected_attention_backward(
            q, keys.slc_k, keys.slc_v, block_indices, *selected, do, *positions, gate=g_slc, dq=cmp.dq, **options
        )
    win = _of_no_branch(slc, keys.win_k, keys.win_v)
    if window:
        win = parts.window_attention_backward(
            q, keys.win_k, keys.win_v, *window, do, *window_positions, gate=g_win, dq=slc.dq, **options
        )
    dgates = jnp.stack([jnp.swapaxes(branch.delta, 1, 2) for branch in (cmp, slc, win)], axis=-1)
    return win.dq, Keys(cmp.dk, cmp.dv, slc.dk, slc.dv, win.dk, win.dv), dgates, None, None


def _of_no_branch(before: Gradients, k: Array, v: Array) -> Gradients:
    """What the backward pass of a branch that there is not would return, after that of another."""
    return before._replace(dk=jnp.zeros_like(k), dv=jnp.zeros_like(v), delta=jnp.zeros_like(before.delta))


_attend.defvjp(_forward, _backward)
