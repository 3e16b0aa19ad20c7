"""Runs by name. Each says what it should reach, on what, in how long, from a run that was made."""

from pathlib import Path

from nsa_jax import NSAConfig
from train.config import CheckpointConfig, DataConfig, ModelConfig, OptimizerConfig, TrainConfig


def tiny() -> TrainConfig:
    """A byte model on the standard library's source, for two CPU cores.

    Measured on two cores of a shared machine, Python 3.11, compilation, evaluations and sample included:
    2.52 held-out bits per byte in 3 min 17 s with NSA, 2.69 in 2 min 50 s with --attention full.
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


def h100_60m() -> TrainConfig:
    """65M parameters (61M with full attention) at 8k tokens, bf16, for one 80 GB GPU: 100M tokens of source code.

    Measured on one H100 80GB, JAX 0.11.2, bytes of Python source: 0.940 held-out bits per byte in 7 min 8 s with NSA,
    0.885 in 6 min 1 s with --attention full.
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


def h100_350m() -> TrainConfig:
    """366M parameters (333M with full attention) at 64k tokens, bf16, for one 80 GB GPU.

    Measured on one H100 80GB, JAX 0.11.2, random tokens: 52,540 tokens/s with NSA, 17,471 with --attention full. No
    run of it to its end was made.
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
            remat="full",
        ),
        data=DataConfig(sequence_length=65536, batch_size=1, isolate_documents=False),
        optimizer=OptimizerConfig(learning_rate=6e-4, warmup_steps=200),
        checkpoint=CheckpointConfig(every=500),
        run_dir=Path("runs/h100-350m"),
        steps=5000,
        eval_every=500,
    )


PRESETS = {"tiny": tiny, "h100-60m": h100_60m, "h100-350m": h100_350m}
