"""The strict test environment: eight simulated CPU devices, equal bits on GPUs; rank promotion and warnings raise."""

import gc
import os
import signal
from pathlib import Path

from helpers.compiling import QUICKLY

os.environ.setdefault(
    "XLA_FLAGS",
    f"--xla_force_host_platform_device_count=8 --xla_gpu_exclude_nondeterministic_ops=true {QUICKLY}",
)
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import pytest
from hypothesis import settings

# Python searches for garbage a tenth as often: what JAX has traced is many objects, and hardly any of them are garbage.
gc.set_threshold(7_000)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Errors keep JAX's own frames: hundreds of tests provoke one, and JAX would search each traceback for them.
jax.config.update("jax_traceback_filtering", "off")
# Compiled programs are kept between runs of the tests. A program is found by all of its text, the compiler's flags and
# its version, so that results do not depend on what is there. `make clean` removes them.
COMPILED = Path(__file__).parents[1] / ".jax_cache"
jax.config.update("jax_compilation_cache_dir", str(COMPILED))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

# Derandomised: a failure here is a failure everywhere, and CI does not fail by lot.
settings.register_profile("nsa_jax", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("nsa_jax")


# Tests interrupt themselves, which a shell that started them in the background may have told them to ignore.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config):
    """An entry that another worker is writing, or that a stopped one left half written, is compiled anew."""
    config.addinivalue_line("filterwarnings", "ignore:Error reading persistent compilation cache entry")


@pytest.fixture(autouse=True, scope="module")
def traced_programs_of_one_module():
    """Frees what a module traced and compiled: some gigabytes in the end, which Python would search for garbage."""
    yield
    jax.clear_caches()


def pytest_collection_modifyitems(config, items):
    """Tests marked `gpu` are skipped where no GPU is found."""
    if any(device.platform == "gpu" for device in jax.devices()):
        return
    skip = pytest.mark.skip(reason="no GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
