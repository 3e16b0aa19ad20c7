"""The attention layers, and their core, over a cache, as plain functions. The Linen and the NNX modules wrap these.

`*_prefill` processes a prompt or its next chunk. `*_decode_step` adds one token or a few. Both return the output and a
new cache. `core_*` take queries, keys and values that somebody else projected; `nsa_layer_*` and `full_layer_*` project
their input themselves.

Rows of the batch may get different numbers of tokens. Of the T tokens given, the first `num_tokens` count; the outputs
of the others are finite and mean nothing. Shapes depend on T alone, so under `jax.jit` one program serves a whole
generation. If the cache is donated, XLA updates it in place.

Lengths are data. A row that outgrows its cache therefore raises an error only outside `jit`. Inside `jit`, tokens that
do not fit are dropped without a message, so the caller has to count on the host.

On a mesh, each device works on its own rows and K/V heads, and nothing of a cache is communicated. Of n devices along
`batch_axes`, device i then holds the i-th part of the rows and the i-th part of the pages. The block tables of a row
must name pages of its part, as those of a contiguous cache do: the outputs of a row that holds tokens in other pages
are NaN. If n does not divide the rows, or the pages, XLA splits the rows as it can. If the devices along `head_axes` do
not divide the K/V heads, each of them works on all heads.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from nsa_jax import arguments
from nsa_jax.arguments import describe
from nsa_jax.attention import BranchKV, decode_attention, nsa_attention, score_scale, window_attention
from nsa_jax.backends import choice, whole
from nsa_jax.cache import (
    DenseCache,
    NSACache,
    checked_cache,
    init_dense_cache,
    init_nsa_cache,
    next_compressed,
    next_positions,
    pooled_tokens,
    read_pages,
    read_ring,
    step_tokens,
    token_counts,
    with_int32,
    write_dense_tokens,
    write_nsa_tokens,
)
from nsa_jax.cache_on_devices import on_each_device, placed
from nsa_jax.config import NSAConfig, num_blocks
from nsa_jax.core import (
    Branches,
    CoreConfig,
    HeadConfig,
    checked_positions,
    compressed_tokens,
    core_inputs,
    core_on_mesh,
    gates,
    products,
    rotated_branches,
)
from nsa_jax.dense import causal_attention, dense_attention, on_gpu
from nsa_jax.explicit import split_like, split_of
from nsa_jax.layer import (
    JoinedProducts,
    LayerConfig,
    NSALayerConfig,
    join_heads,
    layer_inputs,
    layer_on_mesh,
    layer_products,
    project_branches,
    project_dense,
)
from nsa_jax.sharding import devices_along
from pallas_kernels.append_tokens.contract import Gates, Heads, Places
from pallas_kernels.differentiable import Positions
from pallas_kernels.one_row_product.contract import Norm

NumTokens = int | Int[Array, " B"] | None
Tree = TypeVar("Tree")


def core_cache(config: CoreConfig, *, dtype: DTypeLike | None = None, **sizes: Any) -> NSACache:
    """An empty cache for a core or a layer.

    On a mesh, rows and pages are split over the layer's `batch_axes` and heads over its `head_axes`, where these divide
    them. Prefill and steps keep the split of a cache. See the module's docstring for what that asks of block tables.

    Args:
      config: of the layer.
      dtype: of the computation, for a layer that takes it from its input. None: the layer's dtype, or float32 if it has
        none.
      sizes: `batch_size`, `max_length` and the other arguments of `nsa_jax.init_nsa_cache`.
    """
    return placed(init_nsa_cache(config.config, **_heads(config, dtype), **sizes), config)


def full_layer_cache(
    config: LayerConfig, *, dtype: DTypeLike | None = None, kv_dtype: DTypeLike | None = None, **sizes: Any
) -> DenseCache:
    """An empty cache for a full-attention layer; `sizes` are those of `nsa_jax.init_dense_cache`.

    Raises:
      ValueError: a `kv_dtype` is given, which only the pages of an `NSACache` have.
    """
    if kv_dtype is not None:
        raise ValueError(f"kv_dtype = {arguments.shown(kv_dtype)}: expected None, as full attention has no such cache")
    return placed(init_dense_cache(**_heads(config, dtype), **sizes), config)


@core_on_mesh(lambda given: (split_of(given["q"], 0, 1, 2), split_like(given["cache"])))
def core_prefill(
    parameters: Mapping[str, Array],
    x: Float[Array, "B T E"] | None,
    q: Float[Array, "B T H Dk"],
    k: Float[Array, "B T K Dk"] | Branches,
    v: Float[Array, "B T K Dv"] | Branches,
    cache: NSACache,
    *,
    config: CoreConfig,
    positions: Int[Array, "B T"] | None = None,
    num_tokens: NumTokens = None,
    continuing: bool = False,
) -> tuple[Float[Array, "B T H Dv"], NSACache]:
    """Processes T tokens of each row and adds them to the cache. T may be any number.

    Args:
      parameters, x, q, k, v, config: see `nsa_jax.core.core_attention`. Rows that differ in length are padded on the
        right.
      cache: of the core. What its rows hold is forgotten, unless `continuing`.
      positions: integers [B, T] at which queries and keys are rotated. None: those that follow the tokens in the cache,
        `nsa_jax.next_positions`. With a phi that has weights, they must go up by one from token to token of a row, in
        one call and from call to call, because the cache does not keep those of earlier tokens.
      num_tokens: int32 [B] (or one int), how many of the T tokens count. None: all of them.
      continuing: the tokens follow those in the cache (chunked prefill) instead of beginning a sequence. Rows that all
        stand at the same position are attended to together, and other rows one after the other.

    Returns:
      o [B, T, H, Dv], equal to the same rows of `core_attention` on the whole sequence, and the new cache.

    Raises:
      ValueError: an argument does not fit, named with what was expected.
    """
    x, q, k, v, weights = core_inputs(x, q, k, v, parameters, config)
    x, q, k, v = counted((x, q, k, v), num_tokens)
    tokens = _Tokens(q, k, v, gates(products(x, weights, config), weights, q, config), positions, num_tokens)
    return _prefill(weights, tokens, cache, config=config, continuing=continuing)


@core_on_mesh(lambda given: (split_of(given["q"], 0, 1, 2), split_like(given["cache"])))
def core_decode_step(
    parameters: Mapping[str, Array],
    x: Float[Array, "B m E"] | None,
    q: Float[Array, "B m H Dk"],
    k: Float[Array, "B m K Dk"] | Branches,
    v: Float[Array, "B m K Dv"] | Branches,
    cache: NSACache,
    *,
    config: CoreConfig,
    positions: Int[Array, "B m"] | None = None,
    num_tokens: NumTokens = None,
) -> tuple[Float[Array, "B m H Dv"], NSACache]:
    """Adds m tokens to each row, at most the cache's `step_tokens`, and reads only what they attend to.

    One token in a step is plain decoding. Several are drafts to be verified; `nsa_jax.rollback` takes back the rejected
    ones. A row with `num_tokens` 0 stays as it is. For arguments, result and errors, see `core_prefill`.
    """
    x, q, k, v, weights = core_inputs(x, q, k, v, parameters, config)
    x, q, k, v = counted((x, q, k, v), num_tokens)
    tokens = _Tokens(q, k, v, gates(products(x, weights, config), weights, q, config), positions, num_tokens)
    return _decode_step(weights, tokens, cache, config=config)


def _layer_split(given: Mapping[str, Any]) -> tuple[Any, Any]:
    """The output is split as x is, and the new cache as the old one, so that steps can be the body of a loop."""
    return split_like((given["x"], given["cache"]))


@layer_on_mesh(_layer_split)
def nsa_layer_prefill(
    parameters: Mapping[str, Array],
    x: Float[Array, "B T E"],
    cache: NSACache,
    *,
    config: NSALayerConfig,
    positions: Int[Array, "B T"] | None = None,
    num_tokens: NumTokens = None,
    continuing: bool = False,
) -> tuple[Float[Array, "B T E"], NSACache]:
    """`core_prefill` between a layer's projections.

    Returns:
      y [B, T, E], equal to the same rows of `nsa_layer` on the whole sequence, and the new cache.
    """
    weights, tokens = _projected(parameters, x, positions, num_tokens, config, for_step=False)
    o, cache = _prefill(weights, tokens, cache, config=config, continuing=continuing)
    return join_heads(o, weights, config), cache


@layer_on_mesh(_layer_split)
def nsa_layer_decode_step(
    parameters: Mapping[str, Array],
    x: Float[Array, "B m E"],
    cache: NSACache,
    *,
    config: NSALayerConfig,
    positions: Int[Array, "B m"] | None = None,
    num_tokens: NumTokens = None,
    norm: Norm | None = None,
) -> tuple[Float[Array, "B m E"], NSACache]:
    """`core_decode_step` between a layer's projections.

    With a `norm`, the layer is a pre-normalised residual block: it takes the norm of x, and its output is added to x.
    With joined projections, a kernel that multiplies one row makes both; see `nsa_jax.one_row`.
    """
    weights, tokens = _projected(parameters, x, positions, num_tokens, config, for_step=True, norm=norm)
    o, cache = _decode_step(weights, tokens, cache, config=config)
    return join_heads(o, weights, config, None if norm is None else x.astype(o.dtype)), cache


@layer_on_mesh(_layer_split)
def full_layer_prefill(
    parameters: Mapping[str, Array],
    x: Float[Array, "B T E"],
    cache: DenseCache,
    *,
    config: LayerConfig,
    window: int | None = None,
    positions: Int[Array, "B T"] | None = None,
    num_tokens: NumTokens = None,
    continuing: bool = False,
) -> tuple[Float[Array, "B T E"], DenseCache]:
    """`nsa_layer_prefill` for `full_layer`."""
    window = arguments.optional_size("window", window)
    x, weights = layer_inputs(x, parameters, config)
    before, counts = _checked(cache if continuing else _emptied(cache), DenseCache, x, num_tokens, config)
    x = counted(x, num_tokens)
    heads = project_dense(layer_products(x, weights, config), weights, _positions(before, x, positions), config)

    def attend(_: Any, heads: Any, before: DenseCache, counts: Array, config: LayerConfig) -> tuple[Array, DenseCache]:
        q, k, v = heads
        cache = write_dense_tokens(before, k, v, counts)
        if continuing:
            return _attend_densely_continuing(q, before, cache, window, config), cache
        return causal_attention(q, k, v, window=window, scale=config.scale), cache

    o, cache = on_each_device(attend, {}, heads, before, counts, config)
    return join_heads(o, weights, config), cache


@layer_on_mesh(_layer_split)
def full_layer_decode_step(
    parameters: Mapping[str, Array],
    x: Float[Array, "B m E"],
    cache: DenseCache,
    *,
    config: LayerConfig,
    window: int | None = None,
    positions: Int[Array, "B m"] | None = None,
    num_tokens: NumTokens = None,
    norm: Norm | None = None,
) -> tuple[Float[Array, "B m E"], DenseCache]:
    """`nsa_layer_decode_step` for `full_layer`. It reads the whole cache; one query per row runs on cuDNN if it can."""
    window = arguments.optional_size("window", window)
    x, weights = layer_inputs(x, parameters, config)
    before, counts = _checked(cache, DenseCache, x, num_tokens, config)
    product = layer_products(x, weights, config, norm=norm, counted=are_counted(x, num_tokens))
    heads = project_dense(product, weights, _positions(before, x, positions), config)

    def attend(_: Any, heads: Any, before: DenseCache, counts: Array, config: LayerConfig) -> tuple[Array, DenseCache]:
        q, k, v = heads
        cache = write_dense_tokens(before, k, v, counts)
        if q.shape[1] == 1 and window is None:
            return dense_attention(q, cache.k, cache.v, lengths=cache.lengths, scale=config.scale), cache
        return _attend_to_dense(q, before, cache, window, config), cache

    o, cache = on_each_device(attend, {}, heads, before, counts, config)
    return join_heads(o, weights, config, None if norm is None else x), cache


def are_counted(x: Float[Array, "B T *D"], num_tokens: NumTokens) -> Bool[Array, "B T"] | None:
    """Which tokens count, of those that x is of; None: all."""
    if num_tokens is None:
        return None
    counts = token_counts("num_tokens", num_tokens, x.shape[0])
    return jax.lax.broadcasted_iota(jnp.int32, x.shape[:2], 1) < counts[:, None]


def counted(tree: Tree, num_tokens: NumTokens) -> Tree:
    """Arrays [B, T, ...] with zeros in place of tokens that do not count, whatever these hold.

    An array that occurs several times stays one, by which `rotated_branches` knows what branches share.
    """
    if num_tokens is None:
        return tree

    def zeroed(x: Array) -> Array:
        mask = cast(Array, are_counted(x, num_tokens))
        return jnp.where(mask.reshape(*mask.shape, *(1,) * (x.ndim - 2)), x, 0)

    arrays = {id(x): x for x in jax.tree.leaves(tree)}
    of_id = {key: zeroed(x) for key, x in arrays.items()}
    return jax.tree.map(lambda x: of_id[id(x)], tree)


class _Tokens(NamedTuple):
    """The new tokens of every row, as an attention takes them: not rotated, and finite where they do not count.

    All are arrays, or queries, keys and values are `Heads` of one product, and the gates may be `Gates`.
    """

    q: Any
    k: Branches
    v: Branches
    gates: Any
    positions: Int[Array, "B T"] | None
    num_tokens: NumTokens

    @property
    def array(self) -> Array:
        """An array [B, T, ...] of them."""
        return self.q.array if isinstance(self.q, Heads) else self.q


def _projected(
    parameters: Mapping[str, Array],
    x: Float[Array, "B T E"],
    positions: Int[Array, "B T"] | None,
    num_tokens: NumTokens,
    config: NSALayerConfig,
    *,
    for_step: bool,
    norm: Norm | None = None,
) -> tuple[dict[str, Array], _Tokens]:
    """A layer's parameters in the dtype of the computation, and what it makes of its input."""
    x, weights = layer_inputs(x, parameters, config)
    product = layer_products(x, weights, config, norm=norm, counted=are_counted(x, num_tokens))
    shape = jax.ShapeDtypeStruct((*x.shape[:2], config.num_heads, config.head_dim), x.dtype)
    # `append_tokens` finds heads in a joined product, and rotates them. What else is done to them takes arrays, and so
    # does a split over devices.
    alone = config.compression == "mean" and not (config.qk_norm or config.use_bias or config.qkv_bias)
    on_one_device = devices_along(config.batch_axes) * devices_along(config.head_axes) == 1
    if for_step and alone and isinstance(product, JoinedProducts) and config.rotates_itself and on_one_device:
        q, k, v = project_branches(cast(Any, product.heads), weights, config)
        g = _gates_to_open(product, weights, config) or gates(product, weights, shape, config)
    else:
        q, k, v = project_branches(product, weights, config)
        g = gates(product, weights, shape, config)
    k, v = (x if isinstance(x, Branches) else Branches(x, x, x) for x in (k, v))
    return weights, _Tokens(q, k, v, g, positions, num_tokens)


