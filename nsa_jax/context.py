"""Context parallelism: the ops for a sequence whose tokens lie on several devices. They run inside `jax.shard_map`.

`nsa_jax.sharding.sharded` with `context_axes` calls these functions; see there for how to use them.

*Layout.* With C devices the sequence is cut into 2 C chunks. Device r holds chunks r and 2 C - 1 - r, one after the
other. This is zigzag order, in which the queries of every device see equally many keys. `to_zigzag` brings tokens into
this order. It is needed once, before the model, because everything else in a model treats each token alone.

*What a device receives* for one layer of Native Sparse Attention, per row of its batch, counted in numbers of the size
of a key's. H query heads and K key/value heads are those of the device, and D = Dk + Dv:

    compressed keys and values    (C - 1) / C * T / d * K D    all-gather, for all heads at once
    selected keys and values      (C - 1) / C * T * K D        all-gather, one K/V head after the other
    window                        2 w K D                      from the devices that hold the chunks before
    phi (`compress`)              2 (l - d) K D                from the devices that hold the chunks after

If there are segments, it also receives (C - 1) / C * T int32 segment ids each time an op needs them. A device holds the
full keys and values of one head at a time. The backward pass receives the selected keys and values once more, because
they are not kept. Then it sends the gradients of everything above the other way, by reduce-scatters instead of
all-gathers.

*Full attention* exchanges heads for tokens and back, by all-to-all, both forward and for the gradients:

    queries and outputs           (C - 1) / C * T / C * H D              a little more if C does not divide H
    keys and values               (C - 1) / C * T / C * lcm(K, C) D

`received_bytes` computes the sum.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import PrecisionLike
from jaxtyping import Array, Float, Int

from nsa_jax import arguments, attention, compression, dense, visibility
from nsa_jax.attention import BranchKV, Implementation
from nsa_jax.backends import choice, whole
from nsa_jax.compression import Compression
from nsa_jax.config import NSAConfig, check_config, num_compressed
from nsa_jax.precision import wide_dtype
from nsa_jax.remat import save_attention
from pallas_kernels.differentiable import Positions

Axes = tuple[str, ...]
Chunks = tuple[Array, Array]  # a device's early chunk and its late one


def zigzag_order(T: int, devices: int) -> np.ndarray:
    """For each place in zigzag order, the position of the token that lies there: int32 [T].

    Example:
      >>> zigzag_order(8, 2).tolist()
      [0, 1, 6, 7, 2, 3, 4, 5]

    Raises:
      ValueError: T is not a multiple of 2 * `devices`.
    """
    T, devices = arguments.size("T", T, least=0), arguments.size("devices", devices)
    if T % (2 * devices):
        raise ValueError(f"T = {T}: expected a multiple of 2 * devices = {2 * devices}, two chunks for each device")
    chunks = np.arange(T, dtype=np.int32).reshape(2 * devices, -1)
    return np.stack([chunks[:devices], chunks[devices:][::-1]], axis=1).reshape(T)


def to_zigzag(x: Any, devices: int, axis: int = 1) -> Any:
    """A NumPy or JAX array whose tokens along `axis` are brought from the order of positions into zigzag order."""
    x = x if isinstance(x, jax.Array | np.ndarray) else np.asarray(x)
    return x.take(zigzag_order(x.shape[axis], devices), axis=axis)


def from_zigzag(x: Any, devices: int, axis: int = 1) -> Any:
    """The inverse of `to_zigzag`."""
    x = x if isinstance(x, jax.Array | np.ndarray) else np.asarray(x)
    return x.take(np.argsort(zigzag_order(x.shape[axis], devices)), axis=axis)


def received_bytes(
    kind: Literal["nsa", "full", "window"],
    config: NSAConfig,
    *,
    T: int,
    devices: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    v_head_dim: int,
    itemsize: int,
) -> int:
    """Bytes that a device receives for one layer's forward pass of one row without segments; see the module.

    Args:
      kind: "nsa", "full" (causal attention) or "window" (causal attention with the window of `config`).
      config: sizes of the branches.
      T: tokens of the sequence.
      devices: C, the devices along the context axes.
      num_heads, num_kv_heads: H and K of one device.
      head_dim, v_head_dim: Dk and Dv.
      itemsize: bytes of a number.
    """
    if kind not in ("nsa", "full", "window"):
        raise ValueError(f"kind = {kind!r}: expected one of nsa, full, window")
    check_config(config)
    T, devices = arguments.size("T", T), arguments.size("devices", devices)
    if devices == 1:
        return 0
    others = (devices - 1) * (T // devices)  # tokens on other devices
    pair = head_dim + v_head_dim
    if kind == "full":
        copies, group = head_exchange(num_heads, num_kv_heads, devices)
        heads = num_kv_heads * copies // devices  # for which a device attends
        return others * heads * (1 + group) * pair * itemsize
    tokens = 2 * _window_reach(config, T, devices)
    if kind == "nsa":
        tokens += others // config.compress_stride + 2 * (config.compress_block - config.compress_stride)
        tokens += others if config.num_selected else 0
    return tokens * num_kv_heads * pair * itemsize


def nsa_attention(
    q: Float[Array, "B S H Dk"],
    kv: BranchKV,
    gates: Float[Array, "B S H 3"],
    *,
    axes: Axes,
    config: NSAConfig,
    scale: float | None = None,
    segment_ids: Int[Array, "B S"] | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "B S H Dv"]:
    """`nsa_jax.nsa_attention` of a device's S = T / C tokens, with the compressed tokens from `compress` below."""
    devices, S = jax.lax.axis_size(axes), q.shape[1]
    Nc = num_compressed(S * devices, config)
    kv = kv._replace(cmp_k=_whole(kv.cmp_k, axes)[:, :Nc], cmp_v=_whole(kv.cmp_v, axes)[:, :Nc])
    attention.checked_branches(q, kv, gates, config, parts=devices)
    places = _places(segment_ids, S, axes)
    w = _window_reach(config, S * devices, devices)
    near = [_with_tokens_before(x, w, axes) for x in (kv.win_k, kv.win_v)]
    near_places = [_place_among_near(place, w, q) for place in places]
    options: dict[str, Any] = {"config": config, "scale": attention.score_scale(q, scale)}

    def one_head(q: Array, gates: Array, kv: BranchKV, near: list[Chunks]) -> Array:
        slc_k, slc_v = kv.slc_k, kv.slc_v
        if config.num_selected:
            slc_k, slc_v = _whole(slc_k, axes), _whole(slc_v, axes)
        outputs = []
        for i, (part, part_gates) in enumerate(zip(_chunks(q), _chunks(gates), strict=True)):
            part_kv = BranchKV(kv.cmp_k, kv.cmp_v, slc_k, slc_v, *(x[i] for x in near))
            outputs.append(
                whole.nsa_attention(part, part_kv, part_gates, places[i], near_places[i], implementation, **options)
            )
        return jnp.concatenate(outputs, axis=1)

    return _by_kv_head(one_head, kv.slc_k.shape[2], q, gates, kv, near)


