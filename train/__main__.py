"""The command line: `python -m train PRESET [--field value ...]`, and the commands below on the folder of a run.

Exit codes: 0 the run is finished; 1 it failed, and says why; 2 a setting is wrong; 130 and 143 it was stopped by SIGINT
or SIGTERM, has saved, and goes on when the same command is given again.

Several processes, started by SLURM, Open MPI, Kubernetes or with --distributed.*, end with the same code; when one dies
alone, JAX ends the others within about 100 seconds. Examples: train/launch.
"""

import contextlib
import importlib
import logging
import sys
from collections.abc import Sequence

import tyro

from train.checkpoint import CheckpointError
from train.config import TrainConfig, to_json
from train.presets import PRESETS

# Commands by name: a module that has their `Arguments`, and the function that takes them.
COMMANDS = {
    "generate": ("train.generate", "continue_prompt"),
    "positions": ("train.positions", "report_positions"),
    "train-tokenizer": ("train.bpe", "train_tokenizer"),
}
FAILED, WRONG_SETTING, SIGNALLED = 1, 2, 128


def parse(arguments: Sequence[str]) -> TrainConfig:
    """The config that a command line asks for: a preset, changed by its flags.

    Raises:
      SystemExit: for help, and with code 2 where a flag is unknown or its value of the wrong type.
      ValueError: a setting is impossible.
    """
    presets = {name: ((preset.__doc__ or "").strip(), preset()) for name, preset in PRESETS.items()}
    if list(arguments) in (["--help"], ["-h"]):
        with contextlib.suppress(SystemExit):
            tyro.extras.overridable_config_cli(presets, prog="python -m train", args=["--help"])
        # Every preset has the same fields; these show the defaults of the first.
        arguments = [next(iter(presets)), "--help"]
    return tyro.extras.overridable_config_cli(presets, prog="python -m train", args=list(arguments))


def main(arguments: Sequence[str]) -> int:
    """Runs a command line and returns its exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    if arguments and arguments[0] in COMMANDS:
        return _command(arguments[0], arguments[1:])
    if list(arguments[:1]) == ["plan"]:
        return _plan(arguments[1:])
    try:
        config = parse(arguments)
        # After parsing, because importing JAX takes seconds that --help need not wait for.
        import jax

        from train.distributed import start
        from train.loop import Interrupted, NonFiniteError, prepare, run

        start(config.distributed)
        if jax.process_index() == 0:
            print(to_json(config))
        prepared = prepare(config)
    except ValueError as error:
        return _complain(f"error: {error}", WRONG_SETTING)
    try:
        run(prepared)
    except (CheckpointError, NonFiniteError, ImportError) as error:
        return _complain(f"error: {error}", FAILED)
    except Interrupted as stop:
        return _complain(str(stop), SIGNALLED + stop.signal_number)
    except Exception as error:
        error.add_note(f"in process {jax.process_index()} of {jax.process_count()}")
        raise
    return 0


def _plan(arguments: Sequence[str]) -> int:
    from train.plan import Arguments, plan

    own, rest = tyro.cli(Arguments, prog="python -m train plan", args=list(arguments), return_unknown_args=True)
    try:
        plan(own, parse(rest))
    except ValueError as error:
        return _complain(f"error: {error}", WRONG_SETTING)
    return 0


def _command(name: str, arguments: Sequence[str]) -> int:
    module_name, function = COMMANDS[name]
    module = importlib.import_module(module_name)
    parsed = tyro.cli(module.Arguments, prog=f"python -m train {name}", args=list(arguments))
    try:
        getattr(module, function)(parsed)
    except ValueError as error:
        return _complain(f"error: {error}", WRONG_SETTING)
    except CheckpointError as error:
        return _complain(f"error: {error}", FAILED)
    return 0


def _complain(message: str, code: int) -> int:
    import jax

    if jax.distributed.is_initialized():
        message = f"process {jax.process_index()}: {message}"
    print(message, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
