"""Whole training runs in processes of their own: killed, stopped and resumed, they train as if nothing had happened."""

import collections
import contextlib
import functools
import os
import random
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import train_runs
from helpers.train_runs import has_reached, latest_step, losses, metrics_file

STEPS = 40
EVERY = 4
KILLS = 3


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    """A folder for the runs, with a corpus."""
    folder = tmp_path_factory.mktemp("crashes")
    train_runs.write_corpus(folder / "corpus")
    train_runs.take_compiled(folder / "compiled")
    return folder


def log_path(run_dir: Path) -> Path:
    return Path(f"{run_dir}.log")


def start(
    workspace: Path, run_dir: Path, max_file_blocks: int | None = None, cache: str = "compiled", **options
) -> subprocess.Popen:
    """A training process, whose files may be limited to a number of blocks of 512 bytes."""
    settings = {"steps": STEPS, "eval-every": 10, "checkpoint.every": EVERY, "data.batch-size": 2}
    command = train_runs.train_command(run_dir, {**settings, "data.path": workspace / "corpus"})
    if max_file_blocks is not None:
        command = ["sh", "-c", f'ulimit -f {max_file_blocks}; exec "$@"', "sh", *command]
    return train_runs.start(command, log_path(run_dir), cache=workspace / cache, **options)


def log_of(run_dir: Path) -> str:
    return log_path(run_dir).read_text()


def wait_until(process: subprocess.Popen, run_dir: Path, condition: Callable[[], bool]) -> None:
    train_runs.wait_until({log_path(run_dir): process}, condition)


def half_written(run_dir: Path) -> set[int]:
    """Inodes of the checkpoints that are being written, or that a kill left so."""
    return {path.stat().st_ino for path in (run_dir / "checkpoints").glob("*.orbax-checkpoint-tmp") if path.exists()}


def caught_while_saving(process: subprocess.Popen, run_dir: Path, leftovers: set[int]) -> bool:
    """Whether the process now stands still with a checkpoint half written."""
    if not half_written(run_dir) - leftovers:
        return False
    process.send_signal(signal.SIGSTOP)
    time.sleep(0.01)
    if half_written(run_dir) - leftovers:
        return True
    process.send_signal(signal.SIGCONT)  # it had just finished
    return False


def finish(process: subprocess.Popen, run_dir: Path, code: int = 0) -> None:
    train_runs.finish(process, log_path(run_dir), code)


@pytest.fixture(scope="module")
def uninterrupted(workspace) -> list[tuple[int, float]]:
    run_dir = workspace / "uninterrupted"
    finish(start(workspace, run_dir), run_dir)
    train_runs.keep_compiled(workspace / "compiled")
    result = losses(run_dir)
    assert [step for step, _ in result] == list(range(1, STEPS + 1))
    return result


@pytest.mark.exhaustive
def test_a_run_killed_again_and_again_gives_the_losses_of_one_never_killed(workspace, uninterrupted):
    run_dir = workspace / "killed"
    draw = random.Random(0)
    saved = 0
    resumed = []
    for kill in range(KILLS):
        leftovers, earlier_file = half_written(run_dir), metrics_file(run_dir)
        process = start(workspace, run_dir)
        if kill % 2:
            wait_until(process, run_dir, functools.partial(caught_while_saving, process, run_dir, leftovers))
        else:
            step = saved + draw.randint(1, 2 * EVERY)
            wait_until(process, run_dir, functools.partial(has_reached, run_dir, step, earlier_file))
        process.kill()
        process.wait()
        assert latest_step(run_dir) >= saved
        saved = latest_step(run_dir)
        resumed += [saved] if saved else []
    finish(start(workspace, run_dir), run_dir)
    assert losses(run_dir) == uninterrupted
    assert [int(step) for step in re.findall(r"resuming after step (\d+)", log_of(run_dir))] == resumed
    assert (
        len(re.findall(r"process \d+ on .* left .*killed without ending by itself: taken over", log_of(run_dir)))
        == KILLS
    )
    assert not half_written(run_dir)


