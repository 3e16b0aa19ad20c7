"""Which GPUs get which kernels: by compute capability, of devices that are there and of ones that are described."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from nsa_jax import NSAConfig, backends, nsa_attention
from nsa_jax.testing import random_inputs
from pallas_kernels.devices import SHARED_MEMORY_KIB, Device, capability_of, current_device, shared_memory_kib
from tests.pallas_kernels.cases import abstract

# Names that the driver gives, and the row of `KINDS` each belongs to.
KINDS = {
    "Tesla V100-SXM2-16GB": (7, 0),
    "Tesla T4": (7, 5),
    "Quadro RTX 6000": (7, 5),
    "NVIDIA A100": (8, 0),
    "NVIDIA A100-SXM4-80GB": (8, 0),
    "NVIDIA A100-PCIE-40GB": (8, 0),
    "NVIDIA A800-SXM4-80GB": (8, 0),
    "NVIDIA A800 80GB PCIe": (8, 0),
    "NVIDIA A10": (8, 6),
    "NVIDIA A10G": (8, 6),
    "NVIDIA A16": (8, 6),
    "NVIDIA RTX A6000": (8, 6),
    "NVIDIA L4": (8, 9),
    "NVIDIA L40S": (8, 9),
    "NVIDIA GeForce RTX 4090": (8, 9),
    "NVIDIA RTX 6000 Ada Generation": (8, 9),
    "NVIDIA RTX 4000 SFF Ada Generation": (8, 9),
    "NVIDIA H100": (9, 0),
    "NVIDIA H100 80GB HBM3": (9, 0),
    "NVIDIA H100 PCIe": (9, 0),
    "NVIDIA H200": (9, 0),
    "NVIDIA B200": (10, 0),
    "NVIDIA GeForce RTX 5090": (12, 0),
}
BRANCHES = ("compressed_attention", "select_blocks", "selected_attention", "window_attention")
CONFIG = NSAConfig()
TRITON, MOSAIC = backends.get("triton"), backends.get("mosaic")


@pytest.mark.parametrize(("kind", "capability"), KINDS.items())
def test_kinds_are_known_by_name(kind, capability):
    assert capability_of(kind) == capability
    with abstract(kind):
        assert current_device() == Device("gpu", kind, capability)


@pytest.mark.parametrize("kind", ["AMD Instinct MI300X", "NVIDIA A1000X", "NVIDIA L400", "NVIDIA T400", "cpu", ""])
def test_names_that_only_look_like_a_known_one_are_not_known(kind):
    assert capability_of(kind) is None


@pytest.mark.parametrize(("kind", "capability"), KINDS.items())
def test_a_device_that_is_there_says_its_capability_itself(kind, capability, monkeypatch):
    there = SimpleNamespace(platform="gpu", device_kind=kind, compute_capability="{}.{}".format(*capability))
    monkeypatch.setattr(jax, "devices", lambda: [there])
    assert current_device() == Device("gpu", kind, capability)


def test_on_a_mesh_of_devices_that_are_there_their_own_capability_counts(monkeypatch):
    there = SimpleNamespace(platform="gpu", device_kind="NVIDIA Tesla T4", compute_capability="9.0")
    monkeypatch.setattr(jax, "devices", lambda: [there])
    with abstract("NVIDIA Tesla T4"):
        assert current_device().compute_capability == (9, 0)
    with abstract("NVIDIA A100"):
        assert current_device().compute_capability == (8, 0)


def test_a_device_that_says_nothing_is_known_by_name(monkeypatch):
    for stated in ({}, {"compute_capability": ""}, {"compute_capability": "gfx942"}):
        there = SimpleNamespace(platform="gpu", device_kind="NVIDIA A16", **stated)
        monkeypatch.setattr(jax, "devices", lambda there=there: [there])
        assert current_device().compute_capability == (8, 6)


def test_an_unknown_name_with_a_capability_is_taken_by_that(monkeypatch):
    there = SimpleNamespace(platform="gpu", device_kind="NVIDIA Z1", compute_capability="13.0")
    monkeypatch.setattr(jax, "devices", lambda: [there])
    assert TRITON.supports("window_attention", current_device())


@pytest.mark.parametrize(("kind", "capability"), KINDS.items())
def test_triton_runs_from_8_0_and_mosaic_on_9_0_alone(kind, capability):
    device = Device("gpu", kind, capability)
    for backend, takes, expected in (
        (TRITON, capability >= (8, 0), "8.0 or later"),
        (MOSAIC, capability == (9, 0), "9.0" if capability < (9, 0) else "at most 9.0"),
    ):
        if takes:
            assert backend.supports("window_attention", device)
        else:
            with pytest.raises(NotImplementedError, match=f"expected compute capability {expected}$"):
                backend.supports("window_attention", device)


def test_an_unknown_gpu_is_refused_and_no_kernel_is_chosen_for_a_cpu():
    with pytest.raises(NotImplementedError, match="expected an NVIDIA GPU of a known compute capability"):
        TRITON.supports("window_attention", Device("gpu", "AMD Instinct MI300X"))
    assert not TRITON.supports("window_attention", Device("cpu", "cpu"))


def explained(kind):
    shapes = jax.eval_shape(
        lambda: random_inputs(
            jax.random.key(0), CONFIG, T=2048, num_heads=64, num_kv_heads=4, head_dim=128, dtype=jnp.bfloat16
        )[:3]
    )
    with abstract(kind):
        return backends.explain(nsa_attention, *shapes, config=CONFIG)


@pytest.mark.parametrize("kind", ["Tesla T4", "Tesla V100-SXM2-16GB", "AMD Instinct MI300X"])
def test_gpus_without_kernels_get_xla(kind):
    explanation = explained(kind)
    assert [explanation[op].backend for op in BRANCHES] == ["xla"] * 4
    assert "capability" in dict(explanation["window_attention"].refusals)["triton"]


@pytest.mark.parametrize(
    "kind",
    [
        *("NVIDIA A16", "NVIDIA L40S"),
        *(
            pytest.param(kind, marks=pytest.mark.exhaustive)
            for kind in (
                *("NVIDIA A100", "NVIDIA A800-SXM4-80GB", "NVIDIA H100", "NVIDIA H200", "NVIDIA B200"),
                "NVIDIA GeForce RTX 4090",
            )
        ),
    ],
)
def test_newer_gpus_get_kernels(kind):
    explanation = explained(kind)
    assert explanation["nsa_attention"].backend == "fused"
    assert all(explanation[op].backend in ("mosaic", "triton") for op in BRANCHES)
    assert all(
        explanation[op + "_backward"].backend in ("mosaic", "triton") for op in BRANCHES if op != "select_blocks"
    )


def test_shared_memory_is_looked_up_by_capability():
    assert [shared_memory_kib(x) for x in ((8, 0), (8, 6), (8, 9), (9, 0))] == [163, 99, 99, 227]
    assert shared_memory_kib((99, 0)) == 0
    assert set(SHARED_MEMORY_KIB) == {*KINDS.values(), (8, 7), (10, 3), (12, 1)}


@pytest.mark.parametrize(("capability", "kib"), SHARED_MEMORY_KIB.items())
def test_shared_memory_is_an_l1_cache_without_what_cuda_keeps_of_it(capability, kib):
    """CUDA keeps 32 KiB of each multiprocessor's L1 cache; from 8.0 on 28, and another 1 for each thread block."""
    kept, caches = (32, (96, 128)) if capability < (8, 0) else (28 + 1, (128, 192, 256))
    assert kib + kept in caches