def _gates_to_open(product: JoinedProducts, weights: Mapping[str, Array], config: CoreConfig) -> Gates | None:
    """Gates that `append_tokens` opens in the precision that it has; None if it shall not."""
    if config.constant_gates is not None or config.precision is not None:
        return None
    in_bias, out_kernel, out_bias = (weights[f"gate_{name}"] for name in ("in_bias", "out_kernel", "out_bias"))
    return Gates(product.heads("gate_in_kernel"), in_bias, out_kernel, out_bias)


def _prefill(
    weights: Mapping[str, Array], tokens: _Tokens, cache: NSACache, *, config: CoreConfig, continuing: bool
) -> tuple[Float[Array, "B T H Dv"], NSACache]:
    """See `core_prefill`."""
    cache, counts = _checked(cache if continuing else _emptied(cache), NSACache, tokens.q, tokens.num_tokens, config)
    _check_pages(cache, config)

    def attend(phi: Any, tokens: Any, before: NSACache, counts: Array, config: CoreConfig) -> tuple[Array, NSACache]:
        q, new, cache = _take_in(phi, tokens, before, counts, config, continuing=continuing)
        if continuing:
            return _attend_continuing(q, new, before, cache, tokens.gates, config), cache
        return nsa_attention(q, new, tokens.gates, **_op_options(config)), cache

    return on_each_device(attend, _of_phi(weights), tokens._replace(num_tokens=None), cache, counts, config)


