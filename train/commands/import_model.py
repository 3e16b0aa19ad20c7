"""Makes a run of a pretrained model: `python -m train import FOLDER_OR_FILE --out RUN`.

The folder is one of Hugging Face (config.json, safetensors, tokenizer.json), the file a GGUF file. The run is read as
any other. To train on from it, name its folder in the place of a preset.
"""

import dataclasses
from pathlib import Path

import tyro

from train.commands.output import check_empty, missing_extra
from train.pretrained.read import read
from train.pretrained.run import Dtype, save_run


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Reads a pretrained model and writes the folder of a run."""

    source: tyro.conf.Positional[Path]  # a Hugging Face folder, or a GGUF file
    out: Path  # the run's folder, which must not hold files yet
    dtype: Dtype = "float32"  # of the run's computation; parameters are float32


def import_model(arguments: Arguments) -> None:
    """Writes the run's folder and prints what is in it.

    Raises:
      ValueError: the model cannot be read, naming file, field, value and what was expected; or `out` is not empty.
    """
    check_empty("out", arguments.out)
    with missing_extra("pretrained"):
        pretrained = read(arguments.source)
        config = save_run(pretrained, arguments.out, dtype=arguments.dtype)
    model = config.model
    family = "a model of this trainer" if pretrained.family is None else pretrained.family.name
    print(
        f"{arguments.out}: {family}, attention = {model.attention_name}, {model.num_layers} layers of "
        f"{model.embed_dim}, {pretrained.context_length} tokens of context"
    )
    template = "none: generate --chat writes the trainer's, which this model was not trained with"
    if pretrained.chat_template is not None:
        template = "its own, which generate --chat uses"
    print(f"chat template: {template}")
    print(f"train on from it: python -m train {arguments.out} --run-dir NEW")
