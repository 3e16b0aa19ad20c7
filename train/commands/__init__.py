"""The commands of `python -m train`, in one table.

A new command is a module here and a line in `COMMANDS`. Modules are imported when their command is given.
"""

from typing import NamedTuple


class Command(NamedTuple):
    """Where a command is, and what it does."""

    module: str
    function: str  # of the module; takes what the two lines below say, and may return an exit code
    summary: str
    has_arguments: bool = True  # the command line fills the dataclass `Arguments` of the module
    takes_preset: bool = False  # then it goes on with a preset and its settings


COMMANDS = {
    "train": Command(
        "train.commands.train", "train", "trains a preset; the default", has_arguments=False, takes_preset=True
    ),
    "generate": Command("train.commands.generate", "generate", "continues a prompt with the model of a run"),
    "corpus": Command("train.commands.corpus", "corpus", "makes a corpus of source code from packages"),
    "evaluate": Command("train.commands.evaluate", "evaluate", "sets a run tasks over long contexts"),
    "mqar": Command("train.commands.mqar", "mqar", "trains a preset's model on associative recall", takes_preset=True),
    "import": Command("train.commands.import_model", "import_model", "makes a run of a pretrained model"),
    "export": Command("train.commands.export_model", "export_model", "makes a Hugging Face folder of a run"),
    "compare": Command("train.commands.compare", "compare", "compares a pretrained model with transformers"),
    "plan": Command("train.commands.plan", "plan", "says what a step of a preset would take", takes_preset=True),
    "positions": Command("train.commands.positions", "positions", "evaluates a run by position in the sequence"),
    "report": Command("train.commands.report", "report", "draws runs into one picture"),
    "train-tokenizer": Command(
        "train.commands.train_tokenizer", "train_tokenizer", "learns a tokenizer from the training documents"
    ),
    "benchmark speed": Command("train.commands.benchmark.speed", "benchmark", "times training steps"),
    "benchmark context": Command(
        "train.commands.benchmark.context", "benchmark", "times attention with its tokens split over devices"
    ),
    "benchmark decoding": Command("train.commands.benchmark.decoding", "benchmark", "times the sampling of tokens"),
    "benchmark prefill": Command("train.commands.benchmark.prefill", "benchmark", "times the reading of a prompt"),
}