@pytest.fixture(scope="module")
def stopped(workspace) -> Path:
    """The folder of a run that SIGTERM stopped half-way."""
    run_dir = workspace / "stopped"
    process = start(workspace, run_dir)
    wait_until(process, run_dir, functools.partial(has_reached, run_dir, EVERY + 1, None))
    process.send_signal(signal.SIGTERM)
    finish(process, run_dir, code=128 + signal.SIGTERM)
    return run_dir


def test_sigterm_saves_the_step_it_stops_after(stopped, uninterrupted):
    step = latest_step(stopped)
    assert EVERY < step < STEPS
    assert losses(stopped) == uninterrupted[:step]
    assert f"stopped by SIGTERM after step {step}" in log_of(stopped)
    assert not half_written(stopped)


def test_ctrl_c_while_compiling_ends_a_run_at_once_with_one_line(workspace):
    (workspace / "empty").mkdir()
    run_dir = workspace / "compiling"
    process = start(workspace, run_dir, cache="empty", environment={"XLA_FLAGS": ""})  # compiled for long
    wait_until(process, run_dir, lambda: "gradients repeat" in log_of(run_dir))
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    finish(process, run_dir, code=128 + signal.SIGINT)
    *before, last = log_of(run_dir).splitlines()
    assert last == "stopped by SIGINT; run again to go on from the last checkpoint, if there is one"
    assert before[-1] == "gradients repeat bit for bit"
    assert not losses(run_dir)


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(workspace, stopped, uninterrupted):
    run_dir = shutil.copytree(stopped, workspace / "damaged")
    step = latest_step(run_dir)
    data = max((run_dir / "checkpoints" / str(step) / "state").rglob("*"), key=lambda path: path.stat().st_size)
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    finish(start(workspace, run_dir), run_dir)
    assert losses(run_dir) == uninterrupted
    assert f"checkpoint of step {step} in {run_dir / 'checkpoints'} is damaged" in log_of(run_dir)
    assert (run_dir / "checkpoints" / "damaged" / str(step)).is_dir()


def test_a_full_disk_stops_the_run_with_a_word_and_loses_nothing_saved(workspace, stopped):
    run_dir = shutil.copytree(stopped, workspace / "full")
    step = latest_step(run_dir)
    # Room for every file of the run but the arrays of a checkpoint.
    finish(start(workspace, run_dir, max_file_blocks=80), run_dir, code=1)
    log = log_of(run_dir)
    assert f"error: could not save the checkpoint of step {(step // EVERY + 1) * EVERY}" in log
    assert "File too large" in log
    assert f"the last good checkpoint is step {step} and remains" in log
    assert latest_step(run_dir) == step


@pytest.mark.exhaustive
def test_data_workers_outlive_ctrl_c_until_their_run_has_saved_and_no_run(workspace):
    settings = {"steps": 100_000, "data.batch-size": 2, "data.path": workspace / "corpus", "data.workers": 1}
    run_dir, earlier_file = workspace / "workers", None
    for number, reached in ((signal.SIGINT, 2), (signal.SIGKILL, 0)):
        command = train_runs.train_command(run_dir, settings)
        process = train_runs.start(command, log_path(run_dir), cache=workspace / "compiled")
        wait_until(process, run_dir, functools.partial(has_reached, run_dir, reached, earlier_file))
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does
        else:
            process.kill()
        process.wait(train_runs.DEADLINE)
        log, earlier_file = log_of(run_dir), metrics_file(run_dir)
        assert process.returncode == (128 + number if number == signal.SIGINT else -number), log
        assert "Traceback" not in log
        give_up = time.monotonic() + 20
        while others := group(process.pid):
            assert time.monotonic() < give_up, others
            time.sleep(0.1)
    assert "stopped by SIGINT after step" in log


def group(number: int) -> list[str]:
    """What runs in a process group."""
    listed = subprocess.run(["ps", "-eo", "pgid,stat,args"], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines()[1:] if line.split()[0] == str(number) and line.split()[1][0] != "Z"]


MOMENTS = 100
# Where a process is when a line begins so, from its first one on.
PHASES = {
    "importing": "",
    "reading data": "{",
    "compiling": "gradients repeat",
    "training": "step ",
    "saving and sampling": "step 200/200  held out",
}


