"""One layer's attention with its tokens split over devices: `python -m train benchmark context`.

Prints and writes milliseconds of forward, and of forward and backward, of `nsa_jax.nsa_attention` under context
parallelism, batch 1, random queries, keys, values and gates, and the compiler's count of memory on a device.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from nsa_jax import BranchKV, NSAConfig, nsa_attention, num_compressed
from nsa_jax.context import received_bytes
from nsa_jax.sharding import sharded
from pallas_kernels.benchmarks.timing import memory_gib, time_call
from train.commands.benchmark.figures import write_figures


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to measure."""

    lengths: tuple[int, ...] = (262144, 524288, 1048576)  # T, of the whole sequence
    devices: tuple[int, ...] = (1, 2, 4, 8)  # that split it
    num_heads: int = 64  # H
    num_kv_heads: int = 4  # K
    head_dim: int = 128  # Dk and Dv
    out: Path = Path("context_speed.json")  # where the figures go


def measure(arguments: Arguments, T: int, devices: int) -> dict[str, Any]:
    """One row of figures."""
    H, K, D, config = arguments.num_heads, arguments.num_kv_heads, arguments.head_dim, NSAConfig()
    mesh = jax.make_mesh(
        (devices,), ("context",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:devices]
    )
    split = NamedSharding(mesh, PartitionSpec(None, "context"))
    key = jax.random.key(0)

    def normal(i: int, tokens: int, heads: int, size: int) -> jax.Array:
        shape = (1, tokens, heads, size)
        make = jax.jit(lambda key: jax.random.normal(key, shape, jnp.bfloat16), out_shardings=split)
        return make(jax.random.fold_in(key, i))

    # On several devices there is a compressed token for every stride; the last ones reach beyond the end.
    compressed = num_compressed(T, config) if devices == 1 else T // config.compress_stride
    kv = BranchKV(*(normal(i, tokens, K, D) for i, tokens in enumerate([compressed] * 2 + [T] * 4)))
    q, cotangent = normal(6, T, H, D), normal(7, T, H, D)
    gates = jax.jit(lambda x: jax.nn.sigmoid(x.astype(jnp.float32)), out_shardings=split)(normal(8, T, H, 3))
    attention = sharded(nsa_attention, context_axes="context")

    def forward(q: jax.Array, kv: BranchKV, gates: jax.Array) -> jax.Array:
        return attention(q, kv, gates, config=config)

    def both(q: jax.Array, kv: BranchKV, gates: jax.Array, cotangent: jax.Array) -> Any:
        o, vjp = jax.vjp(forward, q, kv, gates)
        return o, vjp(cotangent)

    row: dict[str, Any] = {"T": T, "devices": devices}
    with jax.set_mesh(mesh):
        for name, f, inputs in (("forward", forward, (q, kv, gates)), ("both", both, (q, kv, gates, cotangent))):
            compiled = jax.jit(f).lower(*inputs).compile()
            row[f"{name}_ms"] = dataclasses.asdict(time_call(compiled, inputs))
            row[f"{name}_memory_gib"] = memory_gib(compiled)
    row["backward_ms"] = row["both_ms"]["median"] - row["forward_ms"]["median"]
    sizes = {"num_heads": H, "num_kv_heads": K, "head_dim": D, "v_head_dim": D, "itemsize": 2}
    row["received_forward_bytes"] = received_bytes("nsa", config, T=T, devices=devices, **sizes)
    return row


def benchmark(arguments: Arguments) -> None:
    """Measures, prints and writes; what does not fit a device's memory is written as an error."""
    rows: list[dict[str, Any]] = []
    for T in arguments.lengths:
        for devices in arguments.devices:
            if devices > jax.device_count():
                continue
            try:
                rows.append(measure(arguments, T, devices))
            except jax.errors.JaxRuntimeError as error:
                rows.append({"T": T, "devices": devices, "error": str(error)[:300]})
            print(rows[-1], flush=True)
            write_figures(arguments, rows)
