"""The command line: `python -m train [COMMAND] ...`; without a command, `train`.

Exit codes: 0 the command is finished; 1 it failed, and says why; 2 a setting is wrong; 130 and 143 it was stopped by
SIGINT (Ctrl-C) or SIGTERM. A run that is training saves first; when the same command is given again, it goes on.

Several processes, started by SLURM, Open MPI, Kubernetes or with --distributed.*, end with the same code; when one dies
alone, JAX ends the others within about 100 seconds. Examples: train/launch.
"""

import importlib
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

from train.checkpoints.errors import CheckpointError
from train.commands import COMMANDS
from train.commands.exit_codes import FAILED, FINISHED, WRONG_SETTING, complain
from train.signals import end_on_signals
from train.streams import make_streams_safe

PROGRAM = "python -m train"


def main(arguments: Sequence[str]) -> int:
    """Runs a command line and returns its exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    name, rest = split(arguments)
    if name not in COMMANDS:
        print(usage(name))
        return FINISHED if rest in (["--help"], ["-h"]) else WRONG_SETTING
    try:
        if rest == list(arguments):  # no command is named
            _check_preset(rest)
        function, values = _call(name, rest)
        return function(*values) or FINISHED
    except ValueError as error:
        return complain(f"error: {error}", WRONG_SETTING)
    except (CheckpointError, OSError) as error:
        return complain(f"error: {error}", FAILED)


def split(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """The name of a command and its arguments.

    Where a command of several words is not complete, the name is the words that are there; it is empty where the help
    of the program is asked for.
    """
    for words in (2, 1):
        if (name := " ".join(arguments[:words])) in COMMANDS:
            return name, list(arguments[words:])
    if arguments and any(name.startswith(f"{arguments[0]} ") for name in COMMANDS):
        return arguments[0], list(arguments[1:])
    return "" if list(arguments) in (["--help"], ["-h"]) else "train", list(arguments)


def usage(group: str = "") -> str:
    """What commands there are, or those whose first word is `group`."""
    lines = [f"  {name:<20}{command.summary}" for name, command in COMMANDS.items() if name.startswith(group)]
    return "\n".join(
        [
            f"usage: {PROGRAM} [COMMAND] ...\n",
            *lines,
            f"\n`{PROGRAM} tiny --steps 100` is short for `{PROGRAM} train tiny --steps 100`.",
            f"`{PROGRAM} train --help` lists the presets and every setting; `{PROGRAM} COMMAND --help` says what a",
            "command takes.",
        ]
    )


def _check_preset(arguments: list[str]) -> None:
    """Raises ValueError where the first word is neither a command nor a preset nor the folder of a run."""
    from train.presets import PRESETS, is_run

    if arguments and not arguments[0].startswith("-") and arguments[0] not in PRESETS and not is_run(arguments[0]):
        raise ValueError(
            f"{arguments[0]}: expected a command ({', '.join(COMMANDS)}), a preset ({', '.join(PRESETS)}) or the folder"
            " of a run"
        )


def _call(name: str, arguments: list[str]) -> tuple[Callable[..., int | None], list[Any]]:
    """The function of a command and what it is called with."""
    import tyro  # late, because until signals are handled as little as possible should happen

    command = COMMANDS[name]
    values: list[Any] = []
    rest = arguments
    if command.has_arguments:
        own, prog = importlib.import_module(command.module).Arguments, f"{PROGRAM} {name}"
        if command.takes_preset:
            value, rest = tyro.cli(own, prog=prog, args=arguments, return_unknown_args=True)
        else:
            value = tyro.cli(own, prog=prog, args=arguments)
        values.append(value)
    if command.takes_preset:
        from train.presets import parse

        values.append(parse(rest))
    # Only now, because JAX takes seconds that need not pass before a wrong flag is refused.
    return getattr(importlib.import_module(command.module), command.function), values


if __name__ == "__main__":
    make_streams_safe()
    training = split(sys.argv[1:])[0] == "train"
    end_on_signals("; run again to go on from the last checkpoint, if there is one" if training else "")
    sys.exit(main(sys.argv[1:]))
