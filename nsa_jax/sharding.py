"""The ops on a mesh: every device attends to its own rows, heads and tokens with its own kernels.

Left to itself, the partitioner gathers a kernel's operands on every device. But the rows of a batch are independent,
and so are the groups of query heads that share a K/V head: `jax.shard_map` over both needs no communication. Where the
tokens of a sequence are split too, devices exchange just what `nsa_jax.context` says.
"""

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec
from jaxtyping import Array, Int

from nsa_jax import context
from nsa_jax.attention import compressed_attention, nsa_attention, select_blocks, selected_attention, window_attention
from nsa_jax.compression import compress
from nsa_jax.dense import causal_attention
from nsa_jax.visibility import segment_positions

MeshAxes = str | tuple[str, ...]
Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

# How the array arguments and the results of the ops are split. Query heads go with their K/V head: whole groups.
_TOKENS = PartitionSpec("batch", "context", "heads", None)
ARGUMENTS = {
    "q": _TOKENS,
    "k": _TOKENS,
    "v": _TOKENS,
    "kv": _TOKENS,
    "gates": _TOKENS,
    "x": _TOKENS,
    "lse": PartitionSpec("batch", "heads", "context"),
    "block_indices": PartitionSpec("batch", "heads", "context", None),
    "segment_ids": PartitionSpec("batch", "context"),
    "parameters": PartitionSpec(),
    "query_offset": PartitionSpec(),
}
RESULTS: dict[Callable, Any] = {
    nsa_attention: _TOKENS,
    compressed_attention: (_TOKENS, ARGUMENTS["lse"]),
    select_blocks: ARGUMENTS["block_indices"],
    selected_attention: _TOKENS,
    window_attention: _TOKENS,
    causal_attention: _TOKENS,
    compress: _TOKENS,
    segment_positions: ARGUMENTS["segment_ids"],
}
# The ops whose tokens can be split, and what a device then runs.
OVER_CONTEXT: dict[Callable, Callable] = {
    nsa_attention: context.nsa_attention,
    window_attention: context.window_attention,
    causal_attention: context.causal_attention,
    compress: context.compress,
    segment_positions: context.segment_positions,
}


