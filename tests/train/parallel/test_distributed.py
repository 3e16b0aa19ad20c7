"""Several processes as one run: two real ones on this machine, and what each works out for itself."""

import dataclasses
import functools
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from helpers import train_runs
from helpers.compiling import QUICKLY
from helpers.train_runs import arguments, has_reached, latest_step, losses, metrics_file

import train.parallel.distributed
from train.checkpoints.checkpointer import Checkpointer
from train.checkpoints.storage import checksum, flatten, read_metadata
from train.config import DistributedConfig
from train.data.loader import train_batches
from train.loop import run
from train.metrics import read_metrics
from train.parallel.distributed import start
from train.parallel.sharding import MESH_AXES, data_shards
from train.prepare import prepare
from train.presets import parse

STEPS, EVERY = 40, 4
SETTINGS = {
    "steps": STEPS,
    "eval-every": 20,
    "checkpoint.every": EVERY,
    "data.batch-size": 8,
    "optimizer.warmup-steps": 1,
    "optimizer.learning-rate": 1e-2,
}
FSDP = {"mesh.data": 1, "mesh.fsdp": 4}
ON_CPUS = {"XLA_FLAGS": f"--xla_force_host_platform_device_count=2 {QUICKLY}"}
ON_GPUS = [
    {
        "CUDA_VISIBLE_DEVICES": str(index),
        "XLA_FLAGS": "--xla_gpu_deterministic_ops=true",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    for index in range(2)
]
UMASKS = 0o022, 0o027  # of the two processes: the files of the second cannot be read by everybody

Launch = Callable[..., dict[Path, subprocess.Popen]]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    train_runs.write_corpus(folder / "corpus")
    train_runs.take_compiled(folder / "compiled")
    return folder


@pytest.fixture(scope="module")
def launch(workspace):
    """Starts two processes, with an address to meet at, as a dict from logs to processes; all are killed at the end."""
    started: list[subprocess.Popen] = []

    def two(
        name: str, command: Callable[[str, int], Sequence[str]], environment: Sequence[dict] = (ON_CPUS, ON_CPUS)
    ) -> dict[Path, subprocess.Popen]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        processes = {}
        for index in range(2):
            log = workspace / f"{name}.{index}.log"
            processes[log] = train_runs.start(
                list(command(address, index)),
                log,
                cache=workspace / "compiled",
                umask=UMASKS[index],
                environment=environment[index],
            )
            started.append(processes[log])
        return processes

    yield two
    for process in started:
        train_runs.kill(process)


def settings_of(workspace: Path) -> dict:
    return {**SETTINGS, "data.path": workspace / "corpus"}


def launch_run(
    workspace: Path, launch: Launch, run_dir: Path, settings: dict = FSDP, **options: Any
) -> dict[Path, subprocess.Popen]:
    def command(address: str, index: int) -> list[str]:
        meeting = {"coordinator-address": address, "num-processes": 2, "process-id": index}
        distributed = {f"distributed.{name}": value for name, value in meeting.items()}
        return train_runs.train_command(run_dir, {**settings_of(workspace), **settings, **distributed})

    return launch(run_dir.name, command, **options)


def finish(processes: dict[Path, subprocess.Popen], code: int = 0) -> None:
    for log, process in processes.items():
        train_runs.finish(process, log, code)


GLOO = r"\[Gloo\] Rank |is connected to |peer ranks\. |Expected number of connected peer ranks is : "


def said(run_dir: Path, index: int) -> str:
    """What a process printed, without what Gloo's threads print, one into the other's line, for every connection."""
    lines = re.sub(GLOO, "", Path(f"{run_dir}.{index}.log").read_text()).splitlines()
    return "\n".join(line for line in lines if not re.fullmatch(r"[\d ]*", line))


def in_this_process(workspace: Path, run_dir: Path, **settings) -> "train.config.TrainConfig":
    return parse(arguments(run_dir, {**settings_of(workspace), **settings}))


# Two processes.


@pytest.fixture(scope="module")
def uninterrupted(workspace, launch) -> Path:
    run_dir = workspace / "uninterrupted"
    finish(launch_run(workspace, launch, run_dir))
    train_runs.keep_compiled(workspace / "compiled")
    assert [step for step, _ in losses(run_dir)] == list(range(1, STEPS + 1))
    return run_dir


def test_the_first_process_alone_prints_and_writes(uninterrupted):
    assert "finished after step 40" in said(uninterrupted, 0)
    assert "4 x cpu in 2 process(es)" in said(uninterrupted, 0)
    assert f"python -m train generate --run {uninterrupted}" in said(uninterrupted, 0)
    assert said(uninterrupted, 1) == ""
    written = [path for path in uninterrupted.rglob("*") if path.is_file()]
    assert {path.name for path in uninterrupted.iterdir() if path.is_file()} == {
        "config.json", "facts.json", "lock", "metrics.jsonl", "metrics.meta.json", "loss.png"
    }  # fmt: skip
    by_the_second = {path for path in written if not path.stat().st_mode & 0o004}
    assert by_the_second  # of the arrays, its part
    assert all("state" in path.parts for path in by_the_second)


class _InTurns:
    """The shares of two processes as one iterator."""

    def __init__(self, shares):
        self.shares = shares

    def __next__(self):
        parts = [next(share) for share in self.shares]
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}

    def get_state(self):
        return [share.get_state() for share in self.shares]

    def close(self):
        for share in self.shares:
            share.close()


