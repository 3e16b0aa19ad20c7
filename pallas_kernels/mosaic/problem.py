"""Which calls the Mosaic GPU kernels take."""

import jax
import jax.numpy as jnp
from jax.export import is_symbolic_dim

from pallas_kernels.mosaic.products import ROWS

HEAD_DIMS = (64, 128, 192, 256)


def check_supported(q: jax.Array, k: jax.Array, v: jax.Array | None, *, scale: float) -> None:
    """Raises NotImplementedError, before anything is traced, for what no Mosaic GPU kernel here takes.

    Shapes are those of the contracts: q [..., H, Dk], k [..., K, Dk], v [..., K, Dv] or None, batch first.
    """
    arrays = {"q": q, "k": k} | ({} if v is None else {"v": v})
    if is_symbolic_dim(q.shape[0]) or q.shape[0] == 0:
        raise NotImplementedError(f"q.shape = {q.shape}: expected a batch that is known when tracing, and not 0")
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"q.dtype = {q.dtype}: expected bfloat16 or float16")
    for name, array in arrays.items():
        if array.dtype != q.dtype:
            raise NotImplementedError(f"{name}.dtype = {array.dtype}: expected q's, {q.dtype}")
        if array.shape[-1] not in HEAD_DIMS:
            raise NotImplementedError(f"head_dim of {name} = {array.shape[-1]}: expected 64, 128, 192 or 256")
    group = q.shape[-2] // k.shape[-2]
    if ROWS % group:
        raise NotImplementedError(f"query heads per K/V head = {group}: expected a divisor of {ROWS}")
    if not scale > 0:
        raise NotImplementedError(f"scale = {scale}: expected a positive number")
