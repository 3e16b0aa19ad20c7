"""AdamW or Muon, with warm-up and cosine or late linear decay, clipped by global norm, decaying matrices only."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

from train.config import OptimizerConfig

# Matrices that Muon orthogonalises, by name: how many axes it sums over and how many it makes, counted from the end.
# Axes before these, of stacked layers and experts, hold matrices that are orthogonalised one by one.
_MATRIX_AXES = {
    "q_kernel": (1, 2),
    "k_kernel": (1, 2),
    "v_kernel": (1, 2),
    "o_kernel": (2, 1),
    "gate_kernel": (1, 1),
    "up_kernel": (1, 1),
    "down_kernel": (1, 1),
    "phi_k_in_kernel": (2, 1),
    "phi_v_in_kernel": (2, 1),
    "phi_k_out_kernel": (1, 1),
    "phi_v_out_kernel": (1, 1),
    "shared_gate_kernel": (1, 1),
    "shared_up_kernel": (1, 1),
    "shared_down_kernel": (1, 1),
    "gate_in_kernel": (1, 1),
    "gate_out_kernel": (1, 2),
} | {f"{branch}_{kind}_kernel": (1, 2) for branch in ("cmp", "slc", "win") for kind in "kv"}


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by the number of updates made before.

    Linear warm-up, at `learning_rate` in update `warmup_steps`, then down to `final_fraction` of it in update `steps`:
    in a cosine from there on, or, with `schedule` "wsd", in a line over the last `decay_fraction` of the steps.
    Updates count from 1, so that the first one is not spent on a rate of 0. Of a run without steps nothing is asked.
    """
    if not steps:
        return optax.constant_schedule(config.learning_rate)
    init_value = 0.0 if config.warmup_steps else config.learning_rate
    end_value = config.learning_rate * config.final_fraction
    if config.schedule == "wsd":
        decay = min(round(config.decay_fraction * steps), steps - config.warmup_steps)
        schedule = optax.join_schedules(
            [
                optax.linear_schedule(init_value, config.learning_rate, config.warmup_steps),
                optax.constant_schedule(config.learning_rate),
                optax.linear_schedule(config.learning_rate, end_value, decay),
            ],
            [config.warmup_steps, steps - decay],
        )
    else:
        schedule = optax.warmup_cosine_decay_schedule(
            init_value=init_value,
            peak_value=config.learning_rate,
            warmup_steps=config.warmup_steps,
            decay_steps=steps,
            end_value=end_value,
        )
    return lambda count: schedule(count + 1)


def decays(path: tuple[Any, ...]) -> bool:
    """Whether weight decay applies to the parameter at a path of the tree: to kernels and embeddings.

    The name decides, not the number of axes: layers are stacked, so that a norm's scale has two. Biases, norms and
    position embeddings do not decay.
    """
    name = _name(path)
    if name == "embedding" or name.endswith("_kernel"):
        return True
    if name == "scale" or name.endswith(("_bias", "_position", "_scale")):
        return False
    raise ValueError(f"parameter {jax.tree_util.keystr(path)}: its name does not say whether weight decay applies")


def matrix_dimensions(path: tuple[Any, ...]) -> MuonDimensionNumbers | None:
    """Which axes of the parameter at a path make the matrix that Muon orthogonalises; None: AdamW updates it.

    AdamW keeps the embedding, the output layer, norms, biases, position embeddings and the router of experts. The
    heads of a projection make one matrix together.
    """
    if _name(path) not in _MATRIX_AXES:
        return None
    summed, made = _MATRIX_AXES[_name(path)]
    return MuonDimensionNumbers(tuple(range(-summed - made, -made)), tuple(range(-made, 0)))


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The update of a run of `steps` steps.

    With `kind` "muon", matrices inside the layers follow Muon (Jordan et al., 2024), with updates of root mean square
    `muon_rms`, so that one learning rate and one weight decay serve both parts (arXiv 2502.16982, section 2.2).
    """
    schedule = learning_rate_schedule(config, steps)
    update = optax.adamw(schedule, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay, mask=_by_path(decays))
    if config.kind == "muon":
        matrices = muon(
            schedule,
            beta=config.muon_beta,
            weight_decay=config.weight_decay,
            muon_weight_dimension_numbers=_by_path(matrix_dimensions),
            consistent_rms=config.muon_rms,
        )
        # Not Optax's own AdamW inside `muon`, which decays all of its parameters or none.
        update = optax.partition(
            {"muon": matrices, "adamw": update},
            _by_path(lambda path: "adamw" if matrix_dimensions(path) is None else "muon"),
        )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), update)


def _by_path(value_of: Callable[[tuple[Any, ...]], Any]) -> Callable[[Any], Any]:
    """A function from a tree of parameters to the tree of `value_of` each one's path."""
    return lambda params: jax.tree_util.tree_map_with_path(lambda path, _: value_of(path), params)


def _name(path: tuple[Any, ...]) -> str:
    # Below the name there is one more entry while flax's boxes are still around the arrays.
    return [str(entry.key) for entry in path if isinstance(entry, jax.tree_util.DictKey)][-1]
