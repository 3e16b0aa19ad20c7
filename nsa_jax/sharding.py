"""The ops on a mesh: every device attends to its own rows, heads and tokens with its own kernels.

XLA does not know how to split a kernel, so it would gather the kernel's inputs on every device. But the rows of a batch
are independent, and so are the groups of query heads that share a K/V head. `jax.shard_map` over both needs no
communication. If the tokens of a sequence are split too, devices exchange only what `nsa_jax.context` lists.
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

from nsa_jax import arguments, context
from nsa_jax.attention import compressed_attention, nsa_attention, select_blocks, selected_attention, window_attention
from nsa_jax.compression import compress
from nsa_jax.dense import causal_attention
from nsa_jax.visibility import segment_positions

MeshAxes = str | tuple[str, ...]
Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

# How the array arguments and the results of the ops are split. Query heads stay with their K/V head, in whole groups.
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
# The ops whose tokens can be split, and the function that each device then runs.
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
    """An op whose batch, K/V heads and tokens are split over a mesh, with the same arguments, results and gradients.

    The H / K query heads of a group stay with their K/V head. Arrays must be split as the op needs them: B over
    `batch_axes`, heads over `head_axes`, tokens over `context_axes`, and nothing else. If an array is split otherwise,
    it is moved on Auto axes; on Explicit axes `jax.shard_map` raises an error. If only batch and heads are split,
    nothing else is communicated, forward or backward. Devices along other axes of the mesh repeat each other's work. If
    such an axis is Explicit, gradients are also averaged over it.

    With `context_axes`, the tokens of all arguments and results are in the order of `nsa_jax.context.zigzag_order`, in
    which every device has as much work. T is a multiple of 2 C d on C devices. Compressed tokens come from `compress`,
    split in the same way: [B, T / d, K, D], one for every stride. The last few of them stand for tokens beyond the end
    of the sequence, and no query sees them. `nsa_jax.context` lists what is sent, and how much.

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
      context_axes: the mesh axis, or axes, that split T. Only `nsa_attention`, `window_attention`, `causal_attention`,
        `compress` and `segment_positions` take them, without a query offset.
      mesh: the mesh. None: the one in context (`jax.set_mesh`) when the result is called.

    Returns:
      A function with the signature of `op`. It ignores axes that the mesh does not have, and axes that a surrounding
      `jax.shard_map` has already split. If no axis of more than one device is left, it calls `op` itself.

    Raises:
      ValueError: `op` is another function, or an axis is named twice. When the result is called: the devices along an
        axis do not divide B, T or the number of heads, or there is a query offset although T is split. Other errors of
        `op` describe the part of one device.
    """
    if op not in RESULTS:
        raise ValueError(f"op = {op!r}: expected one of {', '.join(known.__name__ for known in RESULTS)}")
    for name, given in (("batch_axes", batch_axes), ("head_axes", head_axes), ("context_axes", context_axes)):
        check_mesh_axes(name, given)
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
        arrays, restore = _without_empty(arrays, devices)
        return on_devices(
            lambda arrays: run(**restore(arrays), **options),
            (arrays,),
            splits=({name: place(ARGUMENTS[name]) for name in arrays},),
            results=jax.tree.map(place, _splits_of_results(op, options)),
            axes=sum(over.values(), ()),
            mesh=mesh,
        )

    return call


def on_devices(
    function: Callable[..., Result],
    arguments: tuple[Any, ...],
    *,
    splits: tuple[Any, ...],
    results: Any,
    axes: tuple[str, ...],
    mesh: Mesh | AbstractMesh | None = None,
) -> Result:
    """function(*arguments), which each device computes of its parts.

    Args:
      function: of arrays that hold the parts of one device.
      arguments: trees of arrays.
      splits: how they are split: trees of `PartitionSpec`, as `jax.shard_map` takes them.
      results: how the results are.
      axes: the mesh axes over which something is split.
      mesh: the mesh. None: the one in context.
    """
    split = jax.shard_map(
        function,
        mesh=mesh,
        in_specs=splits,
        out_specs=results,
        axis_names=manual_axes(axes, jax.sharding.get_abstract_mesh() if mesh is None else mesh),
        # The check would need every `pallas_call` to say over which axes its outputs vary, but kernels see no mesh.
        check_vma=False,
    )
    return jax.jit(split)(*arguments)  # outside jit, `shard_map` does not support Auto axes


def check_mesh_axes(name: str, axes: Any) -> None:
    """Raises ValueError for what is neither the name of a mesh axis nor a tuple of names."""
    if not isinstance(axes, str) and not (isinstance(axes, tuple | list) and all(isinstance(a, str) for a in axes)):
        raise ValueError(f"{name} = {axes!r}: expected the name of a mesh axis, or a tuple of names")


def token_positions(
    shape: tuple[int, int],
    segment_ids: Int[Array, "B T"] | None = None,
    *,
    batch_axes: MeshAxes = (),
    context_axes: MeshAxes = (),
) -> Int[Array, "B T"]:
    """Positions of the tokens of B rows of T tokens, int32. With segments, positions count within each segment.

    If the mesh in context splits tokens over `context_axes`, they are in zigzag order, as `sharded` needs them.
    """
    if segment_ids is not None:
        return sharded(segment_positions, batch_axes=batch_axes, context_axes=context_axes)(segment_ids)
    devices = devices_along(context_axes)
    order = context.zigzag_order(shape[1], devices) if devices > 1 else np.arange(shape[1])
    return jnp.broadcast_to(jnp.asarray(order, jnp.int32)[None, :], shape)


def free_axes(axes: MeshAxes | None, mesh: Mesh | AbstractMesh | None = None) -> tuple[str, ...]:
    """The given axes over which something can still be split, on a mesh (None: the one in context).

    These are the axes of more than one device, without those that the mesh does not have and those that a surrounding
    `jax.shard_map` has already split.
    """
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return tuple(
        axis
        for axis in _as_tuple(axes or ())
        if kinds.get(axis, AxisType.Manual) != AxisType.Manual and mesh.shape[axis] > 1
    )


def manual_axes(axes: tuple[str, ...], mesh: Mesh | AbstractMesh) -> set[str]:
    """The `axis_names` for a `jax.shard_map` that splits over some of the mesh's axes."""
    # Transposition sums gradients over manual axes that split nothing, although the gradients are equal there. Such
    # axes are therefore left to XLA, with two exceptions. Explicit axes are manual, because interpreted kernels write
    # to arrays that have no sharding. Axes of one device are manual, because cuDNN's attention tries to split itself if
    # an axis is left.
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return {axis for axis, kind in kinds.items() if axis in axes or kind == AxisType.Explicit or mesh.shape[axis] == 1}


