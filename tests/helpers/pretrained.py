"""The tiny pretrained models that `tests/train/pretrained/make_models.py` makes."""

from pathlib import Path

import jax
import numpy as np

from train.model.transformer import Transformer, logits
from train.pretrained.hugging_face import Pretrained
from train.pretrained.run import parameters, tokenizer_of

MODELS = Path(__file__).parents[1] / "train" / "pretrained" / "models"
NAMES = ("llama2", "llama3", "mistral", "smollm2", "qwen2", "qwen3")


def expected(name: str) -> dict[str, np.ndarray]:
    """What transformers computes: the logits of some tokens, and the prompt of a conversation."""
    return dict(np.load(MODELS / name / "expected.npz"))


def parameters_of(pretrained: Pretrained):
    return parameters(pretrained, tokenizer_of(pretrained).vocab_size)


def logits_of(config, params, vocab_size: int, tokens: np.ndarray) -> np.ndarray:
    """Logits of tokens [B, T] for the tokens of the vocabulary."""
    model = Transformer(config, vocab_size)
    forward = jax.jit(lambda params, tokens: logits(params, model.apply({"params": params}, tokens), config))
    return np.asarray(forward(params, tokens))[..., :vocab_size]