def test_two_processes_train_like_one_on_the_same_rows(workspace, uninterrupted, monkeypatch):
    four = jax.devices()[:4]
    monkeypatch.setattr(jax, "devices", lambda *backend: four)
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    config = in_this_process(workspace, workspace / "one", **FSDP)
    config = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, every=STEPS))
    prepared = prepare(config)
    assert prepared.mesh.size == 4
    align = config.model.nsa.select_block
    shares = [
        train_batches(
            prepared.corpus, prepared.tokenizer, config.data, align=align, process_index=index, process_count=2
        )
        for index in range(2)
    ]
    run(dataclasses.replace(prepared, train_batches=_InTurns(shares)), plain=True)
    ours, theirs = (read_metrics(folder / "metrics.jsonl") for folder in (config.run_dir, uninterrupted))
    for name in ("loss", "grad_norm", "held_out_loss"):
        expected = [entry[name] for entry in ours if name in entry]
        actual = [entry[name] for entry in theirs if name in entry]
        np.testing.assert_allclose(actual, expected, rtol=1e-5, err_msg=name)


@pytest.fixture(scope="module")
def stopped(workspace, launch) -> tuple[Path, int]:
    """A run that was killed, started again and stopped by SIGTERM to its second process; what the kill left saved."""
    run_dir = workspace / "stopped"
    processes = launch_run(workspace, launch, run_dir)
    train_runs.wait_until(processes, lambda: has_reached(run_dir, EVERY + 1, None) and latest_step(run_dir) >= EVERY)
    for process in processes.values():
        process.send_signal(signal.SIGKILL)
    finish(processes, -signal.SIGKILL)
    saved, earlier_file = latest_step(run_dir), metrics_file(run_dir)
    processes = launch_run(workspace, launch, run_dir)
    train_runs.wait_until(processes, functools.partial(has_reached, run_dir, saved + EVERY + 1, earlier_file))
    list(processes.values())[1].send_signal(signal.SIGTERM)
    finish(processes, 128 + signal.SIGTERM)
    return run_dir, saved


@pytest.mark.exhaustive
def test_two_processes_killed_and_started_again_go_on_bit_for_bit(stopped, uninterrupted):
    run_dir, saved = stopped
    assert EVERY <= saved < latest_step(run_dir)
    assert re.findall(r"resuming after step (\d+)", said(run_dir, 0)) == [str(saved)]
    made = losses(run_dir)
    assert made == losses(uninterrupted)[: len(made)]
    assert len(made) > saved + EVERY


