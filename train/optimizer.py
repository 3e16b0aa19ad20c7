"""AdamW with warm-up and cosine decay, clipped by global norm, decaying matrices only."""

from typing import Any

import jax
import optax

from train.config import OptimizerConfig


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by the number of updates made before.

    Linear warm-up, at `learning_rate` in update `warmup_steps`, then a cosine down to `final_fraction` of it in update
    `steps`. Updates count from 1, so that the first one is not spent on a rate of 0.
    """
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0 if config.warmup_steps else config.learning_rate,
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=steps,
        end_value=config.learning_rate * config.final_fraction,
    )
    return lambda count: schedule(count + 1)


def decays(path: tuple[Any, ...]) -> bool:
    """Whether weight decay applies to the parameter at a path of the tree: to kernels and embeddings.

    The name decides, not the number of axes: layers are stacked, so that a norm's scale has two. Biases, norms and
    position embeddings do not decay.
    """
    # While flax's boxes are still around the arrays, the path has one more entry after the name.
    name = [str(entry.key) for entry in path if isinstance(entry, jax.tree_util.DictKey)][-1]
    if name == "embedding" or name.endswith("_kernel"):
        return True
    if name == "scale" or name.endswith(("_bias", "_position")):
        return False
    raise ValueError(f"parameter {jax.tree_util.keystr(path)}: its name does not say whether weight decay applies")


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The update of a run of `steps` steps."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate_schedule(config, steps),
            b1=config.b1,
            b2=config.b2,
            weight_decay=config.weight_decay,
            mask=lambda params: jax.tree_util.tree_map_with_path(lambda path, _: decays(path), params),
        ),
    )
