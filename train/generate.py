"""Sampling: one full forward pass per token over a buffer of fixed size, so that it compiles once."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray

from train.model import Transformer, logits
from train.tokenizer import Tokenizer

BUFFER_MULTIPLE = 64  # prompts of different lengths share a compiled program


def generate(
    params: Any,
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str,
    num_tokens: int,
    temperature: float = 0.8,
    top_k: int | None = None,
    seed: int = 0,
) -> str:
    """The prompt continued by up to `num_tokens` sampled tokens; it ends early at an end of text.

    Args:
      params: of `model`.
      model: the decoder.
      tokenizer: whose tokens the model was trained on.
      prompt: the text to continue; may be empty.
      num_tokens: the most to sample.
      temperature: divides the logits; 0 takes the likeliest token.
      top_k: sample among the k likeliest tokens only; None: among all.
      seed: the same seed gives the same text.

    Raises:
      ValueError: an argument is out of range.
    """
    if num_tokens < 0:
        raise ValueError(f"num_tokens = {num_tokens}: expected at least 0")
    if not temperature >= 0:
        raise ValueError(f"temperature = {temperature}: expected at least 0")
    if top_k is not None and not 1 <= top_k <= tokenizer.vocab_size:
        raise ValueError(f"top_k = {top_k}: expected 1 to {tokenizer.vocab_size}, the size of the vocabulary")
    start = np.concatenate([[tokenizer.bos_id], tokenizer.encode(prompt)]).astype(np.int32)
    size = -(-(len(start) + num_tokens) // BUFFER_MULTIPLE) * BUFFER_MULTIPLE
    buffer = np.full((1, size), tokenizer.pad_id, np.int32)
    buffer[0, : len(start)] = start
    end = len(start) + num_tokens
    tokens = _continue(
        params, buffer, len(start), end, jnp.float32(temperature), jax.random.key(seed), model=model, top_k=top_k
    )
    sampled = np.asarray(tokens)[0, len(start) : end]
    ends = np.flatnonzero(sampled == tokenizer.eos_id)
    sampled = sampled[: ends[0]] if len(ends) else sampled
    return tokenizer.decode(np.concatenate([start[1:], sampled]))


@functools.partial(jax.jit, static_argnames=("model", "top_k"))
def _continue(
    params: Any,
    tokens: Int[Array, "1 T"],
    begin: int,
    end: int,
    temperature: Array,
    key: PRNGKeyArray,
    *,
    model: Transformer,
    top_k: int | None,
) -> Int[Array, "1 T"]:
    def step(position: Array, tokens: Array) -> Array:
        hidden = model.apply({"params": params}, tokens)
        last = jax.lax.dynamic_index_in_dim(hidden[0], position - 1, keepdims=False)
        scores = logits(params, last, model.config)[: model.vocab_size]  # the padded rows stand for no token
        if top_k is not None:
            scores = jnp.where(scores < jax.lax.top_k(scores, top_k)[0][-1], -jnp.inf, scores)
        sampled = jax.random.categorical(jax.random.fold_in(key, position), scores / jnp.maximum(temperature, 1e-6))
        chosen = jnp.where(temperature == 0, jnp.argmax(scores), sampled)
        return tokens.at[0, position].set(chosen.astype(tokens.dtype))

    return jax.lax.fori_loop(begin, end, step, tokens)
