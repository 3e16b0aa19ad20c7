"""How a command ends."""

import sys

FINISHED, FAILED, WRONG_SETTING = 0, 1, 2  # and, from `train.signals.SIGNALLED` on, that a signal came


def complain(message: str, code: int) -> int:
    """Says on standard error why a command ends, and returns its exit code."""
    import jax

    if jax.distributed.is_initialized():
        message = f"process {jax.process_index()}: {message}"
    print(message, file=sys.stderr)
    return code
