"""Caches over a mesh: each device works on its own rows and K/V heads, and nothing of a cache is communicated.

Of n devices along `batch_axes`, device i holds the i-th part of the rows and of the pages; see `nsa_jax.decoding`.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from nsa_jax.cache import POOLS, DenseCache, NSACache
from nsa_jax.core import HeadConfig
from nsa_jax.sharding import devices_along, free_axes, on_devices, place

AnyCache = TypeVar("AnyCache", NSACache, DenseCache)
Axes = tuple[tuple[str, ...], tuple[str, ...]]  # mesh axes that split rows, and those that split heads


def placed(cache: AnyCache, config: HeadConfig) -> AnyCache:
    """The cache, split over the mesh in context."""
    over_rows, over_heads = _axes_that_divide(cache, config)
    splits = _splits_of_cache(cache, (over_rows, over_heads))
    if not over_rows and cache.lengths.shape[0] % devices_along(config.batch_axes) == 0:  # every device has all pages
        pools = {name: getattr(splits, name) for name in POOLS if isinstance(splits, NSACache)}
        splits = _splits_of_cache(cache, (free_axes(config.batch_axes), over_heads))._replace(**pools)

    def place_all(name: str, x: Any) -> Any:
        return jax.tree.map(functools.partial(place, split=getattr(splits, name)), x)

    return cache._replace(**{name: place_all(name, x) for name, x in cache._asdict().items()})


def _axes_that_divide(cache: NSACache | DenseCache, config: HeadConfig) -> Axes:
    """The mesh axes of a layer over which the rows (and pages) and the heads of a cache can be split."""
    pages, heads = cache.cmp_k.shape[:2] if isinstance(cache, NSACache) else cache.k.shape[:3:2]
    over_rows, over_heads = free_axes(config.batch_axes), free_axes(config.head_axes)
    rows = devices_along(over_rows)
    if rows > 1 and (cache.lengths.shape[0] % rows or pages % rows):
        over_rows = ()
    return over_rows, over_heads if heads % devices_along(over_heads) == 0 else ()


def _splits_of_cache(cache: AnyCache, axes: Axes) -> AnyCache:
    """How the arrays of a cache are split."""
    rows, heads = (some or None for some in axes)
    splits = {name: PartitionSpec(rows) for name in ("lengths", "block_tables")}
    splits |= {name: PartitionSpec(rows, heads) for name in POOLS}
    of_fields: Any = (splits.get(name, PartitionSpec(rows, None, heads)) for name in cache._fields)
    return type(cache)(*of_fields)


def on_each_device(
    attend: Callable[[Any, Any, AnyCache, Int[Array, " B"], Any], tuple[Array, AnyCache]],
    phi: Mapping[str, Array],
    tokens: Any,
    cache: AnyCache,
    counts: Int[Array, " B"],
    config: HeadConfig,
) -> tuple[Float[Array, "B T H Dv"], AnyCache]:
    """attend(phi, tokens, cache, counts, config), of which each device computes the part of its own rows and heads.

    Args:
      attend: returns the output and the cache with the new tokens.
      phi: parameters that all heads share.
      tokens: a tree of arrays [B, T, heads, ...] and [B, T], of the new tokens.
      cache: before these tokens.
      counts: how many of them count.
      config: of the layer; `attend` gets that of a layer with a device's heads.
    """
    axes = rows, heads = _axes_that_divide(cache, config)
    if not rows + heads:
        return attend(phi, tokens, cache, counts, config)
    devices = devices_along(heads)
    own = dataclasses.replace(
        config,
        num_heads=config.num_heads // devices,
        num_kv_heads=config.num_kv_heads // devices,
        batch_axes=(),
        head_axes=(),
    )
    # An array that branches share is one argument, so that it stays one.
    arrays = {id(x): x for x in jax.tree.leaves(tokens)}
    index = {key: i for i, key in enumerate(arrays)}

    # XLA crashes on JAX 0.11 where one of several arrays has no elements, as those of a branch that is off.
    empty = {name: x for name, x in cache._asdict().items() if not any(part.size for part in jax.tree.leaves(x))}
    none: Any = dict.fromkeys(empty)
    splits = _splits_of_cache(cache, axes)

    def own_part(name: str, x: Array) -> jax.ShapeDtypeStruct:
        sizes = itertools.zip_longest(x.shape, getattr(splits, name))
        return jax.ShapeDtypeStruct([size // devices_along(over) for size, over in sizes], x.dtype)

    own_empty = {name: jax.tree.map(functools.partial(own_part, name), x) for name, x in empty.items()}

    def run(phi: Any, arrays: list[Array], cache: Any, counts: Array) -> tuple[Array, Any]:
        given = jax.tree.map(lambda x: arrays[index[id(x)]], tokens)
        cache = cache._replace(**jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), own_empty))
        after: Any
        o, after = attend(phi, given, cache if not rows else _with_own_pages(cache, rows), counts, own)
        if rows and isinstance(cache, NSACache):
            first = jnp.arange(cache.block_tables.shape[1], dtype=jnp.int32)[None, :] * cache.slc_k.shape[2]
            elsewhere = (cache.block_tables >= 0) & (after.block_tables < 0) & (first < after.lengths[:, None])
            o = jnp.where(jnp.any(elsewhere, axis=1)[:, None, None, None], jnp.nan, o)
            after = after._replace(block_tables=cache.block_tables)
        return o, after._replace(**none)

    of_rows, of_heads = PartitionSpec(rows or None), PartitionSpec(rows or None, None, heads or None)
    of_cache = splits._replace(**none)
    of_arrays = [of_heads if x.ndim == 4 else of_rows for x in arrays.values()]
    o, after = on_devices(
        run,
        (dict(phi), list(arrays.values()), cache._replace(**none), counts),
        splits=(PartitionSpec(), of_arrays, of_cache, of_rows),
        results=(of_heads, of_cache),
        axes=rows + heads,
    )
    return o, after._replace(**empty)


def _with_own_pages(cache: Any, axes: tuple[str, ...]) -> Any:
    """A device's part of a cache whose pages are split over mesh axes, with block tables that count its own pages."""
    if not isinstance(cache, NSACache):
        return cache
    pages = cache.cmp_k.shape[0]
    tables = cache.block_tables - jax.lax.axis_index(axes) * pages
    return cache._replace(block_tables=jnp.where((tables >= 0) & (tables < pages), tables, -1))