@pytest.mark.gpu
@pytest.mark.parametrize("axis", ["fsdp", "context"])
def test_two_gpus_of_which_one_process_is_killed_go_on_bit_for_bit(workspace, launch, axis):
    if jax.device_count() < 2:
        pytest.skip("needs 2 GPUs")
    settings = {
        "mesh.data": 1,
        f"mesh.{axis}": 2,
        "model.attention": "nsa",
        "model.head-dim": 32,
        "data.sequence-length": 256,
    }

    def run_on_gpus(name: str) -> dict[Path, subprocess.Popen]:
        return launch_run(workspace, launch, workspace / name, settings, environment=ON_GPUS)

    finish(run_on_gpus(f"{axis}_uninterrupted"))
    run_dir = workspace / f"{axis}_killed"
    processes = run_on_gpus(run_dir.name)
    train_runs.wait_until(processes, lambda: has_reached(run_dir, EVERY + 1, None) and latest_step(run_dir) >= EVERY)
    first, second = processes.values()
    train_runs.kill(second)
    train_runs.kill(first)  # as a launcher does when it has lost a process
    saved = latest_step(run_dir)
    assert EVERY <= saved < STEPS
    finish(run_on_gpus(run_dir.name))
    assert re.findall(r"resuming after step (\d+)", said(run_dir, 0)) == [str(saved)]
    assert losses(run_dir) == losses(workspace / f"{axis}_uninterrupted")
    assert [step for step, _ in losses(run_dir)] == list(range(1, STEPS + 1))


@pytest.mark.exhaustive
def test_sigterm_to_one_process_makes_both_save_the_same_step_and_stop(stopped):
    run_dir, _ = stopped
    step = latest_step(run_dir)
    assert step == losses(run_dir)[-1][0] < STEPS
    for index in range(2):
        assert f"process {index}: stopped by SIGTERM after step {step}; saved" in said(run_dir, index)


@pytest.mark.exhaustive
def test_one_process_goes_on_with_what_two_saved(workspace, stopped, uninterrupted, caplog):
    run_dir = shutil.copytree(stopped[0], workspace / "fewer")
    saved = latest_step(run_dir)
    config = in_this_process(workspace, run_dir, steps=STEPS)
    prepared = prepare(config)
    content = read_metadata(run_dir / "checkpoints", saved)
    with Checkpointer(run_dir / "checkpoints", config.checkpoint) as checkpointer:
        step, state = checkpointer.restore_latest(prepared.abstract_state, prepared.train_batches)
    assert step == saved == int(state.step)
    for name, array in flatten(state).items():
        assert int(checksum(array)) == content["arrays"][name]["checksum"], name
    assert len(content["data"]) == 2
    caplog.clear()
    run(prepare(config), plain=True)
    assert f"up to step {saved} the data was loaded in 2 shares, now it is in 1" in caplog.text
    assert losses(run_dir)[:saved] == losses(stopped[0])
    before = dict(losses(uninterrupted))
    gap = {step: abs(loss - before[step]) for step, loss in losses(run_dir)}
    assert list(gap) == list(range(1, STEPS + 1))
    # Other rows, the same model: batches differ by little of what has been learnt.
    assert max(gap.values()) < 0.1 * (before[1] - before[saved])


