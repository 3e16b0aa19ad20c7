"""Cross-entropy in float32, through the vocabulary in chunks of tokens."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from train.model.chunks import CHUNK_ELEMENTS, in_chunks
from train.model.rounding import widened, with_gradient_to
from train.parallel.sharding import activation


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

    Where a device would hold more than `chunk_elements` logits, its tokens are cut into chunks that are scanned over
    and rematerialised, so that float32 [B, T, V] never exists, forward or backward. Each device cuts up its own rows
    and tokens.
    """
    inputs = (hidden, targets, weights, target_bytes)
    parts = in_chunks(inputs, kernel.shape[1], chunk_elements=chunk_elements)  # padding has weight 0
    chunks, D, _, C = parts[0].shape[:4]
    # One copy for each device, which holds it anyway. So gradients of the chunks are summed on each device, and over
    # the devices only once.
    wide, kernels = (
        activation(jnp.broadcast_to(x[None, None], (D, C, *x.shape)), "batch", "sequence", None, "vocab")
        for x in (widened(kernel), jax.lax.stop_gradient(kernel))
    )

    def sums(inputs: tuple[Array, ...]) -> LossSums:
        return _sums(inputs[0], with_gradient_to(wide, kernels), *inputs[1:])

    if chunks == 1:
        return sums(tuple(x[0] for x in parts))

    @jax.checkpoint
    def add(total: LossSums, inputs: tuple[Array, ...]) -> tuple[LossSums, None]:
        return jax.tree.map(jnp.add, total, sums(inputs)), None

    zero = LossSums(*[jnp.zeros((), jnp.float32)] * 4)
    total, _ = jax.lax.scan(add, zero, parts)
    return total


def bits_per_byte(nll: float, num_bytes: float) -> float:
    """nll in nats over bytes, in bits; NaN where there are no bytes."""
    return nll / math.log(2) / num_bytes if num_bytes else math.nan


def _sums(hidden, kernels, targets, weights, target_bytes) -> LossSums:
    logits = jnp.einsum("drcte,dcev->drctv", hidden, kernels, preferred_element_type=jnp.float32)
    log_normaliser = jax.nn.logsumexp(logits, axis=-1)
    # A sum instead of a gather, so that a device needs only its own part of the vocabulary.
    is_target = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) == targets[..., None]
    target_logits = jnp.sum(jnp.where(is_target, logits, 0), axis=-1)
    return LossSums(
        nll=jnp.sum(weights * (log_normaliser - target_logits)),
        z=jnp.sum(weights * jnp.square(log_normaliser)),
        weight=jnp.sum(weights),
        bytes=jnp.sum(weights * target_bytes.astype(jnp.float32)),
    )
