"""What was read of a pretrained model, as the folder of a run."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from train.checkpoints.checkpointer import Checkpointer
from train.config import DataConfig, TrainConfig
from train.data.tokenizer import HuggingFaceTokenizer
from train.pretrained import chat_template
from train.pretrained.hugging_face import Pretrained
from train.pretrained.weights import own_parameters, to_parameters
from train.run_folder import describe, tokenizer_digest, write

Dtype = Literal["float32", "bfloat16"]
STEP = 0  # of the checkpoint: no step of this trainer was made


class _NoData:
    """The data position of a model that this trainer has shown no data."""

    def __next__(self) -> Any:
        raise StopIteration

    def get_state(self) -> None:
        """Nothing."""

    def set_state(self, state: Any, /) -> None:
        """Nothing."""


def save_run(pretrained: Pretrained, run_dir: Path, *, dtype: Dtype = "float32") -> TrainConfig:
    """Writes the folder of a run with a pretrained model, its tokenizer and its chat template; returns its settings.

    Args:
      pretrained: what was read.
      run_dir: the folder, which must not hold files yet.
      dtype: of the computation, as `model.dtype`; parameters are float32.

    Raises:
      ValueError: tensors or tokenizer do not fit the model.
    """
    tokenizer = tokenizer_of(pretrained)
    params = parameters(pretrained, tokenizer.vocab_size)
    run_dir.mkdir(parents=True, exist_ok=True)
    tokenizer_file = run_dir / "tokenizer.json"
    write(tokenizer_file, pretrained.tokenizer)
    config = TrainConfig(
        model=dataclasses.replace(pretrained.config, dtype=dtype),
        data=DataConfig(tokenizer=str(tokenizer_file), sequence_length=pretrained.context_length),
        run_dir=run_dir,
    )
    with Checkpointer(run_dir / "checkpoints", config.checkpoint) as checkpointer:
        checkpointer.save(STEP, {"params": params}, _NoData())
    if pretrained.chat_template is not None:
        chat_template.save(pretrained.chat_template, run_dir)
    describe(config, {"vocab_size": tokenizer.vocab_size, "tokenizer": tokenizer_digest(tokenizer_file)})
    return config


def tokenizer_of(pretrained: Pretrained) -> HuggingFaceTokenizer:
    """The tokenizer of a pretrained model; ValueError where it is none that the trainer can use."""
    return HuggingFaceTokenizer(pretrained.tokenizer, f"the tokenizer of {pretrained.source}")


def parameters(pretrained: Pretrained, vocab_size: int) -> Any:
    """The parameters of a pretrained model with a tokenizer of `vocab_size` tokens, as a tree of float32 JAX arrays.

    Raises:
      ValueError: a tensor does not fit; see `train.pretrained.weights`.
    """
    convert = own_parameters if pretrained.family is None else to_parameters
    return jax.tree.map(jnp.asarray, convert(pretrained.tensors, pretrained.config, vocab_size, pretrained.source))
