"""Several processes as one run: how they find one another, agree on errors, and stop together.

A run of one process pays nothing for this: it waits for nothing and sends nothing.
"""

import contextlib
import importlib.util
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from train.config import DistributedConfig
from train.signals import SIGNALS

# How long a process that failed alone waits for the others to end too. After that JAX ends them.
SHUTDOWN_SECONDS = 60
# What JAX needs of SLURM; a batch script or a shell outside `srun` has only some of these.
SLURM_TASK = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")


def start(config: DistributedConfig) -> None:
    """Joins the processes of the run, if there are several. Call it before anything that asks JAX for a device.

    Raises:
      ValueError: the settings are incomplete or contradict each other, or a launcher started several processes and JAX
        cannot find out which.
    """
    address, count, index = config.coordinator_address, config.num_processes, config.process_id
    if count is not None and count < 1:
        raise ValueError(f"distributed.num_processes = {count}: expected at least 1")
    if index is not None and not 0 <= index < (count or 1):
        raise ValueError(f"distributed.process_id = {index}: expected 0 to distributed.num_processes - 1 = {count}")
    if count == 1 or jax.distributed.is_initialized():
        return
    launcher = _launcher(os.environ)
    settings: dict[str, Any] = {}
    if (address, count, index) != (None, None, None):
        if address is None or count is None or index is None or ":" not in address:
            raise ValueError(
                f"distributed = (coordinator_address {address}, num_processes {count}, process_id {index}): "
                "expected all three, the address as host:port"
            )
        settings = {
            "coordinator_address": address,
            "num_processes": count,
            "process_id": index,
            "cluster_detection_method": "deactivate",
        }
    elif launcher is None:
        return
    try:
        jax.distributed.initialize(**settings, shutdown_timeout_seconds=SHUTDOWN_SECONDS)
    except (ValueError, ImportError) as error:
        raise ValueError(
            f"{launcher} started several processes, but JAX cannot join them ({error}): give distributed."
            "coordinator_address, num_processes and process_id, or num_processes = 1 for runs of their own"
        ) from error
    if threading.current_thread() is threading.main_thread():
        # JAX has installed a handler of its own, with which SIGTERM would no longer end a process.
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))


def _launcher(environment: Mapping[str, str]) -> str | None:
    """The launcher, of those that JAX knows, that started this process and others with it."""
    if int(environment.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return "Open MPI"
    if all(name in environment for name in SLURM_TASK):
        tasks = environment["SLURM_NTASKS"]
        # In an interactive shell the first is the job's number of tasks, the second that of the shell.
        if min(int(tasks), int(environment.get("SLURM_STEP_NUM_TASKS", tasks))) > 1:
            return "SLURM"
    # How many pods a Kubernetes Job has only its API says, which JAX asks through the package `kubernetes`.
    pod = environment.get("JOB_COMPLETION_INDEX") if "KUBERNETES_SERVICE_HOST" in environment else None
    if pod is not None and (pod != "0" or importlib.util.find_spec("kubernetes") is not None):
        return "Kubernetes"
    return None


def gather(value: Any) -> list[Any]:
    """Every process's value, as JSON gives it back; all processes must call it."""
    text = json.dumps(value)
    if jax.process_count() == 1:
        return [json.loads(text)]
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.asarray(data.size))
    width = -(-int(sizes.max()) // 4096) * 4096  # whole pages, because every other width is another compilation
    rows = multihost_utils.process_allgather(np.pad(data, (0, width - data.size)))
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


@contextlib.contextmanager
def together(*kinds: type[Exception]) -> Iterator[None]:
    """An error in one process is raised in all of them, so that none waits for a process that has ended.

    All processes must enter this context, and may not wait for one another inside it. All raise the error of the first
    process that failed, with its message. The error has the type of the original if that is one of `kinds`, and
    otherwise the first of them.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    complaint = None if error is None else [type(error).__name__, str(error)]
    index, first = next(((i, each) for i, each in enumerate(gather(complaint)) if each is not None), (0, None))
    if error is not None and first == complaint:
        raise error
    if first is not None:
        name, message = first
        kind = next((kind for kind in kinds if kind.__name__ == name), kinds[0])
        raise kind(f"process {index}: {message}") from error


def in_turn(jitted: Callable) -> Callable:
    """A jitted function that waits for its result where several processes compute on CPUs.

    There, processes communicate through Gloo, which mixes up programs that run at the same time, and they hang.
    """

    def call(*arguments: Any) -> Any:
        result = jitted(*arguments)
        return jax.block_until_ready(result) if jax.default_backend() == "cpu" and jax.process_count() > 1 else result

    return call


class Stop:
    """The stop signal that some process received, if one did.

    SIGTERM and SIGINT are recorded from the first question on, by the main thread: before a step was made there is
    nothing to save, and they do what they did before. So does a second one, and every one after `close`.
    """

    def __init__(self, mesh: Mesh):
        self.number: int | None = None  # of the first signal that this process received
        self._before: dict[int, Any] = {}  # handlers
        self._asked: jax.Array | None = None
        self._flags = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._largest = in_turn(jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec())))

    def __call__(self, number: int, frame: Any) -> None:
        """Handles a signal."""
        if self.number is None:
            self.number = number
        else:
            self.close()
            signal.raise_signal(number)

    def requested(self) -> int | None:
        """The signal to stop for, the same in every process. Call it once per step, after the step is dispatched.

        Several processes learn of a signal one step late: the answer of a step is read during the next one, so that
        the devices never wait for it.
        """
        self._listen()
        if jax.process_count() == 1:
            return self.number
        before = self._asked
        flag = np.full(1, self.number or 0, np.int32)
        self._asked = self._largest(
            jax.make_array_from_callback((self._flags.num_devices,), self._flags, lambda index: flag)
        )
        return None if before is None else int(before) or None

    def close(self) -> None:
        """Records nothing more."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _listen(self) -> None:
        if self._before or threading.current_thread() is not threading.main_thread():
            return
        for number in SIGNALS:
            if (handler := signal.getsignal(number)) is not signal.SIG_IGN:
                self._before[number] = handler
                signal.signal(number, self)
