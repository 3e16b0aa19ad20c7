"""Compares any implementation with the reference, forward and gradients, on your own shapes, with chex.

Example:
  >>> import jax
  >>> from nsa_jax import NSAConfig
  >>> from nsa_jax.testing import assert_matches_reference, random_inputs
  >>> config = NSAConfig(compress_block=8, compress_stride=4, select_block=8, num_selected=4, window=16)
  >>> inputs = random_inputs(jax.random.key(0), config, T=50, num_heads=2, num_kv_heads=1, head_dim=8)
  >>> assert_matches_reference(inputs, config, implementation="xla", gradients=False)
"""

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float, Int, PRNGKeyArray

from nsa_jax.attention import (
    AttentionInputs,
    BranchKV,
    Implementation,
    compressed_attention,
    nsa_attention,
    select_blocks,
    selected_attention,
    window_attention,
)
from nsa_jax.backends.protocol import branches_of
from nsa_jax.config import NSAConfig, num_compressed
from nsa_jax.precision import widened
from nsa_jax.reference import block_importance
from nsa_jax.visibility import segment_starts


def random_inputs(
    key: PRNGKeyArray,
    config: NSAConfig,
    *,
    T: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    v_head_dim: int | None = None,
    B: int = 1,
    dtype: DTypeLike = jnp.float32,
    num_segments: int = 0,
    query_offset: int = 0,
    num_queries: int | None = None,
) -> AttentionInputs:
    """Standard normal queries, keys and values, and gates in (0, 1).

    Args:
      key: random key.
      config: gives the number of compressed tokens.
      T: tokens that keys and values cover.
      num_heads, num_kv_heads, head_dim, v_head_dim, B, dtype: shapes; v_head_dim None is head_dim.
      num_segments: segments per row, with random borders; 0 for no segments.
      query_offset, num_queries: the slice of positions that the queries hold. None: all positions from the offset on.
    """
    Tq = T - query_offset if num_queries is None else num_queries
    Dv = head_dim if v_head_dim is None else v_head_dim
    q_key, gate_key, segment_key, *kv_keys = jax.random.split(key, 9)
    Nc = num_compressed(T, config)
    shapes = [(B, Nc if i < 2 else T, num_kv_heads, Dv if i % 2 else head_dim) for i in range(6)]
    kv = BranchKV(*(jax.random.normal(k, shape, dtype) for k, shape in zip(kv_keys, shapes, strict=True)))
    q = jax.random.normal(q_key, (B, Tq, num_heads, head_dim), dtype)
    gates = jax.nn.sigmoid(jax.random.normal(gate_key, (B, Tq, num_heads, 3), dtype))
    segment_ids = None
    if num_segments:
        segment_ids = jnp.sort(jax.random.randint(segment_key, (B, T), 0, num_segments, jnp.int32), axis=1)
    return AttentionInputs(q, kv, gates, segment_ids, query_offset)


def tolerance_of(dtype: DTypeLike) -> float:
    """The normwise relative error that is allowed: float64 1e-12, float32 1e-5, 16-bit 1e-2."""
    return {8: 1e-12, 4: 1e-5, 2: 1e-2}[jnp.dtype(dtype).itemsize]


def normwise_error(actual: Array, expected: Array, if_zero: float = 0.0) -> float:
    """||actual - expected|| / ||expected|| in float64. Equal infinities count as equal. NaN gives infinity.

    `if_zero` is what to divide by where ||expected|| is 0.
    """
    a, b = np.asarray(actual).astype(np.float64), np.asarray(expected).astype(np.float64)
    if a.shape != b.shape:
        raise ValueError(f"actual has shape {a.shape}, expected {b.shape}")
    infinite = np.isinf(b)
    if (a[infinite] != b[infinite]).any() or not np.isfinite(a[~infinite]).all():
        return float("inf")
    a, b = a[~infinite], b[~infinite]
    difference = np.linalg.norm(a - b)
    norm = np.linalg.norm(b) or if_zero
    return float(difference / max(norm, np.finfo(np.float64).tiny)) if difference else 0.0


