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


def h100_50m() -> TrainConfig:
    """50.8M parameters (41.9M with full attention) at 8k tokens, bf16, for one 80 GB GPU. 19.7M tokens of training.

    Recorded on one H100 80GB, JAX 0.11.2, Python 3.12's library, at a median of 191,000 tokens/s with NSA and 180,000
    with full attention. With NSA: 2.73 held-out bits per byte after 100 steps and 1.96 after 200; that run was cut off
    at step 275, after 135 s. With --model.attention full: 2.94, 2.06 and, after all 300 steps and 130 s, 1.77.
    """
    return TrainConfig(
        model=ModelConfig(
            num_layers=12,
            embed_dim=512,
            num_heads=16,
            num_kv_heads=1,
            head_dim=64,
            mlp_dim=1536,
            dtype="bfloat16",
            remat="dots",
        ),
        # One document runs into the next, so that full attention needs no mask and goes to cuDNN.
        data=DataConfig(sequence_length=8192, batch_size=8, isolate_documents=False, held_out_fraction=0.05),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=50),
        checkpoint=CheckpointConfig(every=150),
        run_dir=Path("runs/h100-50m"),
        steps=300,
        eval_every=100,
    )


PRESETS = {"tiny": tiny, "h100-50m": h100_50m}