def _decode_step(
    weights: Mapping[str, Array], tokens: _Tokens, cache: NSACache, *, config: CoreConfig
) -> tuple[Float[Array, "B m H Dv"], NSACache]:
    """See `core_decode_step`."""
    cache, counts = _checked(cache, NSACache, tokens.array, tokens.num_tokens, config)
    _check_pages(cache, config)
    if tokens.array.shape[1] > step_tokens(cache, config.config):
        raise ValueError(
            f"q: {describe(tokens.array)}: expected at most {step_tokens(cache, config.config)} tokens a row, the "
            f"cache's step_tokens; prefill takes more"
        )

    def attend(phi: Any, tokens: Any, before: NSACache, counts: Array, config: CoreConfig) -> tuple[Array, NSACache]:
        q, gates, cache = _append(phi, tokens, before, counts, config)
        o, _ = decode_attention(q, cache, gates, before.lengths, **_op_options(config))
        return o, cache

    return on_each_device(attend, _of_phi(weights), tokens._replace(num_tokens=None), cache, counts, config)


def _of_phi(weights: Mapping[str, Array]) -> dict[str, Array]:
    return {name: value for name, value in weights.items() if name.startswith("phi_")}


def _take_in(
    weights: Mapping[str, Array],
    tokens: _Tokens,
    cache: NSACache,
    num_tokens: Int[Array, " B"],
    config: CoreConfig,
    *,
    continuing: bool,
) -> tuple[Float[Array, "B T H Dk"], BranchKV, NSACache]:
    """Rotated queries, keys and values of the new tokens (and the compressed tokens they may finish), and the cache."""
    positions = _positions(cache, tokens.q, tokens.positions)
    q, new = rotated_branches(*tokens[:3], positions, config)
    pooled = (new.cmp_k, new.cmp_v)
    if continuing:
        compressed = _finished(weights, pooled, cache, positions, config)
    else:
        compressed = compressed_tokens(weights, *pooled, positions, config)
    selected, window = (new.slc_k, new.slc_v), (new.win_k, new.win_v)
    cache = write_nsa_tokens(cache, pooled, compressed, selected, window, num_tokens, config=config.config)
    return q, new._replace(cmp_k=compressed[0], cmp_v=compressed[1]), cache


