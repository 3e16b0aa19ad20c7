"""What goes wrong with checkpoints, in words."""

import contextlib
import gc
import logging
import re
import sys
import traceback
import warnings
from collections.abc import Iterator
from typing import Any


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or none that fits could be read; the message says which and why."""


class DamagedError(Exception):
    """What is on disk is not what was saved."""


@contextlib.contextmanager
def without_echoes() -> Iterator[None]:
    """Keeps Orbax from printing hundreds of lines about an error that is raised here anyway."""

    def is_news(record: logging.LogRecord) -> bool:
        return record.exc_info is None

    def report(unraisable: Any) -> None:
        # When one array fails, Orbax closes its event loop while others are on their way.
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    before = sys.unraisablehook
    loggers = [logging.getLogger("absl"), logging.getLogger("asyncio")]
    for logger in loggers:
        logger.addFilter(is_news)
    sys.unraisablehook = report
    try:
        yield
    finally:
        sys.unraisablehook = before
        for logger in loggers:
            logger.removeFilter(is_news)


def release(error: BaseException) -> None:
    """Lets go of what a failed save of Orbax left half done, which would complain whenever Python happens to free it.

    That is coroutines that were never begun, in cycles, and held by the frames of the error.
    """
    cause: BaseException | None = error
    while cause is not None:
        traceback.clear_frames(cause.__traceback__)
        cause = cause.__cause__ or cause.__context__
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "coroutine 'async_serialize.* was never awaited", RuntimeWarning)
        gc.collect()


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def is_of_this_machine(error: BaseException) -> bool:
    """Whether reading failed for lack of memory or permission, which says nothing against the checkpoint."""
    error = _root(error)
    codes = ("RESOURCE_EXHAUSTED", "PERMISSION_DENIED")
    return isinstance(error, (MemoryError, PermissionError)) or any(code in str(error) for code in codes)


def reason_of(error: BaseException, limit: int = 240) -> str:
    """The cause of an error, in one line of at most `limit` characters and some dots."""
    # TensorStore appends its whole specification in brackets. The cause comes last before them.
    error = _root(error)
    text = re.sub(r" \[[\w ]+='.*", "", " ".join(str(error).split())) or type(error).__name__
    return text if len(text) <= limit else f"...{text[-limit:]}"
