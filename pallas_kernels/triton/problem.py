"""The static facts of one call, and which calls the Triton kernels take."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.export import is_symbolic_dim
from jaxtyping import Array, Float, Int

from pallas_kernels.contract import Sizes

SMALLEST_HEAD, LARGEST_HEAD = 16, 256
LOG2_E = 1.4426950408889634
LARGEST_GROUP = 64
MOST_BLOCKS = 32768  # that a query chooses among
MOST_PAIRS = 65535  # of a batch entry and a K/V head: they are the second axis of a CUDA grid


@dataclasses.dataclass(frozen=True)
class Problem:
    """Sizes, scale and the way to run: what every kernel of a call knows when it is traced."""

    compress_block: int  # l
    compress_stride: int  # d
    select_block: int  # s
    num_selected: int  # n
    num_init: int
    num_local: int
    window: int  # w
    select_in_window: bool
    scale: float
    interpret: bool

    @property
    def scale_log2(self) -> float:
        """Factor of scores whose exponential is taken in base 2."""
        return self.scale * LOG2_E


def problem_of(config: Sizes, scale: float, interpret: bool) -> Problem:
    """The problem of a call with these arguments."""
    sizes = {field.name: getattr(config, field.name) for field in dataclasses.fields(Problem)[:-2]}
    return Problem(**sizes, scale=float(scale), interpret=interpret)


def check_supported(q: jax.Array, k: jax.Array, v: jax.Array | None, *, scale: float) -> None:
    """Raises NotImplementedError, before anything is traced, for what no Triton kernel here takes.

    Shapes are those of the contracts: q [..., H, Dk], k [..., K, Dk], v [..., K, Dv] or None, batch first.
    """
    arrays = {"q": q, "k": k} | ({} if v is None else {"v": v})
    if is_symbolic_dim(q.shape[0]) or q.shape[0] == 0:
        raise NotImplementedError(f"q.shape = {q.shape}: expected a batch that is known when tracing, and not 0")
    if q.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise NotImplementedError(f"q.dtype = {q.dtype}: expected bfloat16, float16 or float32")
    for name, array in arrays.items():
        if array.dtype != q.dtype:
            raise NotImplementedError(f"{name}.dtype = {array.dtype}: expected q's, {q.dtype}")
        if not SMALLEST_HEAD <= array.shape[-1] <= LARGEST_HEAD:
            raise NotImplementedError(
                f"head_dim of {name} = {array.shape[-1]}: expected {SMALLEST_HEAD} to {LARGEST_HEAD}"
            )
    num_kv_heads = k.shape[-2]
    group = q.shape[-2] // num_kv_heads
    if group > LARGEST_GROUP:
        raise NotImplementedError(f"query heads per K/V head = {group}: expected at most {LARGEST_GROUP}")
    if q.shape[0] * num_kv_heads > MOST_PAIRS:
        raise NotImplementedError(f"batch x K/V heads = {q.shape[0] * num_kv_heads}: expected at most {MOST_PAIRS}")
    if not scale > 0:
        raise NotImplementedError(f"scale = {scale}: expected a positive number")


def check_select_block(config: Sizes) -> None:
    """Raises NotImplementedError for blocks that are not one tile of keys."""
    if not 16 <= config.select_block <= 128:
        raise NotImplementedError(f"select_block = {config.select_block}: expected 16 to 128")


def check_num_blocks(num_blocks: int) -> None:
    """Raises NotImplementedError for more blocks than the kernels that choose among them hold."""
    if num_blocks > MOST_BLOCKS:
        raise NotImplementedError(f"num_blocks = {num_blocks}: expected at most {MOST_BLOCKS}")


def offset_array(query_offset: int | Int[Array, ""]) -> Int[Array, "1"]:
    """The position of the first query as the kernels read it."""
    return jnp.asarray(query_offset, jnp.int32).reshape(1)


def heads_first(rows: Float[Array, "BK Tq G"], num_kv_heads: int) -> Float[Array, "B H Tq"]:
    """Statistics of the rows as the contracts lay them out, from the layout in which kernels read them fastest."""
    pairs, num_queries, group = rows.shape
    return rows.swapaxes(1, 2).reshape(pairs // num_kv_heads, num_kv_heads * group, num_queries)


def group_last(statistics: Float[Array, "B H Tq"], num_kv_heads: int) -> Float[Array, "BK Tq G"]:
    """The reverse of `heads_first`."""
    batch, num_heads, num_queries = statistics.shape
    group = num_heads // num_kv_heads
    return statistics.reshape(batch * num_kv_heads, group, num_queries).swapaxes(1, 2)