def _append(
    weights: Mapping[str, Array], tokens: _Tokens, cache: NSACache, num_tokens: Int[Array, " B"], config: CoreConfig
) -> tuple[Float[Array, "B m H Dk"], Float[Array, "B m H 3"], NSACache]:
    """`_take_in` of a decoding step, and its gates: in place and in one kernel if a backend has it.

    A phi that is a mean belongs to it.
    """
    positions = _positions(cache, tokens.array, tokens.positions)
    finished: tuple[Array | None, Array | None] = (None, None)
    if isinstance(tokens.q, Heads):
        assert isinstance(config, NSALayerConfig)
        given, rotation = tokens.q, config.rotation(positions, tokens.array.dtype)
        new: list[Any] = [heads for pair in zip(tokens.k, tokens.v, strict=True) for heads in pair]
    else:
        q, kv = rotated_branches(*tokens[:3], positions, config)
        given, rotation = None, None
        new = [Heads(x.reshape(*x.shape[:2], -1)) for x in kv]
        if config.compression != "mean":
            finished = _finished(weights, (kv.cmp_k, kv.cmp_v), cache, positions, config)
    places = Places._make(cache[: len(Places._fields)])
    gates = tokens.gates if isinstance(tokens.gates, Gates) else None
    inputs = (given, *new, *finished, rotation, gates, places, cache.lengths, num_tokens, cache.block_tables)
    implementation = choice.implementation_with("append_tokens", config.implementation)

    def attempt(backend: Any) -> tuple[Array | None, Array | None, Places]:
        return backend.append_tokens(*inputs, config=config.config, num_heads=config.num_heads)

    known = (places.tail_k, places.tail_k, places.tail_v)
    rotated, opened, places = choice.first_that_takes("append_tokens", implementation, known, attempt)
    cache = cache._replace(**places._asdict(), lengths=cache.lengths + num_tokens)
    return q if rotated is None else rotated, tokens.gates if opened is None else opened, cache


