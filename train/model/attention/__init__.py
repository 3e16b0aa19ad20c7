"""The kinds of attention that `model.attention` can name.

A new kind is one line in `KINDS` and one module, which has a subclass of `AttentionKind` and, as `KIND`, an instance.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from train.model.attention.kind import AttentionKind

# The module of each kind by its name. A module is imported when its kind is asked for, so that the config and the
# command line can list the names without it.
KINDS = {
    "nsa": "train.model.attention.nsa",
    "full": "train.model.attention.full",
    "window": "train.model.attention.window",
    "per-head": "train.model.attention.per_head",
    "per-token": "train.model.attention.per_token",
    "min-max": "train.model.attention.min_max",
    "clustering": "train.model.attention.clustering",
    "auxiliary-loss": "train.model.attention.auxiliary_loss",
    "one-softmax": "train.model.attention.one_softmax",
}


def attention_kind(name: str) -> "AttentionKind":
    """The kind of a name in `KINDS`."""
    return importlib.import_module(KINDS[name]).KIND