def sharded(
    op: Callable[Parameters, Result],
    *,
    batch_axes: MeshAxes = (),
    head_axes: MeshAxes = (),
    context_axes: MeshAxes = (),
    mesh: Mesh | AbstractMesh | None = None,
) -> Callable[Parameters, Result]:
    """An op with its batch, its K/V heads and its tokens split over a mesh: the same arguments, results and gradients.

    The H / K query heads of a group stay with their K/V head. Arrays lie, or are brought, as the op wants them: B of
    each over `batch_axes`, heads over `head_axes`, tokens over `context_axes`, the rest whole. Arrays that lie
    otherwise are moved on Auto axes and refused by `jax.shard_map` on Explicit ones. Nothing else is communicated
    where only batch and heads are split, forward or backward. Devices along other axes of the mesh repeat each other's
    work; if such an axis is Explicit, gradients are also averaged over it.

    With `context_axes` the tokens of all arguments and results are in the order of `nsa_jax.context.zigzag_order`, by
    which every device gets as much work, T is a multiple of 2 C d on C devices, and compressed tokens are those of
    `compress`, so split: [B, T / d, K, D], one for every stride, of which the last few stand for tokens beyond the end
    and are seen by nobody. What is sent, and how much of it, is said in `nsa_jax.context`.

    Example:
      >>> import functools, jax
      >>> from nsa_jax import NSAConfig, nsa_attention
      >>> from nsa_jax.testing import random_inputs
      >>> q, kv, gates, *_ = random_inputs(
      ...     jax.random.key(0), NSAConfig(), B=2, T=100, num_heads=8, num_kv_heads=4, head_dim=16
      ... )
      >>> auto = (jax.sharding.AxisType.Auto,) * 2
      >>> attention = sharded(nsa_attention, batch_axes="data", head_axes="tensor")
      >>> with jax.set_mesh(jax.make_mesh((2, 4), ("data", "tensor"), axis_types=auto)):
      ...     o = jax.jit(functools.partial(attention, config=NSAConfig()))(q, kv, gates)
      >>> o.sharding.shard_shape(o.shape)
      (1, 100, 2, 16)

    Args:
      op: `nsa_attention`, `compressed_attention`, `select_blocks`, `selected_attention`, `window_attention`,
        `dense.causal_attention`, `compress` or `visibility.segment_positions`.
      batch_axes: the mesh axis, or axes, that split B.
      head_axes: the mesh axis, or axes, that split the K/V heads, and the query heads with them.
      context_axes: the mesh axis, or axes, that split T; for `nsa_attention`, `window_attention`, `causal_attention`,
        `compress` and `segment_positions`, without a query offset.
      mesh: None for the one in context (`jax.set_mesh`) when the result is called.

    Returns:
      A function with the signature of `op`. It passes over axes that the mesh lacks and axes that a surrounding
      `jax.shard_map` has split already, and is `op` itself where no axis of more than one device is left.

    Raises:
      ValueError: `op` is another function or an axis is named twice; on calling the result, B, T or a number of heads
        does not fit the devices along its axes, or there is a query offset where T is split. What else `op` refuses it
        describes by one device's part.
    """
    if op not in RESULTS:
        raise ValueError(f"op = {op!r}: expected one of {', '.join(known.__name__ for known in RESULTS)}")
    axes = {"batch": _as_tuple(batch_axes), "heads": _as_tuple(head_axes), "context": _as_tuple(context_axes)}
    named = sum(axes.values(), ())
    if len(set(named)) < len(named):
        raise ValueError(
            f"batch_axes = {batch_axes!r}, head_axes = {head_axes!r}, context_axes = {context_axes!r}: expected every "
            "mesh axis once"
        )
    signature = inspect.signature(op)

    @functools.wraps(op)
    def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        around = jax.sharding.get_abstract_mesh() if mesh is None else mesh
        over = {what: free_axes(some, around) for what, some in axes.items()}
        devices = {what: math.prod(around.shape[axis] for axis in some) for what, some in over.items()}
        if math.prod(devices.values()) == 1:
            return op(*args, **kwargs)

        def place(split: PartitionSpec) -> PartitionSpec:
            return PartitionSpec(*(over.get(what) or None for what in split))

        arrays, options = _separate(signature.bind(*args, **kwargs).arguments)
        _check_divisible(arrays, axes, devices)
        run = cast(Callable[..., Result], op)
        if devices["context"] > 1:
            run = _over_context(op, over["context"], options, arrays)
        split_op = jax.shard_map(
            lambda arrays: run(**arrays, **options),
            mesh=mesh,
            in_specs=({name: place(ARGUMENTS[name]) for name in arrays},),
            out_specs=jax.tree.map(place, RESULTS[op]),
            axis_names=manual_axes(sum(over.values(), ()), around),
            # With it, every `pallas_call` would have to say over which axes its outputs vary: kernels see no mesh.
            check_vma=False,
        )
        return jax.jit(split_op)(arrays)  # outside of jit, `shard_map` knows no Auto axes

    return call


def token_positions(
    shape: tuple[int, int],
    segment_ids: Int[Array, "B T"] | None = None,
    *,
    batch_axes: MeshAxes = (),
    context_axes: MeshAxes = (),
) -> Int[Array, "B T"]:
    """Positions of the tokens of B rows of T, each within its segment if there are any; int32.

    Tokens that the mesh in context splits over `context_axes` are in zigzag order, as `sharded` wants them.
    """
    if segment_ids is not None:
        return sharded(segment_positions, batch_axes=batch_axes, context_axes=context_axes)(segment_ids)
    devices = devices_along(context_axes)
    order = context.zigzag_order(shape[1], devices) if devices > 1 else np.arange(shape[1])
    return jnp.broadcast_to(jnp.asarray(order, jnp.int32)[None, :], shape)


def free_axes(axes: MeshAxes | None, mesh: Mesh | AbstractMesh | None = None) -> tuple[str, ...]:
    """Those of some axes along which the mesh (None: the one in context) has several devices yet to be split over.

    That is, without axes that the mesh lacks, and those that a surrounding `jax.shard_map` has split already.
    """
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return tuple(
        axis
        for axis in _as_tuple(axes or ())
        if kinds.get(axis, AxisType.Manual) != AxisType.Manual and mesh.shape[axis] > 1
    )