def _finished(
    weights: Mapping[str, Array],
    pooled: tuple[Float[Array, "B T K Dk"], Float[Array, "B T K Dv"]],
    cache: NSACache,
    positions: Int[Array, "B T"],
    config: CoreConfig,
) -> tuple[Float[Array, "B C K Dk"], Float[Array, "B C K Dv"]]:
    """The compressed tokens that new tokens may finish, beginning with the one that each row finishes next."""
    sizes, tails = config.config, (cache.tail_k, cache.tail_v)
    k, v = (pooled_tokens(ring, x, cache.lengths, sizes) for ring, x in zip(tails, pooled, strict=True))
    # Positions go up by one from token to token, also from those in the tail to the new ones.
    first = positions[:, 0] - cache.lengths + next_compressed(cache.lengths, sizes) * sizes.compress_stride
    positions = first[:, None] + jnp.arange(k.shape[1], dtype=jnp.int32)[None, :]
    return compressed_tokens(weights, k, v, positions, config)


def _attend_continuing(
    q: Float[Array, "B T H Dk"],
    new: BranchKV,
    before: NSACache,
    after: NSACache,
    gates: Float[Array, "B T H 3"],
    config: CoreConfig,
) -> Float[Array, "B T H Dv"]:
    """NSA of a chunk that follows the tokens in `before`: that of whole sequences, over the rows' pages in order."""
    T, sizes, w = q.shape[1], config.config, config.config.window
    finished = next_compressed(after.lengths, sizes)
    # The chunk may have overwritten entries of the ring that its first queries see. Read them from `before`. Nothing
    # sees the place that is added in front, with which the chunk's queries begin at w.
    first = before.lengths - (w - 1)
    ring = ((before.win_k, new.win_k), (before.win_v, new.win_v)) if w else ()
    near = tuple(
        jnp.concatenate([jnp.pad(read_ring(old, first, w - 1), ((0, 0), (1, 0), (0, 0), (0, 0))), x], axis=1)
        for old, x in ring
    )
    starts = jnp.broadcast_to(jnp.maximum(w - before.lengths, 0)[:, None], q.shape[:2])
    # Padding of the chunk may lie beyond the last page, so add entries for keys that no query sees.
    tables = jnp.pad(after.block_tables, ((0, 0), (0, num_blocks(T, sizes))))

    def pages(pool: Any, tables: Array, held: Array) -> Array:
        return read_pages(pool, tables, held).astype(q.dtype)

    def attend(offset: Array, rows: Any) -> Array:
        q, gates, near, starts, lengths, finished, tables = rows
        cmp = tuple(pages(pool, tables, finished) for pool in (after.cmp_k, after.cmp_v))
        slc = tuple(pages(pool, tables, lengths) for pool in (after.slc_k, after.slc_v) if sizes.num_selected)
        kv = BranchKV(*cmp, *(slc or near or cmp), *(near or slc or cmp))
        places = (Positions(None, offset), Positions(starts, w))
        return whole.nsa_attention(
            q, kv, gates, *places, config.implementation, config=sizes, scale=score_scale(q, config.scale)
        )

    rows = (q, gates, near, starts, after.lengths, finished, tables)
    return _by_position(attend, before.lengths, rows)


