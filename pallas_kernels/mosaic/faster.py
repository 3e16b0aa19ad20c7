"""For which calls each pass is faster on Mosaic GPU than on Triton: data, measured on an H100.

`implementation=None` goes by these tables once `BY_DEFAULT` says so.
"""

import dataclasses
from collections.abc import Mapping

import jax

# Whether `implementation=None` may take Mosaic. Until the whole attention has been measured, it is taken by name only.
BY_DEFAULT = False


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
        Row((128, 128), (16, 16), 8192, "0.200 / 0.307; T 65536 8.28 / 10.11"),
        Row((128, 128), (1, 16), 65536, "G 4: 2.10 / 2.52; G 1: 0.573 / 0.644"),
        Row((192, 128), (16, 16), 65536, "9.9 / 14.5"),
        Row((64, 64), (16, 16), 65536, "5.67 / 5.71"),
    ),
    "compressed_attention_backward": (Row((128, 128), (16, 16), 65536, "24.5 / 30"),),
    "select_blocks": (
        Row((128,), (16, 16), 65536, "8.05 / 8.27; T 8192 0.250 / 0.210; G 1 3.1 / 2.6"),
        Row((192,), (16, 16), 65536, "8.7 / 11.2"),
        Row((64,), (16, 16), 65536, "5.57 / 6.44"),
    ),
    "selected_attention": (
        Row((128, 128), (16, 16), 8192, "1.38 / 1.78 random, 0.83 / 0.91 local; T 65536 15.4 / 17.0, 6.98 / 8.07"),
    ),
    "window_attention": (
        Row((128, 128), (16, 16), 8192, "0.336 / 0.400; T 65536 2.65 / 3.12; T 2048 not faster"),
        Row((128, 128), (1, 16), 65536, "G 4: 0.68 / 0.96; G 1: 0.242 / 0.266"),
        Row((192, 128), (16, 16), 65536, "3.15 / 4.55"),
        Row((64, 64), (16, 16), 65536, "1.80 / 1.97"),
    ),
    "window_attention_backward": (Row((128, 128), (16, 16), 65536, "9.0 / 11.3"),),
}


def check_faster(faster: Mapping[str, Table], name: str, q: jax.Array, k: jax.Array, v: jax.Array | None) -> None:
    """Raises NotImplementedError unless a row of the pass `name` is for these arrays, shaped as in the contracts."""
    head_dims = tuple(x.shape[-1] for x in (k, v) if x is not None)
    call = Call(head_dims, q.shape[-2] // k.shape[-2], q.shape[1], q.dtype.itemsize)
    if not any(row.matches(call) for row in faster.get(name, ())):
        raise NotImplementedError(f"not measured to be faster than triton: {call}")
