"""What a GPU can do, by its CUDA compute capability, on devices that are there and on abstract ones.

Support is decided by lists of what is known to work, never of what is not: a device that no table here knows is
refused.
"""

import dataclasses
import re

import jax

Capability = tuple[int, int]

# Kinds of NVIDIA GPUs, as `device_kind` names them, by compute capability (NVIDIA's table of CUDA GPUs). A kind is
# recognised by a whole word of its name, and the longest such word counts.
KINDS: dict[Capability, tuple[str, ...]] = {
    (7, 0): ("V100", "TITAN V"),
    (7, 5): ("T4", "T4G", "RTX 2060", "RTX 2070", "RTX 2080", "RTX 4000", "RTX 5000", "RTX 6000", "RTX 8000"),
    (8, 0): ("A100", "A800", "A30"),
    (8, 6): (
        *("A2", "A10", "A10G", "A16", "A40"),
        *("RTX 3050", "RTX 3060", "RTX 3070", "RTX 3080", "RTX 3090"),
        *(
            "RTX A500",
            "RTX A1000",
            "RTX A2000",
            "RTX A3000",
            "RTX A4000",
            "RTX A4500",
            "RTX A5000",
            "RTX A5500",
            "RTX A6000",
        ),
    ),
    (8, 7): ("Orin",),
    (8, 9): (
        *("L4", "L20", "L40", "L40S"),
        *("RTX 4050", "RTX 4060", "RTX 4070", "RTX 4080", "RTX 4090"),
        *(
            "RTX 2000 Ada",
            "RTX 3500 Ada",
            "RTX 4000 Ada",
            "RTX 4000 SFF Ada",
            "RTX 4500 Ada",
            "RTX 5000 Ada",
            "RTX 5880 Ada",
            "RTX 6000 Ada",
        ),
    ),
    (9, 0): ("H100", "H200", "H800", "H20", "GH200"),
    (10, 0): ("B100", "B200", "GB200"),
    (10, 3): ("B300", "GB300"),
    (12, 0): ("RTX 5050", "RTX 5060", "RTX 5070", "RTX 5080", "RTX 5090", "RTX PRO"),
    (12, 1): ("GB10",),
}

# KiB of shared memory that a thread block may ask for (CUDA programming guide, technical specifications per compute
# capability).
SHARED_MEMORY_KIB: dict[Capability, int] = {
    (7, 0): 96,
    (7, 5): 64,
    (8, 0): 163,
    (8, 6): 99,
    (8, 7): 163,
    (8, 9): 99,
    (9, 0): 227,
    (10, 0): 227,
    (10, 3): 227,
    (12, 0): 99,
    (12, 1): 99,
}


@dataclasses.dataclass(frozen=True)
class Device:
    """What a program is traced for.

    Attributes:
      platform: "cpu", "gpu" or "tpu".
      device_kind: the device's name, such as "NVIDIA H100 80GB HBM3".
      compute_capability: (major, minor) of an NVIDIA GPU; None for everything else, and for a GPU that is only
        described (`jax.sharding.AbstractDevice`) by a name that `KINDS` does not have.
    """

    platform: str
    device_kind: str
    compute_capability: Capability | None = None

    def __str__(self) -> str:
        if self.compute_capability is None:
            return f"{self.device_kind} ({self.platform})"
        return f"{self.device_kind} (compute capability {'.'.join(map(str, self.compute_capability))})"


def current_device() -> Device:
    """The device that is traced for: that of the mesh in context if it is abstract, otherwise JAX's default one.

    Programs can therefore be lowered for GPUs where there are none.
    """
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    device = jax.devices()[0]
    # The mesh of devices that are there has an abstract device, too, which does not know the capability.
    if abstract is not None and (abstract.platform, abstract.device_kind) != (device.platform, device.device_kind):
        kind = abstract.device_kind
        return Device(abstract.platform, kind, capability_of(kind) if abstract.platform == "gpu" else None)
    if device.platform != "gpu":
        return Device(device.platform, device.device_kind)
    major, _, minor = str(getattr(device, "compute_capability", "")).partition(".")
    known = (int(major), int(minor)) if major.isdecimal() and minor.isdecimal() else capability_of(device.device_kind)
    return Device("gpu", device.device_kind, known)


def capability_of(device_kind: str) -> Capability | None:
    """The compute capability of a kind of GPU by its name; None for a name that `KINDS` does not have.

    Example:
      >>> capability_of("NVIDIA A100-SXM4-80GB"), capability_of("NVIDIA L40S"), capability_of("AMD Instinct MI300X")
      ((8, 0), (8, 9), None)
    """
    found = [
        (len(name), capability)
        for capability, names in KINDS.items()
        for name in names
        if re.search(rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])", device_kind)
    ]
    return max(found)[1] if found else None  # "RTX 6000 Ada" is longer than "RTX 6000"


def shared_memory_kib(capability: Capability) -> int:
    """KiB of shared memory that a thread block may use; 0 for a capability that is not known."""
    return SHARED_MEMORY_KIB.get(capability, 0)