def _by_position(
    attend: Callable[[Int[Array, ""], Tree], Array], lengths: Int[Array, " B"], rows: Tree
) -> Float[Array, "B ..."]:
    """attend(position, rows), where all rows stand at one position: all at once if they do, or one after the other."""

    def together(lengths: Array, rows: Tree) -> Array:
        return attend(lengths[0], rows)

    def one_after_the_other(lengths: Array, rows: Tree) -> Array:
        def one_row(row: tuple[Array, Tree]) -> Array:
            return attend(row[0], jax.tree.map(lambda x: x[None], row[1]))[0]

        return jax.lax.map(one_row, (lengths, rows))

    if lengths.shape[0] == 1:
        return together(lengths, rows)
    if not isinstance(lengths, jax.core.Tracer):
        known = np.asarray(lengths)
        return (together if (known == known[0]).all() else one_after_the_other)(lengths, rows)
    return jax.lax.cond(jnp.all(lengths == lengths[0]), together, one_after_the_other, lengths, rows)


def _attend_densely_continuing(
    q: Float[Array, "B T H Dk"], before: DenseCache, after: DenseCache, window: int | None, config: LayerConfig
) -> Float[Array, "B T H Dv"]:
    """`_attend_to_dense` of a chunk of a prompt.

    On a GPU, XLA would write the scores of all keys for every query. CuDNN's causal attention takes the first query and
    the first key for the same position. So this is our own window attention there, with a window over all keys.
    """
    if window is None and not on_gpu():
        return _attend_to_dense(q, before, after, window, config)
    T, S = q.shape[1], after.k.shape[1]
    sizes = NSAConfig(window=S + T if window is None else window)
    # Padding of the chunk may lie beyond the cache, so add keys that no query sees.
    exists = jnp.arange(S + T, dtype=jnp.int32)[None, :] < after.lengths[:, None]

    def padded(x: Array) -> Array:
        return jnp.where(exists[:, :, None, None], jnp.pad(x, ((0, 0), (0, T), (0, 0), (0, 0))), 0)

    def attend(offset: Array, rows: tuple[Array, ...]) -> Array:
        return window_attention(*rows, config=sizes, scale=config.scale, query_offset=offset)

    return _by_position(attend, before.lengths, (q, padded(after.k), padded(after.v)))