def manual_axes(axes: tuple[str, ...], mesh: Mesh | AbstractMesh) -> set[str]:
    """The `axis_names` of a `jax.shard_map` that splits over some of the mesh's axes."""
    # Transposition sums gradients over manual axes that split nothing, though they are equal there: leave such axes to
    # XLA. Explicit ones are manual all the same, because interpreted kernels write to arrays that have no sharding; and
    # those of one device, because cuDNN's attention wants to split itself where an axis is left.
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return {axis for axis, kind in kinds.items() if axis in axes or kind == AxisType.Explicit or mesh.shape[axis] == 1}


def free_split(split: PartitionSpec, mesh: Mesh | AbstractMesh | None = None) -> PartitionSpec:
    """A split over the mesh (None: the one in context), by `free_axes`."""
    return PartitionSpec(*(free_axes(axes, mesh) or None for axes in split))


def devices_along(axes: MeshAxes | None) -> int:
    """Devices along some axes of the mesh in context, by `free_axes`."""
    return math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in free_axes(axes))


def place(x: Array, split: PartitionSpec) -> Array:
    """An array, split over the mesh in context as told: moved there on Explicit axes, constrained to on Auto ones."""
    kinds = _free_kinds()
    if AxisType.Explicit in kinds:
        return jax.sharding.reshard(x, free_split(split))
    return jax.lax.with_sharding_constraint(x, free_split(split)) if kinds else x


def take_rows(table: Array, indices: Array, split: PartitionSpec) -> Array:
    """table[indices], split over the mesh in context as told; `table` may be split too."""
    return place(table.at[indices].get(out_sharding=_explicit(split)), split)


def reshape(x: Array, shape: tuple[int, ...], split: PartitionSpec) -> Array:
    """`x.reshape(shape)`, split over the mesh in context as told."""
    return place(jax.lax.reshape(x, shape, out_sharding=_explicit(split)), split)


def _explicit(split: PartitionSpec) -> PartitionSpec | None:
    """Where a result shall lie, as JAX asks on Explicit axes; on others it does not want to be told."""
    return free_split(split) if AxisType.Explicit in _free_kinds() else None


def _free_kinds() -> set[AxisType]:
    return set(jax.sharding.get_abstract_mesh().axis_types) - {AxisType.Manual}


def _over_context(op: Callable, axes: tuple[str, ...], options: dict[str, Any], arrays: Mapping[str, Any]) -> Callable:
    """What a device runs where T is split; takes the offset, which must be 0, out of the options."""
    if op not in OVER_CONTEXT:
        raise ValueError(
            f"context_axes = {axes}: {op.__name__} is not split so, but {', '.join(o.__name__ for o in OVER_CONTEXT)}"
        )
    if "query_offset" in arrays or options.pop("query_offset", 0) != 0:
        raise ValueError(f"query_offset: expected 0 where context_axes = {axes} split the tokens")
    return functools.partial(OVER_CONTEXT[op], axes=axes)


def _as_tuple(axes: MeshAxes) -> tuple[str, ...]:
    return (axes,) if isinstance(axes, str) else tuple(axes)


def _separate(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arrays, and all else. A query offset whose value is known is no array: `op` checks it."""
    arrays, options = {}, {}
    for name, value in arguments.items():
        known = name == "query_offset" and not isinstance(value, jax.core.Tracer)
        if name not in ARGUMENTS or value is None or known:
            options[name] = jax.device_get(value) if known else value
        else:
            arrays[name] = value
    return arrays, options


def _check_divisible(
    arrays: Mapping[str, Any], axes: Mapping[str, tuple[str, ...]], devices: Mapping[str, int]
) -> None:
    """Raises ValueError where the devices along the axes of a dimension do not divide it."""
    for name, argument in arrays.items():
        split = ARGUMENTS[name]
        for path, array in jax.tree_util.tree_leaves_with_path(argument):
            described = f"{name}{jax.tree_util.keystr(path)}: {array.dtype} {array.shape}"
            if not split:
                continue
            if array.ndim != len(split):
                raise ValueError(f"{described}: expected {len(split)} axes")
            for what, size in zip(split, array.shape, strict=True):
                if what is None or devices[what] == 1:
                    continue
                twice = "twice " if what == "context" else ""
                if size % (2 * devices[what] if twice else devices[what]):
                    along = {"batch": "batch_axes", "heads": "head_axes", "context": "context_axes"}[what]
                    raise ValueError(
                        f"{described}: expected {what} = {size} to be a multiple of {twice}{devices[what]}, "
                        f"the devices along {along} = {axes[what]}"
                    )