def window_attention(
    q: Float[Array, "B S H Dk"],
    k: Float[Array, "B S K Dk"],
    v: Float[Array, "B S K Dv"],
    *,
    axes: Axes,
    config: NSAConfig,
    scale: float | None = None,
    segment_ids: Int[Array, "B S"] | None = None,
    return_lse: bool = False,
    implementation: Implementation | None = None,
) -> Any:
    """`nsa_jax.window_attention` of a device's S = T / C tokens, with the w tokens before each of its chunks."""
    attention.checked_attention(q, k, v, config)
    S, devices, scale = q.shape[1], jax.lax.axis_size(axes), attention.score_scale(q, scale)
    w = _window_reach(config, S * devices, devices)
    keys, values = (_with_tokens_before(x, w, axes) for x in (k, v))
    places = [_place_among_near(place, w, q) for place in _places(segment_ids, S, axes)]
    options: dict[str, Any] = {"config": config, "scale": scale, "return_lse": return_lse}
    results = [
        choice.run("window_attention", implementation, (part, key, value, *place), **options)
        for part, key, value, place in zip(_chunks(q), keys, values, places, strict=True)
    ]
    if not return_lse:
        return jnp.concatenate(results, axis=1)
    outputs, sums = zip(*results, strict=True)
    return jnp.concatenate(outputs, axis=1), jnp.concatenate(sums, axis=2)


