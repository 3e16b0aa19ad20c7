"""For which calls each pass is faster on Mosaic GPU than on Triton: data, measured on an H100.

`implementation=None` goes by these tables.
"""

import dataclasses
from collections.abc import Mapping

import jax


@dataclasses.dataclass(frozen=True)
class Call:
    """What a row is looked up by."""

    head_dims: tuple[int, ...]  # of keys and of values; of block selection, which has no values, of keys
    group: int  # query heads per K/V head
    queries: int
    itemsize: int  # bytes of an element

    def __str__(self) -> str:
        head_dims = "/".join(map(str, self.head_dims))
        return f"{self.queries} queries of {8 * self.itemsize} bits, head_dim {head_dims}, {self.group} heads a group"


@dataclasses.dataclass(frozen=True)
class Row:
    """Calls for which a pass is faster, with elements of 16 bits, and what was measured."""

    head_dims: tuple[int, ...]
    groups: tuple[int, int]  # from and to
    queries: int  # at least
    measured: str  # milliseconds for so many queries, Mosaic / Triton

    def matches(self, call: Call) -> bool:
        """Whether the row is for such calls."""
        return (
            call.itemsize == 2
            and call.head_dims == self.head_dims
            and self.groups[0] <= call.group <= self.groups[1]
            and call.queries >= self.queries
        )


Table = tuple[Row, ...]

# Of one sequence with 4 K/V heads, the default sizes and bfloat16. A row begins at the shortest length from which on
# Mosaic took less time in every measurement, with random and with local blocks.
FASTER: Mapping[str, Table] = {
    "compressed_attention": (
        Row((128, 128), (16, 16), 8192, "0.187 / 0.315; T 65536 7.35 / 10.6"),
        Row((128, 128), (1, 16), 65536, "G 4: 2.10 / 2.52; G 1: 0.573 / 0.644"),
        Row((192, 128), (16, 16), 65536, "9.52 / 14.6"),
        Row((64, 64), (16, 16), 65536, "5.37 / 5.83"),
    ),
    "compressed_attention_backward": (
        Row((128, 128), (16, 16), 16384, "with forward 2.84 / 3.30; T 65536 25.2 / 30.4; T 8192 1.02 / 0.82"),
        Row((64, 64), (16, 16), 65536, "15.7 / 17.5"),
    ),
    "select_blocks": (
        Row((128,), (16, 16), 16384, "0.53 / 0.69; T 65536 5.84 / 8.11; T 8192, 8 rows of K 1 0.59 / 0.55"),
        Row((192,), (16, 16), 65536, "6.90 / 11.3"),
        Row((64,), (16, 16), 65536, "5.42 / 6.44"),
    ),
    "selected_attention": (
        Row((128, 128), (16, 16), 8192, "1.37 / 1.86 random, 0.91 / 0.98 local; T 65536 15.7 / 17.5, 7.42 / 8.85"),
        Row((192, 128), (16, 16), 65536, "21.4 / 22.6 random, 9.02 / 20.7 local"),
    ),
    "selected_attention_backward": (
        Row((128, 128), (16, 16), 8192, "3.30 / 3.90 random, 2.61 / 2.74 local; T 65536 29.9 / 32.4, 20.5 / 20.8"),
        Row((192, 128), (16, 16), 65536, "42.5 / 53.6 random, 28.7 / 50.6 local"),
    ),
    "window_attention": (
        Row((128, 128), (16, 16), 8192, "0.316 / 0.400; T 65536 2.50 / 3.20; T 2048 not faster"),
        Row((128, 128), (1, 16), 65536, "G 4: 0.68 / 0.96; G 1: 0.242 / 0.266"),
        Row((192, 128), (16, 16), 65536, "2.89 / 4.61"),
        Row((64, 64), (16, 16), 65536, "1.75 / 2.06"),
    ),
    "window_attention_backward": (
        Row((128, 128), (16, 16), 8192, "1.28 / 1.44; T 65536 8.89 / 11.8"),
        Row((64, 64), (16, 16), 65536, "5.60 / 6.38"),
    ),
}


def check_faster(faster: Mapping[str, Table], name: str, q: jax.Array, k: jax.Array, v: jax.Array | None) -> None:
    """Raises NotImplementedError unless a row of the pass `name` is for these arrays, shaped as in the contracts."""
    head_dims = tuple(x.shape[-1] for x in (k, v) if x is not None)
    call = Call(head_dims, q.shape[-2] // k.shape[-2], q.shape[1], q.dtype.itemsize)
    if not any(row.matches(call) for row in faster.get(name, ())):
        raise NotImplementedError(f"not measured to be faster than triton: {call}")
