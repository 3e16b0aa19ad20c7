"""phi, which turns overlapping blocks of keys or values into compressed tokens (paper, equation 7)."""

import functools
import operator
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import PrecisionLike
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from nsa_jax import arguments
from nsa_jax.arguments import describe
from nsa_jax.config import NSAConfig, check_config, num_compressed
from nsa_jax.explicit import on_auto_axes, split_of
from nsa_jax.finite import finite_part, is_finite
from nsa_jax.precision import wide_dtype

Compression = Literal["mean", "linear", "mlp"]
COMPRESSIONS: tuple[Compression, ...] = ("mean", "linear", "mlp")


@on_auto_axes(lambda arguments: PartitionSpec(*split_of(arguments["x"], 0), None, *split_of(arguments["x"], 2)))
def compress(
    x: Float[Array, "B T K D"],
    parameters: Mapping[str, Array] | None = None,
    *,
    config: NSAConfig,
    method: Compression = "mean",
    precision: PrecisionLike = None,
) -> Float[Array, "B Nc K D"]:
    """Compressed tokens phi(x[i d : i d + l]) for every i. All heads share the same phi.

    phi is the mean of the l tokens, or a network of them: an MLP of x + position, as in the paper, or one matrix.

    The overlapping blocks are never written to memory. Instead, the first layer's weight is split into parts of d
    tokens. Each chunk of d tokens is multiplied once with every part, and the products are shifted and added.

    Example:
      >>> compress(jnp.ones((1, 100, 2, 16)), config=NSAConfig()).shape
      (1, 5, 2, 16)

    Args:
      x: keys or values [B, T, K, D], of any float dtype. Keys are rotated already for "mean", so that a query's score
        for a compressed key is the mean of its scores for the block's keys, and not yet for the others.
      parameters: for "mlp", "position" [l, D], "in_kernel" [l, D, F], "in_bias" [F], "out_kernel" [F, D] and
        "out_bias" [D]; for "linear", "position" and "in_kernel" [l, D, D]; "mean" has none.
      config: gives l and d.
      method: "mean", "mlp" (one hidden layer with SiLU) or "linear".
      precision: of the network's matrix products, as `jax.lax.dot_general` takes it.

    Returns:
      [B, Nc, K, D] with Nc = `num_compressed(T, config)`.

    Raises:
      ValueError: an argument does not fit, named with what was expected.
    """
    check_config(config)
    if method not in COMPRESSIONS:
        raise ValueError(f"method = {method!r}: expected one of {', '.join(COMPRESSIONS)}")
    x = arguments.array("x", x)
    if x.ndim != 4 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x: {describe(x)}: expected a float array [batch, tokens, heads, head size]")
    B, T, K, D = x.shape
    parameters = _checked_parameters({} if parameters is None else parameters, D, config, method)
    Nc = num_compressed(T, config)
    d, parts = config.compress_stride, config.compress_block // config.compress_stride
    if Nc == 0:
        return jnp.zeros((B, 0, K, D), x.dtype)
    chunks = x[:, : (Nc + parts - 1) * d].reshape(B, Nc + parts - 1, d, K, D)

    if method == "mean":
        sums = chunks.sum(axis=2, dtype=wide_dtype(x.dtype))
        total = functools.reduce(operator.add, (sums[:, r : r + Nc] for r in range(parts)))
        return (total / config.compress_block).astype(x.dtype)

    position = parameters["position"].astype(x.dtype)
    kernel = parameters["in_kernel"].astype(x.dtype)
    product = functools.partial(jnp.einsum, precision=precision)
    products = product("bnskd,rsdf->rbnkf", chunks, kernel.reshape(parts, d, D, -1))
    hidden = functools.reduce(operator.add, (products[r, :, r : r + Nc] for r in range(parts)))
    hidden = add_bias(hidden, product("ld,ldf->f", position, kernel))
    if method == "linear":
        return hidden
    hidden = add_bias(hidden, parameters["in_bias"])
    # A compressed token that is not finite sends no gradient: the slope of SiLU there, times 0, would be NaN.
    finite = is_finite(hidden)[..., None]
    hidden = jax.nn.silu(finite_part(hidden))
    out = product("bnkf,fd->bnkd", hidden, parameters["out_kernel"].astype(x.dtype))
    return jnp.where(finite, add_bias(out, parameters["out_bias"]), jnp.nan)


def phi_shapes(method: Compression, size: int, hidden: int, config: NSAConfig) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter of phi, for heads of a size and, for an mlp, a hidden width F."""
    l = config.compress_block  # noqa: E741
    if method == "mean":
        return {}
    if method == "linear":
        return {"position": (l, size), "in_kernel": (l, size, size)}
    return {
        "position": (l, size),
        "in_kernel": (l, size, hidden),
        "in_bias": (hidden,),
        "out_kernel": (hidden, size),
        "out_bias": (size,),
    }


def _checked_parameters(parameters: Any, size: int, config: NSAConfig, method: Compression) -> dict[str, Array]:
    """The parameters that a method has, as JAX arrays."""
    if not isinstance(parameters, Mapping):
        raise ValueError(f"parameters = {type(parameters).__name__}: expected arrays by name")
    (hidden, *_) = np.shape(parameters.get("in_bias", 0)) or (1,)
    shapes = phi_shapes(method, size, hidden, config)
    if missing := [name for name in shapes if name not in parameters]:
        raise ValueError(f"parameters: {', '.join(missing)} missing: expected {', '.join(shapes)}")
    arrays = {name: arguments.array(f"parameters[{name!r}]", parameters[name]) for name in shapes}
    for name, shape in shapes.items():
        if arrays[name].shape != shape:
            raise ValueError(f"parameters[{name!r}]: {describe(arrays[name])}: expected shape {shape}")
    return arrays


def add_bias(x: Float[Array, "*N F"], bias: Float[Array, "*F"]) -> Float[Array, "*N F"]:
    """x + bias in the dtype of x. The gradient of the bias, a sum over all of N, is taken in float32 at least."""
    wide = wide_dtype(x.dtype)
    bias = bias.astype(x.dtype).astype(wide)
    return (x.astype(wide) + bias.reshape(*(1,) * (x.ndim - bias.ndim), *bias.shape)).astype(x.dtype)
