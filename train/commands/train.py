"""Trains a preset, changed by flags: `python -m train PRESET [--field value ...]`."""

import traceback

import jax

from train.checkpoints.errors import CheckpointError
from train.commands.exit_codes import FAILED, FINISHED, complain
from train.config import TrainConfig, to_json
from train.loop import Interrupted, NonFiniteError, run
from train.parallel.distributed import start
from train.prepare import prepare
from train.run_folder import InUseError
from train.signals import SIGNALLED


def train(config: TrainConfig) -> int:
    """Trains, and returns the exit code.

    Raises:
      ValueError: a setting is wrong. Nothing was written.
    """
    start(config.distributed)
    if jax.process_index() == 0:
        print(to_json(config))
    prepared = prepare(config)
    try:
        run(prepared)
    except (CheckpointError, InUseError, NonFiniteError, ImportError, OSError) as error:
        return complain(f"error: {error}", FAILED)
    except Interrupted as stop:
        return complain(str(stop), SIGNALLED + stop.signal_number)
    except Exception as error:  # a ValueError too: settings are not to blame any more
        error.add_note(f"in process {jax.process_index()} of {jax.process_count()}")
        traceback.print_exception(error)
        return FAILED
    return FINISHED
