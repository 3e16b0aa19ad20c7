"""How the next token is drawn from the logits, each row by settings of its own."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a prompt is continued."""

    max_tokens: int = 200  # the most tokens to sample
    temperature: float = 0.8  # divides the logits; 0 takes the likeliest token
    top_k: int | None = None  # sample among the k likeliest tokens; None: among all
    top_p: float = 1.0  # sample among the likeliest tokens that together have this probability
    repetition_penalty: float = 1.0  # divides positive and multiplies negative logits of tokens seen (arXiv 1909.05858)
    stop: tuple[str, ...] = ()  # the text ends before the first of these
    stop_tokens: tuple[int, ...] = ()  # the text ends before the first of these tokens
    seed: int = 0  # the same seed gives the same text, no matter what else is running
    max_thinking_tokens: int | None = None  # tokens between think_start and think_end; None: any number
    think_start: str = "<think>"  # opens a span of thinking
    think_end: str = "</think>"  # closes it, by force when the budget is spent


def check(sampling: Sampling, vocab_size: int) -> None:
    """Raises ValueError, naming the setting, where a value is impossible."""
    thinking = sampling.max_thinking_tokens
    for name, fits, expected in (
        ("max_tokens", sampling.max_tokens >= 0, "at least 0"),
        ("temperature", 0 <= sampling.temperature < math.inf, "at least 0, and finite"),
        (
            "top_k",
            sampling.top_k is None or 1 <= sampling.top_k <= vocab_size,
            f"1 to {vocab_size}, the size of the vocabulary",
        ),
        ("top_p", 0 < sampling.top_p <= 1, "above 0 and at most 1"),
        ("repetition_penalty", 0 < sampling.repetition_penalty < math.inf, "above 0, and finite"),
        ("stop", not isinstance(sampling.stop, str) and all(sampling.stop), "strings that are not empty"),
        (
            "stop_tokens",
            all(0 <= token < vocab_size for token in sampling.stop_tokens),
            f"0 to {vocab_size - 1}, the tokens of the vocabulary",
        ),
        ("max_thinking_tokens", thinking is None or thinking >= 0, "at least 0"),
    ):
        if not fits:
            raise ValueError(f"{name} = {getattr(sampling, name)!r}: expected {expected}")


class Draw(NamedTuple):
    """The settings of every row, and how many tokens were drawn for it.

    Without `top_k` and `top_p`, all tokens of all rows can be drawn, and no logits need be sorted.
    """

    temperature: Float[Array, " B"]
    top_k: Int[Array, " B"] | None
    top_p: Float[Array, " B"] | None
    repetition_penalty: Float[Array, " B"]
    seed: Int[Array, " B"]
    num_drawn: Int[Array, " B"]  # tokens drawn before


def likely(scores: Float[Array, "B V"], draw: Draw) -> Float[Array, "B V"]:
    """The logits over the temperature, and -inf for tokens beyond top-k, and then beyond top-p of what remains.

    Of equal logits those with the lower ids are taken first. A row whose top-p is 1 keeps all that top-k does.
    """
    scores = scores / jnp.maximum(draw.temperature, 1e-6)[:, None]
    if draw.top_k is None or draw.top_p is None:
        return scores
    order = jnp.argsort(scores, axis=1, descending=True, stable=True)
    falling = jnp.take_along_axis(scores, order, axis=1)
    rank = jnp.arange(scores.shape[1], dtype=jnp.int32)[None, :]
    falling = jnp.where(rank < draw.top_k[:, None], falling, -jnp.inf)
    mass = jnp.cumsum(jax.nn.softmax(falling, axis=1), axis=1)
    before = jnp.concatenate([jnp.zeros((scores.shape[0], 1), mass.dtype), mass[:, :-1]], axis=1)
    top_p = draw.top_p[:, None]
    kept = (before < top_p) | (top_p >= 1) | (rank == 0)  # rounded, the mass before the last tokens may be 1
    return jnp.put_along_axis(scores, order, jnp.where(kept, falling, -jnp.inf), axis=1, inplace=False)


def sample(scores: Float[Array, "B V"], seen: Bool[Array, "B V"], draw: Draw) -> Int[Array, " B"]:
    """One token for each row of logits; `seen` says which tokens the row holds already."""
    penalty = draw.repetition_penalty[:, None]
    scores = jnp.where(seen, jnp.where(scores > 0, scores / penalty, scores * penalty), scores)

    def one(scores, seed, index):
        return jax.random.categorical(jax.random.fold_in(jax.random.key(seed), index), scores)

    drawn = jax.vmap(one)(likely(scores, draw), draw.seed, draw.num_drawn)
    return jnp.where(draw.temperature == 0, jnp.argmax(scores, axis=1), drawn).astype(jnp.int32)