def free_split(split: PartitionSpec, mesh: Mesh | AbstractMesh | None = None) -> PartitionSpec:
    """A split, with only the axes that `free_axes` returns for the mesh (None: the one in context)."""
    return PartitionSpec(*(free_axes(axes, mesh) or None for axes in split))


def devices_along(axes: MeshAxes | None) -> int:
    """The number of devices along those of the given axes that `free_axes` returns for the mesh in context."""
    return math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in free_axes(axes))


def place(x: Array, split: PartitionSpec) -> Array:
    """An array, split over the mesh in context: resharded on Explicit axes, constrained on Auto axes."""
    kinds = _free_kinds()
    if AxisType.Explicit in kinds:
        return jax.sharding.reshard(x, free_split(split))
    return jax.lax.with_sharding_constraint(x, free_split(split)) if kinds else x


def take_rows(table: Array, indices: Array, split: PartitionSpec) -> Array:
    """table[indices], split over the mesh in context. `table` may be split too."""
    return place(table.at[indices].get(out_sharding=_explicit(split)), split)


def reshape(x: Array, shape: tuple[int, ...], split: PartitionSpec) -> Array:
    """`x.reshape(shape)`, split over the mesh in context."""
    return place(jax.lax.reshape(x, shape, out_sharding=_explicit(split)), split)


def _explicit(split: PartitionSpec) -> PartitionSpec | None:
    """The `out_sharding` of a result, which JAX asks for on Explicit axes; None if there are none."""
    return free_split(split) if AxisType.Explicit in _free_kinds() else None


def _free_kinds() -> set[AxisType]:
    return set(jax.sharding.get_abstract_mesh().axis_types) - {AxisType.Manual}


def _over_context(op: Callable, axes: tuple[str, ...], options: dict[str, Any], arrays: Mapping[str, Any]) -> Callable:
    """What a device runs if T is split. Removes the query offset, which must be 0, from the options."""
    if op not in OVER_CONTEXT:
        raise ValueError(
            f"context_axes = {axes}: {op.__name__} is not split so, but {', '.join(o.__name__ for o in OVER_CONTEXT)}"
        )
    if "query_offset" in arrays or options.pop("query_offset", 0) != 0:
        raise ValueError(f"query_offset: expected 0 where context_axes = {axes} split the tokens")
    return functools.partial(OVER_CONTEXT[op], axes=axes)


def _splits_of_results(op: Callable, options: Mapping[str, Any]) -> Any:
    return (RESULTS[op], ARGUMENTS["lse"]) if options.get("return_lse") else RESULTS[op]


def _as_tuple(axes: MeshAxes) -> tuple[str, ...]:
    return (axes,) if isinstance(axes, str) else tuple(axes)


def _separate(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arrays, and everything else. A query offset whose value is known is not an array, so that `op` checks it."""
    arrays, options = {}, {}
    for name, value in given.items():
        known = name == "query_offset" and not isinstance(value, jax.core.Tracer)
        if name not in ARGUMENTS or value is None or known:
            options[name] = jax.device_get(value) if known else value
        else:
            arrays[name] = jax.tree.map(
                functools.partial(arguments.array, name), value, is_leaf=lambda x: isinstance(x, list)
            )
    return arrays, options


def _without_empty(
    arrays: Mapping[str, Any], devices: Mapping[str, int]
) -> tuple[dict[str, Any], Callable[[Mapping[str, Any]], dict[str, Any]]]:
    """The arrays, with None for each that has no elements, and a function that puts such arrays back on a device.

    There are no compressed tokens if T < l. On JAX 0.11, XLA crashes on a `jax.shard_map` that takes arrays without
    elements beside others, so each device makes its own.
    """

    def restored(name: str, x: Array, given: Array | None) -> Array:
        sizes = zip(x.shape, ARGUMENTS[name], strict=False)
        return jnp.zeros([size // devices.get(what, 1) for size, what in sizes], x.dtype) if given is None else given

    def restore(given: Mapping[str, Any]) -> dict[str, Any]:
        return {name: jax.tree.map(functools.partial(restored, name), arrays[name], given[name]) for name in arrays}

    return jax.tree.map(lambda x: x if x.size else None, dict(arrays)), restore


def _check_divisible(
    arrays: Mapping[str, Any], axes: Mapping[str, tuple[str, ...]], devices: Mapping[str, int]
) -> None:
    """Raises ValueError if the devices along the axes of a dimension do not divide it."""
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