WORKER = """
import dataclasses, importlib, pkgutil, sys
from pathlib import Path
import train
for module in pkgutil.walk_packages(train.__path__, "train."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)  # had one asked for a device, start() would raise
import jax
import numpy as np
from nsa_jax.context import to_zigzag
from train.__main__ import main
from train.presets import parse
from train.config import DistributedConfig, MeshConfig
from train.parallel.distributed import gather, start, together
from train.parallel.sharding import data_shards, make_mesh, put_batch
from train.prepare import prepare
from train.presets import parse

address, index, *arguments = sys.argv[1:]
index = int(index)
start(DistributedConfig(address, 2, index))
assert gather({"index": index}) == [{"index": 0}, {"index": 1}]

def refused(kind, call):
    try:
        call()
    except kind as error:
        print(f"{kind.__name__}: {error}")
    else:
        raise AssertionError("nothing was raised")

whole = np.arange(32).reshape(4, 8)
for sizes, share in (
    (MeshConfig(data=2, tensor=2), (index, 2)),
    (MeshConfig(data=1, tensor=4), (0, 1)),
    (MeshConfig(data=1, context=4), (0, 1)),
):
    mesh = make_mesh(sizes)
    assert data_shards(mesh) == share
    array = put_batch({"x": np.split(whole, share[1])[share[0]]}, mesh, 1)["x"]
    expected = whole if sizes.context == 1 else to_zigzag(whole, sizes.context)
    for shard in array.addressable_shards:
        assert shard.data.tolist() == expected[shard.index].tolist()
    assert array.shape == whole.shape

def fail_in_the_second():
    with together(ValueError, RuntimeError):
        if index == 1:
            raise RuntimeError("broken")

refused(RuntimeError, fail_in_the_second)
config = parse(arguments)
there = dataclasses.replace(config.data, path="absent") if index == 1 else config.data
refused(ValueError, lambda: prepare(dataclasses.replace(config, data=there)))
refused(ValueError, lambda: prepare(dataclasses.replace(config, seed=index)))
prepare(config)
sys.exit(main([*arguments, "--mesh.data", "3"]))
"""


def test_what_is_wrong_in_one_process_is_raised_in_both_and_ends_both(workspace, launch):
    run_dir = workspace / "bad"

    def command(address: str, index: int) -> list[str]:
        return [sys.executable, "-c", WORKER, address, str(index), *arguments(run_dir, settings_of(workspace))]

    finish(launch("bad", command), 2)
    for index in range(2):
        other = "process 1: " if index == 0 else ""
        output = said(run_dir, index)
        assert f"RuntimeError: {other}broken" in output
        assert f"ValueError: {other}data.path: absent does not exist" in output
        assert "ValueError: seed is 0 in process 0 and 1 in process 1" in output
        assert f"process {index}: error: mesh = (data 3," in output
    assert not run_dir.exists()


# What a process works out for itself.

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_NTASKS": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}


@pytest.fixture
def joined(monkeypatch) -> list[dict]:
    """What jax.distributed.initialize is called with, in a process that no launcher started."""
    calls: list[dict] = []
    for name in (*SLURM, *POD, "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(jax.distributed, "initialize", lambda **settings: calls.append(settings))
    return calls


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({}, False),
        (SLURM, True),
        (SLURM | {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"}, False),
        (SLURM | {"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"}, False),  # the shell of an allocation of eight
        ({name: value for name, value in SLURM.items() if "STEP" not in name}, False),  # a batch script without srun
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, True),
        (POD, True),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),  # a pod of no job
    ],
)
def test_processes_are_joined_where_a_launcher_started_several(joined, monkeypatch, environment, several):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    start(DistributedConfig(num_processes=1))
    assert joined == []
    start(DistributedConfig())
    assert len(joined) == several


def test_settings_go_before_what_the_launcher_says(joined, monkeypatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    start(DistributedConfig("127.0.0.1:1", 4, 3))
    assert joined[0].items() >= {"coordinator_address": "127.0.0.1:1", "num_processes": 4, "process_id": 3}.items()
    assert joined[0]["cluster_detection_method"] == "deactivate"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DistributedConfig("127.0.0.1:1", 2), r"process_id None\): expected all three"),
        (DistributedConfig(process_id=0), r"coordinator_address None, .* expected all three"),
        (DistributedConfig("127.0.0.1", 2, 0), "host:port"),
        (DistributedConfig("127.0.0.1:1", 2, 2), "process_id = 2: expected"),
        (DistributedConfig("127.0.0.1:1", 0, 0), "num_processes = 0: expected"),
    ],
)
def test_settings_that_name_no_process_are_refused(joined, config, message):
    with pytest.raises(ValueError, match=message):
        start(config)
    assert joined == []


