"""SIGINT (Ctrl-C) and SIGTERM end a command at any moment, with one line.

Python runs its own handlers in the main thread, between two instructions: while that thread compiles, after minutes.
And KeyboardInterrupt, raised somewhere inside of JAX, hangs the process or ends it with a segmentation fault. So
signals go to another thread here, and nothing is raised.
"""

import atexit
import contextlib
import multiprocessing
import multiprocessing.connection
import os
import select
import signal
import socket
import threading
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SIGNALLED = 128  # the exit code, and the number of the signal


def end_on_signals(advice: str = "") -> None:
    """From now on a signal ends this process, without waiting for anything. Call it in the main thread, once.

    The exit code is that of `SIGNALLED`. Files that are being written are left as they are, as by SIGKILL. Whoever
    installs another handler gets the first signal instead, and leaves the handler where it is; a second one ends the
    process always. A signal that is ignored when the process starts, as SIGINT is under nohup, stays ignored.

    Args:
      advice: added to the line that says which signal came.
    """
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    end = _End(advice)
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, end)
    os.register_at_fork(after_in_child=_forget)
    atexit.register(_ignore)  # the first one registered is the last one called
    # The thread holds both ends, which are closed when nothing refers to them any more.
    threading.Thread(target=_watch, args=(receiver, sender, end), name="signals", daemon=True).start()


def follow_parent(index: int, count: int) -> None:
    """Called in a worker process, the one of an index among some: it ignores signals, and ends when its parent does.

    A terminal and some schedulers send a signal to every process. A worker that it ended would be missed before the
    parent has saved.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if (parent := multiprocessing.parent_process()) is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), name="parent", daemon=True).start()


def _end_with(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(0)


def _ignore() -> None:
    """Python gives up its handlers when it ends, and the exit code is known by then."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _forget() -> None:
    """A child that goes on with this program, or ends before it starts another one, tells its parent nothing."""
    signal.set_wakeup_fd(-1)
    for number in SIGNALS:
        if isinstance(signal.getsignal(number), _End):
            signal.signal(number, signal.SIG_DFL)


class _End:
    """Ends the process: as the handler in the main thread, or called by the other one, whichever comes first."""

    def __init__(self, advice: str):
        self._advice = advice
        self._begun = threading.Lock()

    def __call__(self, number: int, frame: Any = None) -> None:
        if not self._begun.acquire(blocking=False):
            return
        for child in multiprocessing.active_children():
            child.kill()
        # Nothing here may wait: not for the locks of Python's streams, and not for whoever does not read a pipe.
        line = f"stopped by {signal.Signals(number).name}{self._advice}\n".encode()
        with contextlib.suppress(OSError):
            if os.isatty(1) and os.environ.get("TERM") != "dumb":
                os.write(1, b"\x1b[?25h\n")  # a progress line hides the cursor
            if select.select([], [2], [], 1.0)[1]:
                os.write(2, line)
        os._exit(SIGNALLED + number)


def _watch(receiver: socket.socket, sender: socket.socket, end: _End) -> None:
    first = True
    while True:
        for number in receiver.recv(64):
            if number not in SIGNALS:
                continue
            if not first or signal.getsignal(number) is end:
                end(number)
            first = False
