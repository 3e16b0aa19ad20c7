"""Rotary position embedding (Su et al., arXiv 2104.09864), and how to stretch it for longer contexts."""

import dataclasses
import math
from typing import Literal, get_args

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float, Float64, Int

from nsa_jax import arguments
from nsa_jax.explicit import on_auto_axes, split_like
from nsa_jax.precision import wide_dtype

ScalingKind = Literal["none", "linear", "ntk", "yarn", "llama3"]


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How the frequencies of the rotary embedding are stretched for a longer context (YaRN paper, arXiv 2309.00071).

    It is frozen and hashable, so it can be a static argument of `jax.jit`. Equation numbers are the YaRN paper's.

    * `linear` divides every frequency by `factor` (position interpolation, equation 10).
    * `ntk` enlarges the base, so that the highest frequency stays and the lowest is divided by `factor` (equations 14
      to 16).
    * `yarn` keeps frequencies that turn more than `beta_fast` times in `original_length` tokens, and divides by
      `factor` those that turn less than `beta_slow` times. In between it goes from one to the other linearly in the
      number of turns (equations 18 to 20). It also multiplies logits by (0.1 ln factor + 1)^2 (equations 21 and 22).
    * `llama3` has the frequencies of `yarn` and leaves logits alone, as Llama 3.1 does: its `high_freq_factor` is
      `beta_fast`, its `low_freq_factor` is `beta_slow`, its `original_max_position_embeddings` is `original_length`.

    Example:
      >>> rope_frequencies(8, 10_000.0, RopeScaling("linear", factor=4)).tolist()
      [0.25, 0.025, 0.0025, 0.00025]

    Raises:
      ValueError: `kind` is unknown; `factor` is below 1, or not 1 for `none`; `original_length` is missing for `yarn`
        or `llama3`, or not positive; or not 0 < beta_slow < beta_fast.
    """

    kind: ScalingKind = "none"  # none: plain rotary embedding, at any length
    factor: float = 1.0  # s: length of the longer context over that of the context trained on
    original_length: int | None = None  # L: tokens of the context trained on; needed for yarn and llama3
    beta_fast: float | None = None  # frequencies that turn more often in L stay as they are; None: 32, for llama3 4
    beta_slow: float = 1.0  # yarn and llama3: frequencies that turn less often are divided by factor

    def __post_init__(self) -> None:
        if self.kind not in get_args(ScalingKind):
            raise ValueError(f"RopeScaling.kind = {self.kind!r}: expected one of {', '.join(get_args(ScalingKind))}")
        if self.beta_fast is None:
            object.__setattr__(self, "beta_fast", 4.0 if self.kind == "llama3" else 32.0)
        for name in ("factor", "beta_fast", "beta_slow"):
            object.__setattr__(self, name, arguments.real(f"RopeScaling.{name}", getattr(self, name)))
        length = arguments.optional_size("RopeScaling.original_length", self.original_length)
        object.__setattr__(self, "original_length", length)
        if self.factor < 1:
            raise ValueError(f"RopeScaling.factor = {self.factor}: expected a number of at least 1")
        if self.kind == "none" and self.factor != 1:
            raise ValueError(f"RopeScaling.factor = {self.factor}: expected 1 with kind = none")
        if self.original_length is None and self.kind in ("yarn", "llama3"):
            raise ValueError(
                f"RopeScaling.original_length = None: expected the tokens trained on, with kind = {self.kind}"
            )
        assert self.beta_fast is not None
        if not 0 < self.beta_slow < self.beta_fast:
            raise ValueError(
                f"RopeScaling.beta_slow = {self.beta_slow}: expected above 0 and below beta_fast = {self.beta_fast}"
            )

    @property
    def magnitude(self) -> float:
        """The factor of queries and keys: sqrt(1/t) = 0.1 ln s + 1 for `yarn` (equation 22), otherwise 1."""
        return 0.1 * math.log(self.factor) + 1 if self.kind == "yarn" else 1.0


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling) -> Float64[np.ndarray, " D/2"]:
    """The frequency of each pair in radians per token, highest first: theta ** (-2 i / D), scaled.

    Raises:
      ValueError: `head_dim` is odd, or it is 2 with kind = ntk, which needs a highest and a lowest frequency.
    """
    head_dim, theta = arguments.size("head_dim", head_dim), arguments.real("theta", theta)
    if not isinstance(scaling, RopeScaling):
        raise ValueError(f"scaling = {scaling!r}: expected an nsa_jax.RopeScaling")
    if theta <= 0:
        raise ValueError(f"theta = {theta}: expected a positive number")
    if head_dim % 2:
        raise ValueError(f"head_dim = {head_dim}: rotary position embedding needs an even head size")
    if scaling.kind == "ntk":
        if head_dim == 2:
            raise ValueError("head_dim = 2: RopeScaling.kind = ntk needs a head size of at least 4")
        theta = theta * scaling.factor ** (head_dim / (head_dim - 2))
    frequencies = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind in ("yarn", "llama3"):
        assert scaling.original_length is not None
        assert scaling.beta_fast is not None
        # Equation 17 prints the enlarged base b' here. By equation 13 the wavelength is that of the trained embedding.
        turns = scaling.original_length * frequencies / (2 * np.pi)
        kept = np.clip((turns - scaling.beta_slow) / (scaling.beta_fast - scaling.beta_slow), 0, 1)
        return (1 - kept) * frequencies / scaling.factor + kept * frequencies
    return frequencies


@on_auto_axes(lambda given: split_like(given["x"]))
def apply_rope(
    x: Float[Array, "B T H D"], positions: Int[Array, "B T"], theta: float, scaling: RopeScaling = RopeScaling()
) -> Float[Array, "B T H D"]:
    """Rotates the pairs (x_i, x_{i + D/2}) by positions * frequency_i, in float32 at least.

    The frequencies are those of `rope_frequencies`. With kind = yarn the result is also multiplied by
    `scaling.magnitude`. If this is done to queries and to keys, it scales the logits.

    Raises:
      ValueError: D does not fit; see `rope_frequencies`.
    """
    x = arguments.array("x", x)
    if x.ndim != 4 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x: {arguments.describe(x)}: expected a float array [batch, tokens, heads, head size]")
    positions = arguments.array("positions", positions)
    rows = 1 if positions.shape[:1] == (1,) else x.shape[0]  # one row of positions serves every row
    positions = arguments.integers("positions", positions, (rows, x.shape[1]), "(B, T)")
    return rotate_pairs(x, *rotation_of(positions, x.shape[-1], theta, scaling, wide_dtype(x.dtype)))


def rotation_of(
    positions: Int[Array, "B T"], head_dim: int, theta: float, scaling: RopeScaling, dtype: DTypeLike
) -> tuple[Float[Array, "B T D/2"], Float[Array, "B T D/2"]]:
    """cos and sin of positions * frequency_i, times `scaling.magnitude`: by what `apply_rope` rotates."""
    frequencies = jnp.asarray(rope_frequencies(head_dim, theta, scaling), dtype)
    angle = positions.astype(dtype)[:, :, None] * frequencies[None, None, :]
    return scaling.magnitude * jnp.cos(angle), scaling.magnitude * jnp.sin(angle)


def rotate_pairs(
    x: Float[Array, "B T H D"], cos: Float[Array, "B T D/2"], sin: Float[Array, "B T D/2"]
) -> Float[Array, "B T H D"]:
    """The pairs (x_i, x_{i + D/2}) rotated, in the dtype of cos and sin."""
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    a, b = jnp.split(x.astype(cos.dtype), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
