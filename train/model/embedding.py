"""The embeddings of tokens, with a gradient whose sums have a fixed order on every platform.

Row v of the gradient is the sum of what flows back to all tokens v. On other platforms than GPUs, a scatter adds it up
in order. On a GPU, a scatter adds numbers in whatever order they arrive. Where XLA is allowed no such operation, it
sorts the numbers and adds them up in prefix sums, which takes much time and memory. There the gradient is a product of
matrices instead: of the tokens as one-hot rows with what flows back.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nsa_jax.sharding import take_rows
from train.model.chunks import CHUNK_ELEMENTS, in_chunks
from train.parallel.sharding import activation, logical


@jax.custom_vjp
def embed(table: Float[Array, "V E"], tokens: Int[Array, "B T"]) -> Float[Array, "B T E"]:
    """table[tokens], split like activations over the mesh in context; the table may be split over its rows.

    The gradient is summed in float32 and rounded to the dtype of the table once.
    """
    return take_rows(table, tokens, logical("batch", "sequence", None))


def _forward(table: Array, tokens: Array) -> tuple[Array, tuple[Array, Array]]:
    return embed(table, tokens), (table, tokens)


def _backward(residuals: tuple[Array, Array], gradient: Array) -> tuple[Array, None]:
    table, tokens = residuals
    product, scatter = (functools.partial(f, num_rows=len(table)) for f in (sum_by_product, sum_by_scatter))
    total = jax.lax.platform_dependent(tokens, gradient, cuda=product, rocm=product, default=scatter)
    return activation(total, "vocab", None).astype(table.dtype), None


embed.defvjp(_forward, _backward)


def sum_by_scatter(
    tokens: Int[Array, "B T"], gradient: Float[Array, "B T E"], *, num_rows: int
) -> Float[Array, "{num_rows} E"]:
    """Row v is the sum of the gradients of all tokens v, in float32."""
    zeros = activation(jnp.zeros((num_rows, gradient.shape[-1]), jnp.float32), "vocab", None)
    _, transpose = jax.vjp(lambda table: take_rows(table, tokens, logical("batch", "sequence", None)), zeros)
    return transpose(gradient.astype(jnp.float32))[0]


def sum_by_product(
    tokens: Int[Array, "B T"],
    gradient: Float[Array, "B T E"],
    *,
    num_rows: int,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> Float[Array, "{num_rows} E"]:
    """The same as a product of matrices: onehot(tokens)^T gradient, with one-hot rows in the dtype of the gradient.

    A device holds at most `chunk_elements` one-hot numbers at a time. It sums over its own tokens, and the sums of the
    devices are added once. A gradient that is not finite makes all rows NaN, not only its token's.
    """
    parts = in_chunks((tokens, gradient), num_rows, chunk_elements=chunk_elements)  # padding has gradient 0
    chunks, D, _, C = parts[0].shape[:4]
    # A GPU would otherwise round float32 to TF32.
    precision = jax.lax.Precision.HIGHEST if gradient.dtype == jnp.float32 else None

    def product(tokens: Array, gradient: Array) -> Array:
        one_hot = jax.nn.one_hot(tokens, num_rows, dtype=gradient.dtype)
        one_hot = activation(one_hot, "batch", None, "sequence", None, "vocab")
        total = jnp.einsum(
            "drctv,drcte->dcve", one_hot, gradient, precision=precision, preferred_element_type=jnp.float32
        )
        return activation(total, "batch", "sequence", "vocab", None)

    if chunks == 1:
        total = product(*(x[0] for x in parts))
    else:
        zero = jnp.zeros((D, C, num_rows, gradient.shape[-1]), jnp.float32)
        zero = activation(zero, "batch", "sequence", "vocab", None)
        total, _ = jax.lax.scan(lambda total, inputs: (total + product(*inputs), None), zero, parts)
    return jnp.sum(total, axis=(0, 1))