@pytest.mark.exhaustive
def test_a_run_stopped_and_killed_at_100_random_moments_loses_nothing_saved(workspace):
    """Each moment is up to two seconds after the beginning of a phase, so that all of a process's life is covered."""
    settings = {
        "steps": 200,
        "eval-every": 25,
        "checkpoint.every": EVERY,
        "data.batch-size": 2,
        "data.path": workspace / "corpus",
        "sample-tokens": 20,
        "position-buckets": 4,
    }

    def begin(run_dir: Path, cache: Path) -> subprocess.Popen:
        return train_runs.start(train_runs.train_command(run_dir, settings), log_path(run_dir), cache=cache)

    finish(begin(workspace / "reference", workspace / "compiled"), workspace / "reference")
    expected = losses(workspace / "reference")
    draw, happened, lost = random.Random(0), collections.Counter(), []
    number, run_dir, saved, printed = 0, workspace / "moments0", 0, 0
    while len(lost) < MOMENTS:
        cache = workspace / "compiled"
        if draw.random() < 0.25:  # this one compiles
            cache = Path(tempfile.mkdtemp(dir=workspace))
        earlier_file = metrics_file(run_dir)
        process = begin(run_dir, cache)
        phase, chosen = draw.choice(list(PHASES)), draw.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        while process.poll() is None and f"\n{PHASES[phase]}" not in f"\n{log_of(run_dir)[printed:]}":
            time.sleep(0.01)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(draw.uniform(0.0, 2.0))
        process.send_signal(chosen)
        twice = chosen != signal.SIGKILL and draw.random() < 0.25
        if twice:
            time.sleep(draw.uniform(0.0, 0.2))
            process.send_signal(chosen)
        sent = time.monotonic()
        process.wait(train_runs.DEADLINE)
        seconds, code, log = time.monotonic() - sent, process.returncode, log_of(run_dir)[printed:]
        printed += len(log)
        context = f"{phase}, {chosen.name}, code {code}, {seconds:.1f} s:\n{log}"
        assert "damaged" not in log, context
        assert f"resuming after step {saved}," in log or "resuming" not in log, context
        assert latest_step(run_dir) >= saved, context
        saved = latest_step(run_dir)
        if code == 0:
            assert losses(run_dir) == expected, context
            assert saved == settings["steps"], context
            number, run_dir, saved, printed = number + 1, workspace / f"moments{number + 1}", 0, 0
            continue
        logged = losses(run_dir) if metrics_file(run_dir) != earlier_file else []
        made = logged[-1][0] if logged else saved
        assert logged == expected[: len(logged)], context
        lost.append(made - saved)
        if chosen == signal.SIGKILL:
            assert code == -signal.SIGKILL, context
            how = "killed"
        elif "; saved, run again to go on" in log:
            assert (code, lost[-1]) == (128 + chosen, 0), context
            lines = log.splitlines()
            if twice and lines[-1].startswith(f"stopped by {chosen.name}; run again to go on"):
                lines.pop()  # of the second signal, which ends a process that has saved, too
            assert lines[-1] == f"stopped by {chosen.name} after step {saved}; saved, run again to go on", context
            how = "saved"
        elif code == 128 + chosen:
            assert log.splitlines()[-1].startswith(f"stopped by {chosen.name}; run again to go on"), context
            how = "at once"
        else:  # while Python itself starts
            assert phase == "importing", context
            assert code in (-chosen, 1), context
            assert '"model"' not in log, context
            how = "before the program"
        if chosen != signal.SIGKILL and not twice and phase in ("training", "saving and sampling"):
            assert lost[-1] == 0, context
        assert lost[-1] <= 2 * EVERY, context  # the checkpoint that was being written, and the steps made meanwhile
        assert how == "before the program" or "Traceback" not in log, context
        assert how == "saved" or seconds < 30, context
        happened[f"{phase}: {chosen.name}, {how}"] += 1
    counts = "\n".join(f"{count:3} {what}" for what, count in sorted(happened.items()))
    print(f"{counts}\n{number} runs finished; steps lost: at most {max(lost)}, {sum(lost)} in all")