def _attend_to_dense(
    q: Float[Array, "B T H Dk"], before: DenseCache, after: DenseCache, window: int | None, config: LayerConfig
) -> Float[Array, "B T H Dv"]:
    """Causal attention, windowed or not, of the newest tokens to everything in the cache."""
    position = (before.lengths[:, None] + jnp.arange(q.shape[1], dtype=jnp.int32)[None, :])[:, None, :, None]
    key = jnp.arange(after.k.shape[1], dtype=jnp.int32)[None, None, None, :]
    mask = key <= position
    if window is not None:
        mask &= key > position - window
    return dense_attention(q, after.k, after.v, mask=mask, lengths=after.lengths, scale=config.scale)


def _heads(config: HeadConfig, dtype: DTypeLike | None) -> dict[str, Any]:
    return {
        "num_kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "v_head_dim": config.v_head_dim,
        "dtype": dtype or config.dtype or jnp.float32,
    }


def _emptied(cache: Any) -> Any:
    """A cache of the same shapes that holds nothing. A dense one is cleared, because cuDNN may read past a length."""
    cache = with_int32(cache)
    cache = cache._replace(lengths=jnp.zeros_like(cache.lengths))
    if isinstance(cache, DenseCache):
        cache = cache._replace(k=jnp.zeros_like(cache.k), v=jnp.zeros_like(cache.v))
    return cache


def _positions(cache: NSACache | DenseCache, x: Array, positions: Array | None) -> Int[Array, "B T"]:
    """The positions given, or those that follow the tokens in the cache."""
    if positions is None:
        return next_positions(cache, x.shape[1])
    return checked_positions(positions, *x.shape[:2])


def _op_options(config: CoreConfig) -> dict[str, Any]:
    return {"config": config.config, "scale": config.scale, "implementation": config.implementation}


def _checked(
    cache: Any, kind: type, x: Array, num_tokens: NumTokens, config: HeadConfig
) -> tuple[Any, Int[Array, " B"]]:
    """The cache, and how many tokens of each row of `x` [B, T, ...] count."""
    if devices_along(config.context_axes) > 1:
        raise ValueError(f"context_axes = {config.context_axes!r}: a cache's tokens are not split over devices")
    sizes = {"K": config.num_kv_heads, "Dk": config.head_dim, "Dv": config.value_dim}
    return checked_cache(cache, kind, x, num_tokens, **sizes)


def _check_pages(cache: NSACache, config: CoreConfig) -> None:
    s, d = config.config.select_block, config.config.compress_stride
    if (cache.slc_k.shape[2], cache.cmp_k.shape[2]) != (s, s // d):
        raise ValueError(
            f"cache has pages of {cache.slc_k.shape[2]} tokens and {cache.cmp_k.shape[2]} compressed tokens: "
            f"expected select_block = {s} and select_block / compress_stride = {s // d}"
        )
    if step_tokens(cache, config.config) < 1:
        raise ValueError(
            f"cache has rings of {cache.win_k.shape[1]} and {cache.tail_k.shape[1]} positions: expected at least "
            f"window = {config.config.window} and compress_block = {config.config.compress_block}"
        )