def test_a_launcher_that_jax_cannot_read_is_named(joined, monkeypatch):
    def initialize(**settings):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(
        ValueError, match=r"Open MPI started several processes, but JAX cannot join them .*num_processes"
    ):
        start(DistributedConfig())


def mesh_of(process_of_each_device, **sizes):
    """A mesh whose devices, in order, belong to the given processes."""
    shape = [sizes.get(axis, 1) for axis in MESH_AXES]
    devices = np.array([SimpleNamespace(process_index=process) for process in process_of_each_device], object)
    return SimpleNamespace(
        devices=devices.reshape(shape), axis_names=MESH_AXES, shape=dict(zip(MESH_AXES, shape, strict=True))
    )


@pytest.mark.parametrize(
    ("processes", "sizes", "shards"),
    [
        ([0] * 8, {"data": 4, "tensor": 2}, [(0, 1)]),
        ([0, 0, 1, 1], {"fsdp": 4}, [(0, 2), (1, 2)]),
        ([0, 0, 1, 1, 2, 2, 3, 3], {"data": 2, "fsdp": 2, "tensor": 2}, [(0, 4), (1, 4), (2, 4), (3, 4)]),
        ([0, 0, 1, 1, 2, 2, 3, 3], {"data": 2, "tensor": 4}, [(0, 2), (0, 2), (1, 2), (1, 2)]),
        ([0, 0, 1, 1, 2, 2, 3, 3], {"expert": 2, "context": 4}, [(0, 2), (0, 2), (1, 2), (1, 2)]),
        ([0, 1, 0, 1], {"data": 2, "tensor": 2}, [(0, 1), (0, 1)]),
        ([1, 1, 0, 0], {"data": 4}, [(1, 2), (0, 2)]),
    ],
)
def test_processes_that_hold_the_same_rows_have_the_same_share(processes, sizes, shards):
    mesh = mesh_of(processes, **sizes)
    assert [data_shards(mesh, process) for process in range(len(shards))] == shards


@pytest.mark.parametrize(
    ("processes", "sizes", "message"),
    [
        (
            [0, 0, 1, 1, 2, 2],
            {"data": 2, "tensor": 3},
            r"of the 2 equal parts .* process 1 holds \[0, 1\]; .* share of 1",
        ),
        ([0, 1, 0, 1], {"data": 4}, r"of the 4 equal parts of a batch process 0 holds \[0, 2\]"),
        ([0, 1, 1, 0], {"data": 4}, r"process 0 holds \[0, 3\]"),
        ([0, 1, 1, 2], {"data": 4}, r"process 1 holds \[1, 2\]; expected one contiguous share of 1"),
    ],
)
def test_a_mesh_whose_rows_do_not_split_over_processes_is_refused_in_each(processes, sizes, message):
    mesh = mesh_of(processes, **sizes)
    with pytest.raises(ValueError, match=message):
        data_shards(mesh, 0)
    for process in set(processes):
        with pytest.raises(ValueError, match=r"mesh = .* process \d holds"):
            data_shards(mesh, process)


def test_launch_scripts_are_well_formed():
    folder = Path(train.__file__).parent / "launch"
    subprocess.run(["bash", "-n", folder / "slurm.sh"], check=True, timeout=20)
    yaml = pytest.importorskip("yaml")
    job = yaml.safe_load((folder / "jobset.yaml").read_text())["spec"]["replicatedJobs"][0]["template"]["spec"]
    command = job["template"]["spec"]["containers"][0]["command"][-1]
    count = re.search(r"--distributed.num-processes (\d+)", command)
    assert count is not None
    assert job["parallelism"] == job["completions"] == int(count[1])
    shown = re.sub(r'"\$JOB_COMPLETION_INDEX"', "1", command).split()
    config = parse(shown[shown.index("train") + 1 :])
    assert (config.distributed.num_processes, config.distributed.process_id) == (2, 1)
