"""Output that cannot be written never ends a command: it is replaced or dropped."""

import os
import subprocess
import sys

import pytest
from helpers.train_runs import ROOT

PROGRAM = """
import os, sys
from train.streams import make_streams_safe
make_streams_safe()
print("π in the log", flush=True)
print("π in a complaint", file=sys.stderr)
print("again")
os.write(int(sys.argv[1]), b"alive" if os.open(os.devnull, os.O_RDONLY) > 2 else b"a file is standard output")
"""


def start(redirected: str, program: list[str], *, alive: int | None = None, **environment: str):
    """A Python program whose output a shell redirects; `alive` is a file that it may write to."""
    return subprocess.run(
        ["sh", "-c", redirected, "sh", sys.executable, *program],
        cwd=ROOT,
        capture_output=True,
        env=os.environ | environment,
        pass_fds=() if alive is None else (alive,),
        timeout=60,
        check=False,
    )


def run_program(redirected: str, **environment: str) -> subprocess.CompletedProcess:
    reader, writer = os.pipe()
    try:
        done = start(redirected, ["-c", PROGRAM, str(writer)], alive=writer, **environment)
    finally:
        os.close(writer)
    with os.fdopen(reader, "rb") as said:
        assert said.read() == b"alive"
    assert done.returncode == 0
    return done


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "ascii:strict"])
def test_text_that_the_encoding_lacks_is_replaced(encoding):
    done = run_program('"$@"', PYTHONIOENCODING=encoding)
    assert done.stdout == b"? in the log\nagain\n"
    assert done.stderr == b"\\u03c0 in a complaint\n"


@pytest.mark.parametrize("redirected", [">/dev/full", ">/dev/full 2>&1", ">&-", ">&- 2>&-", "| true"])
def test_output_that_nobody_takes_is_dropped(redirected):
    run_program(f'"$@" {redirected}')


@pytest.mark.parametrize("shell", ['"$@" >/dev/full', '"$@" >&-', '{ "$@"; echo $? >&2; } | true'])
def test_the_command_line_ends_as_if_its_output_had_been_read(shell):
    done = start(shell, ["-m", "train", "--help"])
    assert done.returncode == 0
    assert done.stderr in (b"", b"0\n")
