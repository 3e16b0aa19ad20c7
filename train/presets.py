"""Runs by name. Each says what it should reach, on what, in how long, from a run that was made.

A new preset is one function here, under `@preset`.
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import tyro

from nsa_jax import NSAConfig, RopeScaling
from train.config import (
    CheckpointConfig,
    DataConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    TrainConfig,
)
from train.run_folder import read_config

PRESETS: dict[str, Callable[[], TrainConfig]] = {}


def preset(make: Callable[[], TrainConfig]) -> Callable[[], TrainConfig]:
    """Makes a function that returns a config a preset, called as the function is, with hyphens."""
    PRESETS[make.__name__.replace("_", "-")] = make
    return make


def named(name: str) -> TrainConfig:
    """The preset of a name, or the settings of the run in a folder.

    Raises:
      ValueError: there is neither, or the run's settings cannot be read.
    """
    if name in PRESETS:
        return PRESETS[name]()
    if is_run(name):
        return _from_run(Path(name))
    raise ValueError(f"preset = {name!r}: expected one of {', '.join(PRESETS)}, or the folder of a run")


def parse(arguments: Sequence[str], prog: str = "python -m train") -> TrainConfig:
    """The config that a command line asks for: a preset, or the folder of a run to start from, changed by its flags.

    Raises:
      SystemExit: for help, and with code 2 where a flag is unknown or its value of the wrong type.
      ValueError: a setting is impossible, or those of the run cannot be read.
    """
    if arguments and arguments[0] not in PRESETS and is_run(arguments[0]):
        return tyro.cli(TrainConfig, prog=prog, default=named(arguments[0]), args=list(arguments[1:]))
    presets = {name: ((preset.__doc__ or "").strip(), preset()) for name, preset in PRESETS.items()}
    if list(arguments) in (["--help"], ["-h"]):
        with contextlib.suppress(SystemExit):
            tyro.extras.overridable_config_cli(presets, prog=prog, args=["--help"])
        # Every preset has the same fields; these show the defaults of the first.
        arguments = [next(iter(presets)), "--help"]
    return tyro.extras.overridable_config_cli(presets, prog=prog, args=list(arguments))


def is_run(name: str) -> bool:
    """Whether a word in the place of a preset is the folder of a run."""
    return not name.startswith("-") and os.path.isfile(os.path.join(name, "config.json"))


def _from_run(run: Path) -> TrainConfig:
    """The settings of a run, for another one that starts from its parameters and needs a folder of its own."""
    config = read_config(run)
    file = run / "tokenizer.json"  # which is there after the folder was moved, too
    data = dataclasses.replace(config.data, tokenizer=str(file)) if file.is_file() else config.data
    return dataclasses.replace(config, data=data, init_from=run, init_step=None, run_dir=run)


@preset
def tiny() -> TrainConfig:
    """A byte model on the standard library's source, for two CPU cores.

    Measured on two cores of a shared machine, Python 3.11: 2.62 held-out bits per byte with NSA, 2.69 with
    --attention full.
    """
    return TrainConfig(
        model=ModelConfig(
            num_layers=2,
            embed_dim=192,
            num_heads=6,
            num_kv_heads=1,
            head_dim=32,
            mlp_dim=512,
            nsa=NSAConfig(
                compress_block=16,
                compress_stride=8,
                select_block=16,
                num_selected=8,
                num_init=1,
                num_local=2,
                window=64,
            ),
        ),
        data=DataConfig(sequence_length=512, batch_size=2),
        optimizer=OptimizerConfig(learning_rate=1.5e-3, warmup_steps=25),
        run_dir=Path("runs/tiny"),
        steps=700,
        eval_batches=64,
    )


@preset
def tiny_moe() -> TrainConfig:
    """`tiny` with experts in both layers, for two CPU cores: 1.78M parameters, 0.89M of them active per token.

    Measured in one run each: over the last 25 steps the fullest expert of a layer has 1.50 times the mean load, and
    2.96 times with --model.moe.bias-speed 0; 3.46 and 3.49 held-out bits per byte.
    """
    base = tiny()
    return dataclasses.replace(
        base,
        model=dataclasses.replace(
            base.model,
            moe=MoEConfig(
                num_routed=8,
                num_shared=1,
                top_k=2,
                expert_dim=128,
                score="sigmoid",
                normalise=True,
                bias_speed=0.01,  # ten times what long runs use
            ),
        ),
        run_dir=Path("runs/tiny-moe"),
        steps=150,
        eval_batches=16,
    )


@preset
def h100_60m() -> TrainConfig:
    """63M parameters (61M with full attention) at 8k tokens, bf16, for one 80 GB GPU: 100M tokens of source code.

    Measured on one H100 80GB, JAX 0.11.2, bytes of Python source: 0.885 held-out bits per byte in 6 min 1 s with
    --attention full; 0.940 in 7 min 8 s with NSA in the paper's layout (--model.compression mlp --model.no-share-kv).
    """
    return TrainConfig(
        model=ModelConfig(
            num_layers=6,
            embed_dim=1024,
            num_heads=16,
            num_kv_heads=1,
            head_dim=64,
            mlp_dim=2560,
            dtype="bfloat16",
            remat="dots",
        ),
        # One document runs into the next, so that full attention needs no mask and goes to cuDNN.
        data=DataConfig(sequence_length=8192, batch_size=8, isolate_documents=False, held_out_fraction=0.02),
        optimizer=OptimizerConfig(learning_rate=1.5e-3, warmup_steps=100),
        checkpoint=CheckpointConfig(every=765),
        run_dir=Path("runs/h100-60m"),
        steps=1530,
        eval_every=510,
    )


@preset
def h100_350m() -> TrainConfig:
    """340M parameters (334M with full attention) at 64k tokens, bf16, for one 80 GB GPU.

    Measured on one H100 80GB, JAX 0.11.2, random tokens: 21,497 tokens/s with --attention full, 62,531 with NSA in the
    paper's layout (--model.compression mlp --model.no-share-kv). No run of it to its end was made.
    """
    return TrainConfig(
        model=ModelConfig(
            num_layers=24,
            embed_dim=1024,
            num_heads=16,
            num_kv_heads=1,
            head_dim=128,
            mlp_dim=3072,
            dtype="bfloat16",
            remat="attention",
        ),
        data=DataConfig(sequence_length=65536, batch_size=1, isolate_documents=False),
        optimizer=OptimizerConfig(learning_rate=6e-4, warmup_steps=200),
        checkpoint=CheckpointConfig(every=500),
        run_dir=Path("runs/h100-350m"),
        steps=5000,
        eval_every=500,
    )


@preset
def paper_27b() -> TrainConfig:
    """The 27B mixture-of-experts model of the NSA paper (arXiv 2502.11089, section 4.1), on a multiple of 64 GPUs.

    From the paper: layers, heads, experts, the first layer dense, NSA's block sizes, 8k tokens, 270B tokens in all. It
    does not give widths of experts and MLP: the dense one is DeepSeekMoE-16B's 10944, and 1472 is the multiple of 64
    that brings the total closest to 27B (26.90B with a tokenizer of 102400; DeepSeekMoE-16B's own 1408 gives 25.84B).
    Then 5.26B parameters are active, not the paper's 3B, which no width gives together with 27B: queries, keys, values
    and outputs of 64 heads alone are 1.9B. Batch, schedule and balancing are our choice: 2048 rows, about DeepSeekMoE's
    16M tokens a step, 16,094 steps, sigmoid scores with the balancing bias. No run of it was made.

    Give it a tokenizer: --data.tokenizer FILE --data.path FOLDER. Of n x 64 GPUs, also --optimizer.accumulate 32 / n.
    """
    return TrainConfig(
        model=ModelConfig(
            num_layers=30,
            embed_dim=2560,
            num_heads=64,
            num_kv_heads=4,
            head_dim=192,
            v_head_dim=128,
            mlp_dim=10944,
            compression="mlp",
            share_kv=False,
            moe=MoEConfig(
                num_routed=72,
                num_shared=2,
                top_k=6,
                expert_dim=1472,
                first_dense=1,
                score="sigmoid",
                normalise=True,
                aux_loss=1e-4,
            ),
            tie_embeddings=False,
            dtype="bfloat16",
            remat="full",
        ),
        data=DataConfig(sequence_length=8192, batch_size=2048, held_out_fraction=0.001),
        optimizer=OptimizerConfig(learning_rate=4.2e-4, warmup_steps=2000, accumulate=32),
        checkpoint=CheckpointConfig(every=500),
        mesh=MeshConfig(fsdp=8, expert=8),
        run_dir=Path("runs/paper-27b"),
        steps=16094,
        eval_every=500,
    )


@preset
def paper_27b_32k() -> TrainConfig:
    """`paper-27b` continued at 32k tokens with YaRN, as in the NSA paper (section 4.1), on a multiple of 64 GPUs.

    From the paper: the length and YaRN. Batch, steps (512 rows, 1000 steps, 16.8B tokens) and learning rate are our
    choice; the batch's tokens are those of `paper-27b`. No run of it was made.

    Start it where `paper-27b` has run, with the same tokenizer. Of n x 64 GPUs, also --optimizer.accumulate 64 / n.
    """
    before = paper_27b()
    scaling = RopeScaling("yarn", factor=4, original_length=before.data.sequence_length)
    return dataclasses.replace(
        before,
        model=dataclasses.replace(before.model, rope_scaling=scaling),
        data=dataclasses.replace(before.data, sequence_length=32768, batch_size=512),
        optimizer=dataclasses.replace(before.optimizer, learning_rate=4.2e-5, warmup_steps=100, accumulate=64),
        checkpoint=CheckpointConfig(every=200),
        mesh=MeshConfig(expert=8, context=8),
        init_from=before.run_dir,
        run_dir=Path("runs/paper-27b-32k"),
        steps=1000,
        eval_every=200,
    )
