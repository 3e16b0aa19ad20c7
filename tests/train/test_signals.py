"""Signals: one line and the right exit code, at once, unless somebody else deals with the first one."""

import signal
import subprocess
import sys
import time

import pytest
from helpers import train_runs

PROGRAM = """
import signal, sys, time
from train.signals import end_on_signals
end_on_signals("; good bye")
exec(sys.argv[1])
print("ready", flush=True)
while True:
    time.sleep(60)
"""


def start(before: str = "") -> subprocess.Popen:
    with train_runs.interruptible():
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, before],
            cwd=train_runs.ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_process_with_one_line(number):
    process = start()
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (128 + number, "", f"stopped by {number.name}; good bye\n")


def test_another_handler_gets_the_first_signal_and_the_second_one_ends_the_process():
    process = start("signal.signal(signal.SIGINT, lambda *_: print('handled', flush=True))")
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "handled\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "stopped by SIGINT; good bye\n")


def test_compiled_code_that_does_not_return_to_python_does_not_delay_the_end():
    hashing = "import hashlib; print('ready', flush=True); hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)"
    process = start(hashing)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "stopped by SIGINT; good bye\n")


def test_signals_that_were_ignored_before_stay_ignored():
    command = ["sh", "-c", 'trap "" INT; exec "$@"', "sh", sys.executable, "-c", PROGRAM, ""]
    with subprocess.Popen(command, cwd=train_runs.ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert process.poll() is None
        process.kill()


FORK = """
import os
child = os.fork()
if not child:
    time.sleep(20)
    os._exit(1)
time.sleep(0.2)
os.kill(child, signal.SIGTERM)
print(os.waitpid(child, 0)[1], flush=True)
"""


def test_a_signal_to_a_forked_child_ends_the_child_and_not_its_parent():
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, FORK], cwd=train_runs.ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == f"{int(signal.SIGTERM)}\n"
        assert process.stdout.readline() == "ready\n"
        process.kill()