def causal_attention(
    q: Float[Array, "B S H Dk"],
    k: Float[Array, "B S K Dk"],
    v: Float[Array, "B S K Dv"],
    *,
    axes: Axes,
    window: int | None = None,
    scale: float | None = None,
    segment_ids: Int[Array, "B S"] | None = None,
) -> Float[Array, "B S H Dv"]:
    """`nsa_jax.dense.causal_attention` of a device's S = T / C tokens.

    With a window it is `window_attention`. Without a window, devices exchange heads for tokens, as in DeepSpeed-Ulysses
    (arXiv 2309.14509). Each device attends with H / C of the query heads over the whole sequence, in one call of the
    same dense attention as on one device, and sends the outputs back. If C does not divide K, K/V heads are repeated,
    and each copy serves some of the head's query heads. If these cannot be shared out evenly, heads of zeros fill up.
    """
    if window is not None:
        sizes = NSAConfig(window=window)
        return window_attention(q, k, v, axes=axes, config=sizes, scale=scale, segment_ids=segment_ids)
    attention.checked_attention(q, k, v, NSAConfig())
    (B, S, H, Dk), K, devices = q.shape, k.shape[2], jax.lax.axis_size(axes)
    repeats, group = head_exchange(H, K, devices)
    q = q.reshape(B, S, K, H // K, Dk)
    q = jnp.pad(q, ((0, 0),) * 3 + ((0, repeats * group - H // K), (0, 0)))
    q = _heads_to_tokens(q.reshape(B, S, K * repeats * group, Dk), axes)
    wide = wide_dtype(q.dtype)  # the gradients of the copies are summed in this dtype
    copies = (jnp.repeat(x.astype(wide), repeats, axis=2).astype(x.dtype) for x in (k, v))
    k, v = (_heads_to_tokens(x, axes) for x in copies)
    whole = None if segment_ids is None else _whole(segment_ids, axes)
    o = _tokens_to_heads(dense.causal_attention(q, k, v, scale=scale, segment_ids=whole), axes)
    o = o.reshape(B, S, K, repeats * group, o.shape[-1])[:, :, :, : H // K]
    return o.reshape(B, S, H, v.shape[-1])


def head_exchange(num_heads: int, num_kv_heads: int, devices: int) -> tuple[int, int]:
    """How `causal_attention` shares out heads over devices: (copies of each K/V head, query heads of each copy).

    Example:
      >>> head_exchange(16, 1, 2), head_exchange(16, 4, 2), head_exchange(12, 4, 8), head_exchange(9, 3, 2)
      ((2, 8), (1, 4), (2, 2), (2, 2))
    """
    repeats = devices // math.gcd(num_kv_heads, devices)
    return repeats, -(-(num_heads // num_kv_heads) // repeats)


def compress(
    x: Float[Array, "B S K D"],
    parameters: Mapping[str, Array] | None = None,
    *,
    axes: Axes,
    config: NSAConfig,
    method: Compression = "mean",
    precision: PrecisionLike = None,
) -> Float[Array, "B S/d K D"]:
    """`nsa_jax.compress` of a device's S = T / C tokens: the compressed tokens that begin among them.

    The device receives the first l - d tokens of the chunk after each of its own. Unlike `nsa_jax.compress`, this
    returns one compressed token for every stride. The last l / d - 1 of the sequence stand for tokens beyond its end,
    and no query sees them.

    Raises:
      ValueError: a chunk is not a multiple of d, or is shorter than l - d.
    """
    l, d, chunk = config.compress_block, config.compress_stride, x.shape[1] // 2  # noqa: E741
    if chunk % d or chunk < l - d:
        raise ValueError(
            f"x: chunks of {chunk} tokens, two for each of {jax.lax.axis_size(axes)} devices: expected a multiple of "
            f"config.compress_stride = {d}, and at least config.compress_block - config.compress_stride = {l - d}"
        )
    early, late = _chunks(x)
    after = _chunks_after((early[:, : l - d], late[:, : l - d]), axes)
    blocks = jnp.concatenate([jnp.concatenate([early, after[0]], axis=1), jnp.concatenate([late, after[1]], axis=1)])
    compressed = compression.compress(blocks, parameters, config=config, method=method, precision=precision)
    return jnp.concatenate(jnp.split(compressed, 2), axis=1)


def segment_positions(segment_ids: Int[Array, "B S"], *, axes: Axes) -> Int[Array, "B S"]:
    """`nsa_jax.visibility.segment_positions` of a device's S = T / C tokens."""
    positions = visibility.segment_positions(_whole(segment_ids, axes))
    chunk = segment_ids.shape[1] // 2
    begins = chunk_begins(segment_ids.shape[1], axes)
    return jnp.concatenate([jax.lax.dynamic_slice_in_dim(positions, begin, chunk, axis=1) for begin in begins], axis=1)


def chunk_begins(S: int, axes: Axes) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """Positions of the first tokens of the two chunks of this device, which holds S tokens."""
    index, last = jax.lax.axis_index(axes), 2 * jax.lax.axis_size(axes) - 1
    return index * (S // 2), (last - index) * (S // 2)


def _chunks(x: Array) -> Chunks:
    return x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 :]


def _whole(x: Float[Array, "B S ..."], axes: Axes) -> Float[Array, "B T ..."]:
    """The whole sequence, in the order of positions."""
    return _by_position(jax.lax.all_gather(x, axes, axis=1, tiled=True), jax.lax.axis_size(axes))


def _heads_to_tokens(x: Float[Array, "B S N D"], axes: Axes) -> Float[Array, "B T N/C D"]:
    """All devices' tokens, in the order of positions, of this device's share of the heads."""
    gathered = jax.lax.all_to_all(x, axes, split_axis=2, concat_axis=1, tiled=True)
    return _by_position(gathered, jax.lax.axis_size(axes))


def _tokens_to_heads(x: Float[Array, "B T N/C D"], axes: Axes) -> Float[Array, "B S N D"]:
    """The inverse of `_heads_to_tokens`."""
    B, T, *rest = x.shape
    devices = jax.lax.axis_size(axes)
    chunks = x.reshape(B, 2, devices, T // (2 * devices), *rest)
    zigzag = jnp.stack([chunks[:, 0], chunks[:, 1, ::-1]], axis=2).reshape(x.shape)
    return jax.lax.all_to_all(zigzag, axes, split_axis=1, concat_axis=2, tiled=True)


def _by_position(x: Float[Array, "B T ..."], devices: int) -> Float[Array, "B T ..."]:
    """`from_zigzag`, by moving whole chunks. Taking tokens by index would make the gradient a scatter."""
    B, T, *rest = x.shape
    chunks = x.reshape(B, devices, 2, T // (2 * devices), *rest)
    return jnp.concatenate([chunks[:, :, 0], chunks[:, ::-1, 1]], axis=1).reshape(x.shape)


def _window_reach(config: NSAConfig, T: int, devices: int) -> int:
    """How many tokens before a chunk its queries may see: the window, but at most those that can exist."""
    return min(config.window, T - T // (2 * devices))


def _by_kv_head(one_head: Callable[..., Array], K: int, *arrays: Any) -> Float[Array, "B S H Dv"]:
    """one_head(*arrays) of one K/V head after the other, each with its share of the heads of arrays [B, .., heads, ..].

    The backward pass keeps what `save_attention` keeps and repeats everything else, such as gathering keys.
    """

    def split(x: Array) -> Array:
        B, length, heads, size = x.shape
        return jnp.moveaxis(x.reshape(B, length, K, heads // K, size), 2, 0)

    run = jax.checkpoint(one_head, policy=save_attention)
    o = jax.lax.map(lambda share: run(*share), jax.tree.map(split, arrays))
    K, B, S, G, Dv = o.shape
    return jnp.moveaxis(o, 0, 2).reshape(B, S, K * G, Dv)


def _places(segment_ids: Int[Array, "B S"] | None, S: int, axes: Axes) -> list[Positions]:
    """The positions of the queries of the device's two chunks among the keys of the whole sequence."""
    begins = chunk_begins(S, axes)
    if segment_ids is None:
        return [Positions(None, begin) for begin in begins]
    starts = visibility.segment_starts(_whole(segment_ids, axes))
    return [Positions(jax.lax.dynamic_slice_in_dim(starts, begin, S // 2, axis=1), begin) for begin in begins]


def _place_among_near(place: Positions, w: int, q: Float[Array, "B S H Dk"]) -> Positions:
    """The positions of the queries of a chunk among the keys of this chunk and of the w tokens before it.

    Entries before the first token of the sequence belong to no segment.
    """
    starts = (
        jnp.zeros((q.shape[0], q.shape[1] // 2), jnp.int32) if place.segment_starts is None else place.segment_starts
    )
    return Positions(jnp.maximum(starts - place.query_offset + w, 0), w)


def _with_tokens_before(x: Float[Array, "B S ..."], w: int, axes: Axes) -> Chunks:
    """Each chunk with the w tokens before it, which come from the devices that hold the chunks before it."""
    own = chunks = _chunks(x)
    before: list[Chunks] = []
    missing = w
    while missing > 0:  # one round, unless chunks are shorter than the window
        early, late = (part[:, -missing:] for part in chunks)
        chunks = _chunks_before((early, late), axes)
        before.insert(0, chunks)
        missing -= chunks[0].shape[1]
    early_parts, late_parts = zip(*before, own, strict=True)
    return jnp.concatenate(early_parts, axis=1), jnp.concatenate(late_parts, axis=1)


def _chunks_before(chunks: Chunks, axes: Axes) -> Chunks:
    """The chunks before the device's own two, from the devices that hold them; zeros before the first chunk."""
    early, late = chunks
    devices, index = jax.lax.axis_size(axes), jax.lax.axis_index(axes)
    from_left = jax.lax.ppermute(early, axes, [(i, i + 1) for i in range(devices - 1)])
    from_right = jax.lax.ppermute(late, axes, [(i + 1, i) for i in range(devices - 1)])
    return from_left, jnp.where(index == devices - 1, early, from_right)


def _chunks_after(chunks: Chunks, axes: Axes) -> Chunks:
    """The chunks after the device's own two, from the devices that hold them; zeros after the last chunk."""
    early, late = chunks
    devices, index = jax.lax.axis_size(axes), jax.lax.axis_index(axes)
    from_right = jax.lax.ppermute(early, axes, [(i + 1, i) for i in range(devices - 1)])
    from_left = jax.lax.ppermute(late, axes, [(i, i + 1) for i in range(devices - 1)])
    return jnp.where(index == devices - 1, late, from_right), from_left
