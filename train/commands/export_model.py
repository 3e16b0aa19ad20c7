"""Makes a Hugging Face folder of a run: `python -m train export --run RUN --out FOLDER`."""

import dataclasses
import shutil
from pathlib import Path

from train.checkpoints.saved import load_model
from train.commands.output import check_empty, missing_extra
from train.pretrained import chat_template
from train.pretrained.export import Dtype, export


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Writes the model of a run as a folder of safetensors, config.json and tokenizer.json.

    transformers loads the folder of a dense model. `python -m train import` reads both.
    """

    run: Path  # the run's folder
    out: Path  # the folder to write, which must not hold files yet
    step: int | None = None  # of the checkpoint; None: the newest
    dtype: Dtype = "float32"  # of the numbers written


def export_model(arguments: Arguments) -> None:
    """Writes the folder and prints what reads it.

    Raises:
      ValueError: there is no such run, or `out` is not empty.
      CheckpointError: the run has no such checkpoint, or it cannot be read.
    """
    check_empty("out", arguments.out)
    saved, template = load_model(arguments.run, step=arguments.step), chat_template.load(arguments.run)
    unfinished = arguments.out.with_name(arguments.out.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # of an earlier call that did not come to its end
    unfinished.mkdir(parents=True)
    with missing_extra("pretrained"):
        reader = export(saved, template, unfinished, dtype=arguments.dtype)
    unfinished.replace(arguments.out)
    print(f"{arguments.out}: {reader}")
