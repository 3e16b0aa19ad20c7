"""Dense attention, on cuDNN where it can be: the baseline that sparse attention is measured against."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from nsa_jax import arguments, xla
from nsa_jax.arguments import describe
from nsa_jax.attention import checked_attention, checked_segment_ids, score_scale, window_attention
from nsa_jax.config import NSAConfig
from nsa_jax.explicit import on_auto_axes, split_of
from nsa_jax.visibility import segment_starts
from pallas_kernels.devices import current_device


@on_auto_axes(lambda arguments: split_of(arguments["q"], 0, 1, 2))
def causal_attention(
    q: Float[Array, "B T H Dk"],
    k: Float[Array, "B T K Dk"],
    v: Float[Array, "B T K Dv"],
    *,
    window: int | None = None,
    scale: float | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T H Dv"]:
    """o_t = Attn(q_t, k_1..t, v_1..t) in the segment of t (equation 1), or over the last `window` positions.

    This runs JAX's cuDNN attention on a GPU, and plain XLA elsewhere, with two exceptions. A `window` runs our own
    `window_attention`. On a GPU, so does everything that cuDNN does not take (segments, 32-bit inputs, large heads),
    with a window as long as the sequence, because XLA would write T x T scores for it.

    Example:
      >>> q, k = jnp.ones((1, 100, 4, 16)), jnp.ones((1, 100, 2, 16))
      >>> causal_attention(q, k, k).shape
      (1, 100, 4, 16)

    Args:
      q, k, v: queries [B, T, H, Dk], keys [B, T, K, Dk] and values [B, T, K, Dv] of one float dtype. H is a multiple of
        K.
      window: positions that a query sees, its own included. None: all.
      scale: factor of the scores; Dk ** -0.5 if None.
      segment_ids: integers [B, T]; a run of equal ids is a segment.

    Returns:
      [B, T, H, Dv] in the dtype of `q`.

    Raises:
      ValueError: the shapes or dtypes of `q`, `k` and `v` do not fit together, or `window` is not positive.
    """
    q, k, v = checked_attention(q, k, v, NSAConfig())
    window = arguments.optional_size("window", window)
    if k.shape[1] != q.shape[1]:
        raise ValueError(f"k: {describe(k)}: expected as many tokens as q: {describe(q)}")
    if segment_ids is not None:
        segment_ids = checked_segment_ids(segment_ids, *q.shape[:2])
    on_cudnn = segment_ids is None and _cudnn_applies(q, v)
    if window is not None or (on_gpu() and not on_cudnn):
        sizes = NSAConfig(window=q.shape[1] if window is None else window)
        return window_attention(q, k, v, config=sizes, scale=scale, segment_ids=segment_ids)
    if on_cudnn:
        return dense_attention(q, k, v, is_causal=True, scale=scale)
    mask = jnp.tri(q.shape[1], dtype=bool)[None, None]
    if segment_ids is not None:
        starts = segment_starts(segment_ids)  # segments are runs: an id may come back
        mask &= (starts[:, :, None] == starts[:, None, :])[:, None]
    o, _ = xla.masked_attention(q, k, v, mask, score_scale(q, scale))
    return o


def dense_attention(
    q: Float[Array, "B Tq H Dk"],
    k: Float[Array, "B T K Dk"],
    v: Float[Array, "B T K Dv"],
    *,
    mask: Bool[Array, "B 1 Tq T"] | None = None,
    is_causal: bool = False,
    lengths: Int[Array, " B"] | None = None,
    scale: float | None = None,
) -> Float[Array, "B Tq H Dv"]:
    """`jax.nn.dot_product_attention` on a GPU, with cuDNN if it can; with `lengths` elsewhere, `xla.masked_attention`.

    `lengths` says how many keys of each row count. The others may hold anything that is finite; on XLA, NaN too.
    """
    Dk, Dv, scale = q.shape[-1], v.shape[-1], score_scale(q, scale)
    on_cudnn = mask is None and _cudnn_applies(q, v)
    if lengths is not None and on_cudnn:
        lengths = jnp.maximum(lengths, 1)
    elif lengths is not None:
        counts = jnp.arange(v.shape[1], dtype=jnp.int32)[None, :] < lengths[:, None]
        # The softmax of JAX's function is in float32, and its products of float16 compile on GPUs alone.
        if q.dtype == jnp.float64 or not on_gpu():
            seen = counts[:, None, None, :]
            return xla.masked_attention(q, k, v, seen if mask is None else seen & mask, scale)[0]
        v = jnp.where(counts[:, :, None, None], v, 0)  # a weight of 0 times NaN would be NaN
    # JAX's binding wants keys and values of one size. Zeros change neither the scores nor the columns that are kept.
    q, k, v = (jnp.pad(x, ((0, 0),) * 3 + ((0, max(Dk, Dv) - x.shape[-1]),)) for x in (q, k, v))
    # JAX's function relies on implicit promotion inside, which the caller may have forbidden.
    with jax.numpy_dtype_promotion("standard"):
        o = jax.nn.dot_product_attention(
            q,
            k,
            v,
            mask=mask,
            scale=scale,
            is_causal=is_causal,
            key_value_seq_lengths=lengths,
            implementation="cudnn" if on_cudnn else "xla",
        )
    return o[..., :Dv]


def _cudnn_applies(q: Array, v: Array) -> bool:
    """CuDNN's fused attention takes 16-bit inputs with heads of up to 128, on a GPU."""
    size = max(q.shape[-1], v.shape[-1])
    return on_gpu() and q.dtype.itemsize == 2 and size % 8 == 0 and size <= 128


def on_gpu() -> bool:
    """Whether programs are traced for a GPU."""
    return current_device().platform == "gpu"
