"""What is logged and where: JSON lines always, TensorBoard and Weights & Biases on request; FLOPs and utilisation."""

import json
import math
import os
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np

from train.config import ModelConfig, TrainConfig
from train.model import padded_vocabulary

# Dense bf16 peak in FLOP/s, by a part of the device kind. The first that matches counts: narrower names come first.
PEAK_FLOPS = (
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("H200", 989e12),
    ("GH200", 989e12),
    ("B200", 2250e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("L4", 121e12),
)


def peak_flops(device_kind: str) -> float | None:
    """Dense bf16 peak of a device in FLOP/s; None where it is not known."""
    return next((flops for name, flops in PEAK_FLOPS if name in device_kind), None)


def device_peak_flops() -> float | None:
    """Peak of all devices of the run together; None where it is not known."""
    peak = peak_flops(jax.devices()[0].device_kind)
    return None if peak is None else peak * jax.device_count()


def total_parameters(params: Any) -> int:
    """Entries of a tree of arrays or of their shapes."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(params))


def active_parameters(total: int, config: ModelConfig) -> int:
    """Of `total` parameters, those that one token uses: all but the routed experts that it does not choose."""
    moe = config.moe
    if not moe.num_routed:
        return total
    idle = moe.num_routed - moe.top_k
    return total - (config.num_layers - moe.first_dense) * idle * 3 * config.embed_dim * moe.expert_dim


def train_flops_per_token(config: ModelConfig, sequence_length: int, vocab_size: int) -> float:
    """Model FLOPs that training on one token of one full sequence takes, averaged over the T positions.

    Multiplications and additions of matrix products, 2 per multiply-add, times 3 for forward and backward. Attention
    counts the keys that a query really reads: all up to its own, its window, or the visible compressed tokens, the
    tokens of its selected blocks and its window. Of the routed experts, those that a token chooses count. Left out are
    what has no matrix product, what is done twice (remat, and scoring blocks with the compressed branch's own logits),
    and document boundaries.
    """
    E, H, K = config.embed_dim, config.num_heads, config.num_kv_heads
    Dk = config.head_dim
    Dv = Dk if config.v_head_dim is None else config.v_head_dim
    position = np.arange(sequence_length)
    branches = 1
    extra = 0.0  # multiply-adds per token of phi and the gates
    if config.attention == "full":
        keys = position + 1
    elif config.attention == "window":
        keys = np.minimum(position + 1, config.nsa.window)
    else:
        sizes = config.nsa
        l, d, s = sizes.compress_block, sizes.compress_stride, sizes.select_block  # noqa: E741
        compressed = np.where(position >= l - 1, (position - l + 1) // d + 1, 0)
        selected = position % s + 1 + s * np.minimum(position // s, sizes.num_selected - 1)
        keys = compressed + selected + np.minimum(position + 1, sizes.window)
        branches = 1 if config.share_kv else 3
        gate_hidden = max(1, E // 4)
        extra += E * gate_hidden + gate_hidden * 3 * H
        sizes_of_phi = (Dv,) if config.tie_keys else (Dk, Dv)
        phi = {
            "mlp": sum(l * D * 2 * D + 2 * D * D for D in sizes_of_phi),
            "linear": sum(l * D * D for D in sizes_of_phi),
            "mean": 0,
        }[config.compression]
        extra += phi * K * compressed[-1] / sequence_length
    projections = E * H * Dk + H * Dv * E + branches * E * K * (Dk + Dv)
    if config.attention == "nsa" and config.tie_keys:
        projections -= E * K * Dk
    attention = H * (Dk + Dv) * float(keys.mean())
    moe = config.moe
    num_dense = moe.first_dense if moe.num_routed else config.num_layers
    experts = E * moe.num_routed + 3 * E * moe.expert_dim * (moe.top_k + moe.num_shared)
    mlps = num_dense * 3 * E * config.mlp_dim + (config.num_layers - num_dense) * experts
    layers = config.num_layers * (projections + attention + extra) + mlps
    return 3 * 2 * (layers + E * padded_vocabulary(vocab_size))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The dicts of a metrics file, oldest first. A last line that was cut off in writing is left out."""
    if not path.exists():
        return []
    entries = []
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n"):
            entries.append(json.loads(line))
    return entries


class MetricsLog:
    """Appends one dict per step to `run_dir/metrics.jsonl`, and to the services that the config asks for."""

    def __init__(self, config: TrainConfig, *, first_step: int, silent: bool = False):
        """Opens the log of a run that goes on at `first_step`; what an earlier process logged from there on is dropped.

        `silent`: writes nothing, as every process but the first.

        Raises:
          ImportError: TensorBoard or Weights & Biases is asked for but not installed; says which extra brings it.
        """
        self.path = config.run_dir / "metrics.jsonl"
        self._file: IO[str] | None = None
        self._tensorboard = self._wandb = None
        if silent:
            return
        self._tensorboard = _open_tensorboard(config) if config.tensorboard else None
        self._wandb = _open_wandb(config) if config.wandb is not None else None
        kept = [entry for entry in read_metrics(self.path) if entry["step"] < first_step]
        rewritten = self.path.with_suffix(".tmp")
        rewritten.write_text("".join(json.dumps(entry) + "\n" for entry in kept))
        os.replace(rewritten, self.path)
        self._file = self.path.open("a")

    def write(self, step: int, values: dict[str, float]) -> None:
        """Logs the values of a step; on disk, as far as this process goes, when it returns."""
        if self._file is not None:
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def close(self) -> None:
        """Ends the log."""
        if self._file is not None:
            self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def _open_tensorboard(config: TrainConfig) -> Any:
    try:
        from tensorboard.summary import Writer
    except ImportError as error:
        raise ImportError("tensorboard = True: TensorBoard is missing; install nsa-jax[tensorboard]") from error
    return Writer(str(config.run_dir / "tensorboard"))


def _open_wandb(config: TrainConfig) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ImportError(f"wandb = {config.wandb}: Weights & Biases is missing; install nsa-jax[wandb]") from error
    # The same id for the same folder, so that a resumed run goes on in its own curve.
    return wandb.init(project=config.wandb, name=config.run_dir.name, id=config.run_dir.name, resume="allow")