def assert_trees_close(
    actual: Any, expected: Any, tolerance: float | None = None, what: str = "", if_zero: float = 0.0
) -> None:
    """Asserts that two trees have the same structure and shapes, and that every pair of leaves is close in norm.

    Args:
      actual, expected: trees of arrays.
      tolerance: on `normwise_error`; None: `tolerance_of` the coarser dtype of each pair.
      what: a description for the error message.
      if_zero: see `normwise_error`.

    Raises:
      AssertionError: the trees differ. The message names the leaf, the error and the tolerance.
    """
    chex.assert_trees_all_equal_structs(actual, expected)
    chex.assert_trees_all_equal_shapes(actual, expected)

    def close(a: Array, b: Array) -> bool:
        return normwise_error(a, b, if_zero) <= _allowed(a, b)

    def _allowed(a: Array, b: Array) -> float:
        coarser = min(a.dtype, b.dtype, key=lambda dtype: jnp.dtype(dtype).itemsize)
        return tolerance_of(coarser) if tolerance is None else tolerance

    def message(a: Array, b: Array) -> str:
        return f"{what or 'leaf'}: normwise error {normwise_error(a, b, if_zero):.3g} above {_allowed(a, b):.3g}"

    chex.assert_trees_all_equal_comparator(close, message, actual, expected)


def assert_same_blocks(
    actual: Int[Array, "B K Tq n"],
    expected: Int[Array, "B K Tq n"],
    importance: Float[Array, "B K Tq Nb"],
    tolerance: float = 1e-5,
) -> None:
    """Asserts that two selections are equal, except for exchanges of blocks that rounding cannot tell apart.

    Blocks may be exchanged only if their importances are positive and agree to a relative error of `tolerance`.

    Raises:
      AssertionError: the selections differ. The message names the first row that differs.
    """
    chex.assert_equal_shape([actual, expected])
    a, b, score = np.asarray(actual), np.asarray(expected), np.asarray(importance)
    for row in map(tuple, np.argwhere((a != b).any(axis=-1))):
        ours, theirs = sorted(set(a[row]) - set(b[row])), sorted(set(b[row]) - set(a[row]))
        same = len(ours) == len(theirs) > 0 and min(ours + theirs) >= 0 and max(ours) < score.shape[-1]
        if same:
            got, wanted = np.sort(score[row][ours]), np.sort(score[row][theirs])
            same = bool((got > 0).all() and (np.abs(got - wanted) <= tolerance * wanted).all())
        if not same or (np.diff(a[row][a[row] >= 0]) <= 0).any():
            raise AssertionError(f"select_blocks at [b, k, t] = {row}: {a[row]}, expected {b[row]}")


