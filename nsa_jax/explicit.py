"""Explicit mesh axes, which `jax.make_mesh` gives by default: functions run there as they do on Auto axes.

On an Explicit axis, the type of an array says how it is split, and JAX asks of many operations how their results are.
Functions of this package say it once, for their results. Inside, XLA splits the work, as it does on Auto axes.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar, cast

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

Function = TypeVar("Function", bound=Callable[..., Any])


def on_auto_axes(results: Callable[[Mapping[str, Any]], Any]) -> Callable[[Function], Function]:
    """A decorator for a function that is not told how its arguments are split over Explicit axes.

    If an argument lies on a mesh with Explicit axes, these are Auto axes inside. On any other mesh, and on none, the
    function is called as it is.

    Args:
      results: results(arguments by name) says how the results are split: a tree of `PartitionSpec`.
    """

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            leaves, structure = jax.tree.flatten((args, kwargs))
            arrays = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array | np.ndarray)}
            mesh = _mesh_of(arrays.values())
            if mesh is None:
                return function(*args, **kwargs)

            def run(arrays: dict[int, Any]) -> Any:
                both = [arrays.get(i, leaf) for i, leaf in enumerate(leaves)]
                args, kwargs = jax.tree.unflatten(structure, both)
                return function(*args, **kwargs)

            split = results(signature.bind(*args, **kwargs).arguments)
            with _in_context(mesh, arrays.values()):
                return jax.sharding.auto_axes(run, axes=_explicit_axes(mesh), out_sharding=split)(arrays)

        return cast(Function, call)

    return decorate


def split_of(x: Any, *dimensions: int) -> PartitionSpec:
    """The mesh axes that split some of an array's dimensions, by its type: None where none does, or none is known."""
    spec: tuple[Any, ...] = ()
    if isinstance(x, jax.Array | np.ndarray):
        spec = tuple(jax.typeof(x).sharding.spec)
    return PartitionSpec(*(spec[i] if i < len(spec) else None for i in dimensions))


def split_like(tree: Any) -> Any:
    """How the arrays of a tree are split, by their types."""
    return jax.tree.map(lambda x: split_of(x, *range(np.ndim(x))), tree)


def in_explicit_mesh() -> bool:
    """Whether the mesh in context has Explicit axes."""
    return bool(_explicit_axes(jax.sharding.get_abstract_mesh()))


def _explicit_axes(mesh: AbstractMesh) -> tuple[str, ...]:
    return tuple(name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit)


def _in_context(mesh: AbstractMesh, arrays: Iterable[Any]) -> Any:
    """The mesh as the one in context. Outside `jit` JAX has to know the devices, too, which arrays have."""
    if jax.sharding.get_abstract_mesh().axis_names:
        return contextlib.nullcontext()
    concrete = (x.sharding for x in arrays if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer))
    for sharding in concrete:
        if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
            return jax.set_mesh(sharding.mesh)
    return jax.sharding.use_abstract_mesh(mesh)


def _mesh_of(arrays: Iterable[Any]) -> AbstractMesh | None:
    """The mesh with Explicit axes on which arrays lie: the one in context, or without it, that of their types."""
    around = jax.sharding.get_abstract_mesh()
    meshes = [around] if around.axis_names else [jax.typeof(x).sharding.mesh for x in arrays]
    return next((mesh for mesh in meshes if _explicit_axes(mesh)), None)
