"""Cross-entropy in float32, through the vocabulary in chunks of tokens."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Float32 logits that exist at once. Larger ones are computed chunk by chunk, and again in the backward pass.
CHUNK_ELEMENTS = 1 << 26


class LossSums(NamedTuple):
    """Sums over tokens, so that batches add up exactly; float32 scalars."""

    nll: Float[Array, ""]  # weighted negative log-likelihood in nats
    z: Float[Array, ""]  # weighted square of the softmax's log-normaliser
    weight: Float[Array, ""]  # of the tokens that count
    bytes: Float[Array, ""]  # UTF-8 bytes those tokens stand for


def cross_entropy(
    hidden: Float[Array, "B T E"],
    kernel: Float[Array, "E V"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    target_bytes: Int[Array, "B T"],
    *,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> LossSums:
    """Sums of the cross-entropy of logits `hidden @ kernel` against `targets`.

    Where B T V exceeds `chunk_elements`, T is cut into chunks that are scanned over and rematerialised, so that
    float32 [B, T, V] never exists, forward or backward. Chunks run along T, so that a batch that is split over
    devices stays so.
    """
    B, T, _ = hidden.shape
    chunk = min(T, max(1, chunk_elements // (B * kernel.shape[1])))
    if chunk == T:
        return _sums(hidden, kernel, targets, weights, target_bytes)
    steps = -(-T // chunk)

    def split(x: Array) -> Array:  # [B, T, ...] to [steps, B, chunk, ...]; padding has weight 0
        x = jnp.pad(x, ((0, 0), (0, steps * chunk - T), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(B, steps, chunk, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def add(total: LossSums, inputs: tuple[Array, ...]) -> tuple[LossSums, None]:
        part = _sums(inputs[0], kernel, *inputs[1:])
        return jax.tree.map(jnp.add, total, part), None

    zero = LossSums(*[jnp.zeros((), jnp.float32)] * 4)
    total, _ = jax.lax.scan(add, zero, tuple(map(split, (hidden, targets, weights, target_bytes))))
    return total


def bits_per_byte(nll: float, num_bytes: float) -> float:
    """nll in nats over bytes, in bits; NaN where there is no byte."""
    return nll / math.log(2) / num_bytes if num_bytes else math.nan


def _sums(hidden, kernel, targets, weights, target_bytes) -> LossSums:
    logits = jnp.dot(hidden, kernel, preferred_element_type=jnp.float32)
    log_normaliser = jax.nn.logsumexp(logits, axis=-1)
    target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return LossSums(
        nll=jnp.sum(weights * (log_normaliser - target_logits)),
        z=jnp.sum(weights * jnp.square(log_normaliser)),
        weight=jnp.sum(weights),
        bytes=jnp.sum(weights * target_bytes.astype(jnp.float32)),
    )
