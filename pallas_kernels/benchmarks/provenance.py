"""Where a measurement comes from. Every file of recorded results holds `provenance(...)` under the key "provenance".

A JSON file holds it itself. Beside NAME.jsonl, whose lines are a run's metrics, lies NAME.meta.json.

On a machine that has the code but no git, the commit is null. `python -m pallas_kernels.benchmarks.provenance FILE ...`
fills it in, in the clone where the code that was measured is checked out.
"""

import datetime
import hashlib
import importlib.metadata
import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

ROOT = Path(__file__).parents[2]
PACKAGES = ("nsa_jax", "pallas_kernels", "train")


def provenance(command: str | Sequence[str]) -> dict[str, Any]:
    """What a reader needs to repeat a measurement that is made now, on this machine.

    Args:
      command: what was run, as one would type it, or its parts.

    Returns:
      "commit" (None where it is unknown, or where the code differs from it), "source" (a digest of the code itself),
      "date" (UTC), "command", "device" (kind and number) and "versions" (of Python, JAX, jaxlib, the platform and the
      driver; None for what the machine does not have).
    """
    device = jax.devices()[0]
    return {
        "commit": _commit(),
        "source": source_digest(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command if isinstance(command, str) else shlex.join(command),
        "device": {"kind": device.device_kind, "count": jax.device_count()},
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "jaxlib": importlib.metadata.version("jaxlib"),
            "platform": " ".join(device.client.platform_version.split()),
            "driver": _driver() if device.platform == "gpu" else None,
        },
    }


def source_digest(root: Path = ROOT) -> str:
    """A digest of all Python files of the packages that stand in `root`, by their names and contents."""
    digest = hashlib.sha256()
    for path in sorted(path for package in PACKAGES for path in (root / package).rglob("*.py")):
        digest.update(f"{path.relative_to(root).as_posix()}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def fill_in_commit(path: Path) -> None:
    """Writes the commit that is checked out into a result whose commit is null.

    Raises:
      ValueError: the code that is checked out is not the code that was measured, or it is not committed.
    """
    record = json.loads(path.read_text())
    found = record["provenance"]
    if found["commit"] is not None:
        return
    if found.get("source") != source_digest():
        raise ValueError(f"{path}: expected the code that was measured; what is checked out differs from it")
    found["commit"] = _commit()
    if found["commit"] is None:
        raise ValueError(f"{path}: expected a clone without uncommitted changes to the packages")
    path.write_text(json.dumps(record, indent=1) + "\n")


def _commit() -> str | None:
    """The commit that the packages' files are at; None outside a clone, or where they have been changed."""
    if not (ROOT / ".git").exists() or _output("git", "status", "--porcelain", "--", *PACKAGES):
        return None
    return _output("git", "rev-parse", "HEAD") or None


def _driver() -> str | None:
    found = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return found.splitlines()[0] if found else None


def _output(*command: str) -> str:
    """What a command prints; nothing where there is no such command or it fails."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


if __name__ == "__main__":
    for name in sys.argv[1:]:
        fill_in_commit(Path(name))
