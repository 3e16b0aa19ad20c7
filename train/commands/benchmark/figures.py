"""What the benchmarks share: what they compare, and the file of figures that they write."""

import dataclasses
import json
from typing import Any

import jax

from train.config import Attention

VOCABULARY = 258  # of the byte tokenizer
ATTENTIONS: tuple[Attention, ...] = ("nsa", "full")  # that are compared


def write_figures(arguments: Any, rows: list[dict[str, Any]]) -> None:
    """Writes what was measured so far to `arguments.out`, with the device and the arguments themselves."""
    device = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    result = {**device, **dataclasses.asdict(arguments), "rows": rows}
    arguments.out.write_text(json.dumps(result, indent=1, default=str))