def assert_matches_reference(
    inputs: AttentionInputs,
    config: NSAConfig,
    *,
    implementation: Implementation | None,
    scale: float | None = None,
    tolerance: float | None = None,
    gradients: bool = True,
    key: PRNGKeyArray | None = None,
) -> None:
    """Asserts that an implementation of every op agrees with the reference on `inputs`.

    This compares the three branches and their lse, the block indices and the gated sum, and the gradients of each with
    respect to all its inputs for a random cotangent. The reference gets the same values, in float32 at least. Selected
    attention attends to the reference's blocks. `assert_same_blocks` compares the block indices.

    Args:
      inputs: for example from `random_inputs`.
      config: sizes of the branches.
      implementation: the implementation to test. None: the automatic choice.
      scale: see `nsa_attention`.
      tolerance: on the normwise error. None: `tolerance_of` the dtype of `inputs.q`.
      gradients: whether to compare gradients too.
      key: random key for the cotangents.

    Raises:
      AssertionError: something differs. The message says what.
    """
    tolerance = tolerance_of(inputs.q.dtype) if tolerance is None else tolerance
    key = jax.random.key(0) if key is None else key
    wide = widened((inputs.q, inputs.kv, inputs.gates))
    common: dict[str, Any] = {
        "config": config,
        "scale": scale,
        "segment_ids": inputs.segment_ids,
        "query_offset": inputs.query_offset,
    }
    if config.num_selected:
        lse, blocks, importance = reference_selection(inputs._replace(q=wide[0], kv=wide[1]), config, scale=scale)

    def comparable(o: Array, lse: Array) -> tuple[Array, Array]:
        # An lse of -inf has no gradient to compare.
        return o, jnp.where(lse == -jnp.inf, -1e3, lse)

    def compressed(implementation: str | None, q: Array, k: Array, v: Array) -> tuple[Array, Array]:
        return comparable(*compressed_attention(q, k, v, implementation=implementation, **common))

    def selected(implementation: str | None, q: Array, k: Array, v: Array) -> tuple[Array, Array]:
        return comparable(
            *selected_attention(q, k, v, blocks, return_lse=True, implementation=implementation, **common)
        )

    def window(implementation: str | None, q: Array, k: Array, v: Array) -> tuple[Array, Array]:
        return comparable(*window_attention(q, k, v, return_lse=True, implementation=implementation, **common))

    def everything(implementation: str | None, q: Array, kv: BranchKV, gates: Array) -> Array:
        return nsa_attention(q, kv, gates, implementation=implementation, **common)

    narrow = (inputs.q, inputs.kv, inputs.gates)
    cases: list[tuple[str, Callable[..., Any], Callable[..., tuple]]] = [
        ("compressed_attention", compressed, lambda q, kv, gates: (q, kv.cmp_k, kv.cmp_v)),
        ("selected_attention", selected, lambda q, kv, gates: (q, kv.slc_k, kv.slc_v)),
        ("window_attention", window, lambda q, kv, gates: (q, kv.win_k, kv.win_v)),
        ("nsa_attention", everything, lambda *arguments: arguments),
    ]
    for name, op, pick in cases:
        if name not in ("nsa_attention", *branches_of(config)):
            continue
        expected, expected_vjp = _run_vjp(functools.partial(op, "reference"), pick(*wide))
        actual, actual_vjp = _run_vjp(functools.partial(op, implementation), pick(*narrow))
        assert_trees_close(widened(actual), expected, tolerance, name)
        if gradients:
            cotangent = _random_like(key, actual)
            gradient = expected_vjp(widened(cotangent))
            # The gradients of q and k add differences p (dp - delta), all zero where each query sees one key. What
            # rounding leaves of them is measured against the gradient of all inputs.
            whole = float(np.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in jax.tree.leaves(gradient))))
            what = f"gradient of {name}"
            assert_trees_close(widened(actual_vjp(cotangent)), gradient, tolerance, what, if_zero=whole)
    if config.num_selected:
        select = jax.jit(functools.partial(select_blocks, implementation=implementation, **common))
        assert_same_blocks(select(inputs.q, inputs.kv.cmp_k, lse), blocks, importance)


def reference_selection(
    inputs: AttentionInputs, config: NSAConfig, *, scale: float | None = None
) -> tuple[Float[Array, "B H Tq"], Int[Array, "B K Tq n"], Float[Array, "B K Tq Nb"]]:
    """The reference's lse, its selected blocks, and the importances that it selects by (equations 8 to 12)."""
    options: dict[str, Any] = {
        "config": config,
        "scale": scale,
        "segment_ids": inputs.segment_ids,
        "query_offset": inputs.query_offset,
        "implementation": "reference",
    }
    q, k, v = inputs.q, inputs.kv.cmp_k, inputs.kv.cmp_v
    lse = jax.jit(lambda *a: compressed_attention(*a, **options)[1])(q, k, v)
    blocks = jax.jit(lambda *a: select_blocks(*a, **options))(q, k, lse)
    starts = None
    if inputs.segment_ids is not None:
        starts = segment_starts(inputs.segment_ids)[:, inputs.query_offset : inputs.query_offset + q.shape[1]]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    importance = jax.jit(functools.partial(block_importance, config=config, scale=scale))
    return lse, blocks, importance(q, k, lse, starts, inputs.query_offset)


def _run_vjp(op: Callable, arguments: tuple) -> tuple[Any, Callable]:
    """The op's result and its vector-Jacobian product, each compiled as one program."""
    vjp = jax.jit(lambda arguments, cotangent: jax.vjp(op, *arguments)[1](cotangent))
    return jax.jit(op)(*arguments), lambda cotangent: vjp(arguments, cotangent)


def _random_like(key: PRNGKeyArray, tree: Any) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(
        structure, [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    )
