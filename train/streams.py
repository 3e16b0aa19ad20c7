"""Standard output and error that never end a command: what cannot be written is replaced or dropped.

A run of days is worth more than its log. Text that the stream's encoding lacks becomes question marks. Where the reader
of a pipe has gone, the disk is full or the terminal has been closed, the command goes on without output.
"""

import io
import os
import sys
from typing import Any


class _Undaunted(io.FileIO):
    """A file whose `write` always succeeds."""

    def write(self, data: Any, /) -> int:
        size = memoryview(data).nbytes
        try:
            written = super().write(data)
        except OSError:
            return size
        return size if written is None else written


def make_streams_safe() -> None:
    """Replaces `sys.stdout` and `sys.stderr`. Lines are written as soon as they are whole."""
    # Where standard streams are closed, the next files opened would get their numbers, and the compiler's messages.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    for descriptor, name, errors in ((1, "stdout", "replace"), (2, "stderr", "backslashreplace")):
        encoding = getattr(getattr(sys, name), "encoding", "utf-8")
        raw = _Undaunted(descriptor, "w", closefd=False)
        setattr(
            sys, name, io.TextIOWrapper(io.BufferedWriter(raw), encoding=encoding, errors=errors, line_buffering=True)
        )
