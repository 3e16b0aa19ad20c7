"""Native Sparse Attention through the Pallas Triton kernels of its branches, with one backward pass for all."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels import block_selection
from pallas_kernels.compressed_attention import tiling
from pallas_kernels.compressed_attention import triton as compressed
from pallas_kernels.residuals import named
from pallas_kernels.selected_attention import triton as selected
from pallas_kernels.window_attention import triton as window_branch


@dataclasses.dataclass(frozen=True)
class Settings:
    """Static facts of one call, hashable so that they can ride through `jax.custom_vjp`."""

    compress_block: int
    compress_stride: int
    select_block: int
    num_selected: int
    num_init: int
    num_local: int
    window: int
    scale: float
    query_offset: int | None  # where it is known
    interpret: bool

    @property
    def compressed(self) -> tiling.Problem:
        """What the compressed branch needs of it."""
        return tiling.Problem(self.compress_block, self.compress_stride, self.scale, self.interpret)

    @property
    def selected(self) -> dict[str, Any]:
        """What the selected branch needs of it."""
        return {"select_block": self.select_block, "scale": self.scale, "interpret": self.interpret}

    @property
    def window_branch(self) -> dict[str, Any]:
        """What the window branch needs of it."""
        return {"window": self.window, "scale": self.scale, "interpret": self.interpret}


class Keys(NamedTuple):
    """Keys and values of the three branches."""

    cmp_k: Any
    cmp_v: Any
    slc_k: Any
    slc_v: Any
    win_k: Any
    win_v: Any


def nsa_attention(
    q: Float[Array, "B Tq H Dk"],
    cmp_k: Float[Array, "B Nc K Dk"],
    cmp_v: Float[Array, "B Nc K Dv"],
    slc_k: Float[Array, "B T K Dk"],
    slc_v: Float[Array, "B T K Dv"],
    win_k: Float[Array, "B T K Dk"],
    win_v: Float[Array, "B T K Dv"],
    gates: Float[Array, "B Tq H 3"],
    starts: Int[Array, "B Tq"] | None,
    query_offset: int | Int[Array, ""],
    block_indices: Int[Array, "B K Tq n"] | None = None,
    window_place: tuple[Int[Array, "B Tq"] | None, int | Int[Array, ""]] | None = None,
    *,
    compress_block: int,
    compress_stride: int,
    select_block: int,
    num_selected: int,
    num_init: int,
    num_local: int,
    window: int,
    scale: float,
    interpret: bool = False,
) -> Float[Array, "B Tq H Dv"]:
    """All branches and their gated sum; the contract is in the package's docstring.

    Raises:
      NotImplementedError: what one of the branches does not support, and no compressed token.
    """
    if 0 in (q.shape[0], q.shape[1], cmp_k.shape[1]):
        raise NotImplementedError(f"{cmp_k.shape[1]} compressed tokens: expected at least one")
    tiling.check_supported(q, {"k": cmp_k, "v": cmp_v}, scale)
    selected.check_supported(q, slc_k, slc_v, select_block, scale)
    window_branch.check_supported(q, win_k, win_v, scale)
    settings = Settings(
        compress_block=compress_block,
        compress_stride=compress_stride,
        select_block=select_block,
        num_selected=num_selected,
        num_init=num_init,
        num_local=num_local,
        window=window,
        scale=float(scale),
        query_offset=query_offset if isinstance(query_offset, int) else None,
        interpret=interpret,
    )
    keys = Keys(cmp_k, cmp_v, slc_k, slc_v, win_k, win_v)
    places = tuple(
        (starts, jnp.asarray(offset, jnp.int32).reshape(1))
        for starts, offset in ((starts, query_offset), window_place or (starts, query_offset))
    )
    return _attend(q, keys, gates.astype(jnp.float32), places, block_indices, settings)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q, keys, gates, places, block_indices, settings):
    return _forward(q, keys, gates, places, block_indices, settings)[0]


def _forward(q, keys, gates, places, given, settings):
    (starts, offset), (window_starts, window_offset) = places
    o_cmp, lse_cmp = named(compressed.forward(q, keys.cmp_k, keys.cmp_v, starts, offset, settings.compressed))
    block_indices = given
    if given is None:
        block_indices = block_selection.select_blocks(
            q,
            keys.cmp_k,
            lse_cmp,
            starts,
            offset[0] if settings.query_offset is None else settings.query_offset,
            compress_block=settings.compress_block,
            compress_stride=settings.compress_stride,
            select_block=settings.select_block,
            num_selected=settings.num_selected,
            num_init=settings.num_init,
            num_local=settings.num_local,
            scale=settings.scale,
            interpret=settings.interpret,
        )
        block_indices = named(block_indices)
    o_slc, lse_slc = named(
        selected.forward(q, keys.slc_k, keys.slc_v, block_indices, starts, offset, **settings.selected)
    )
    o_win, lse_win = named(
        window_branch.forward(q, keys.win_k, keys.win_v, window_starts, window_offset, **settings.window_branch)
    )
    o = gates[..., 0:1] * o_cmp + gates[..., 1:2] * o_slc + gates[..., 2:3] * o_win
    outputs = ((o_cmp, lse_cmp), (o_slc, lse_slc), (o_win, lse_win))
    return o.astype(q.dtype), (q, keys, gates, places, given, block_indices, outputs)


def _backward(settings, residuals, do):
    q, keys, gates, places, given, block_indices, outputs = residuals
    (starts, offset), (window_starts, window_offset) = places
    (o_cmp, lse_cmp), (o_slc, lse_slc), (o_win, lse_win) = outputs
    g_cmp, g_slc, g_win = gates[..., 0], gates[..., 1], gates[..., 2]
    dq, cmp_dk, cmp_dv, cmp_delta = compressed.backward(
        q, keys.cmp_k, keys.cmp_v, o_cmp, do, lse_cmp, None, starts, offset, settings.compressed, g_cmp
    )
    dq, slc_dk, slc_dv, slc_delta = selected.backward(
        q,
        keys.slc_k,
        keys.slc_v,
        o_slc,
        do,
        lse_slc,
        block_indices,
        starts,
        offset,
        g_slc,
        dq,
        **settings.selected,
    )
    dq, win_dk, win_dv, win_delta = window_branch.backward(
        q, keys.win_k, keys.win_v, o_win, do, lse_win, window_starts, window_offset, g_win, dq, **settings.window_branch
    )
    B, Tq, H, _ = q.shape
    K = keys.slc_k.shape[2]
    dgates = [
        jnp.moveaxis(delta.reshape(B, K, Tq, H // K), 1, 2).reshape(B, Tq, H)
        for delta in (cmp_delta, slc_delta, win_delta)
    ]
    no_gradients = jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), (places, given))
    return dq, Keys(cmp_dk, cmp_dv, slc_dk, slc_dv, win_dk, win_dv), jnp.stack(dgates, axis=-1), *no_gradients


_attend.defvjp(_forward, _backward)
