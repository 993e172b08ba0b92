"""Which chip this process computes on, as far as the choice of launch shapes depends on it. Decided once."""

from __future__ import annotations

import functools
import re
import sys
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_fastvlm.kernels import gpu

APPLE_FAMILIES = ("M1", "M2", "M3", "M4", "M5")  # generations known to this release, the newest last
CUDA = "cuda"

_FIRST_GENERATION = 13  # of Apple's GPU in the M1, "applegpu_g13g"; each M has the next
_TIERS = {"g": "base", "s": "Max", "d": "Ultra"}  # last letter of the architecture; a Pro has the base chip's


@dataclass(frozen=True)
class Chip:
    """A chip as MLX describes it.

    Attributes:
        name: "Apple M4 Max", "NVIDIA H100 80GB HBM3", or a CPU's.
        architecture: "applegpu_g16s", "sm_90", "x86_64".
        family: whose launch shapes are taken: one of APPLE_FAMILIES, "cuda", or None where no GPU computes. A newer
            Apple generation counts as the newest known; one that cannot be told (a virtual machine's) as the first.
        tier: "base", "Pro", "Max" or "Ultra"; None where there is no such thing.
        memory: in bytes, the machine's (Apple) or the card's; None if MLX does not say.
    """

    name: str
    architecture: str
    family: str | None
    tier: str | None
    memory: int | None

    @classmethod
    def from_device_info(cls, info: dict[str, Any], backend: str | None) -> Chip:
        """From `mx.device_info()` and what `gpu.backend()` says."""
        name, architecture = str(info.get("device_name", "unknown")), str(info.get("architecture", "unknown"))
        memory = info.get("memory_size") or info.get("total_memory")
        if backend != "metal":
            return cls(name, architecture, CUDA if backend == "cuda" else None, None, memory)
        in_name = re.search(r"\bM(\d+)\b(?: (Pro|Max|Ultra)\b)?", name)
        in_architecture = re.fullmatch(r"applegpu_g(\d+)([a-z])", architecture)
        number, tier = 1, None
        if in_name:
            number, tier = int(in_name[1]), in_name[2] or "base"
        elif in_architecture:
            number, tier = int(in_architecture[1]) - _FIRST_GENERATION + 1, _TIERS.get(in_architecture[2])
        family = APPLE_FAMILIES[min(max(number, 1), len(APPLE_FAMILIES)) - 1]
        return cls(name, architecture, family, tier, memory)


@functools.cache
def this_chip() -> Chip:
    """The chip of MLX's default device when this is first called."""
    return Chip.from_device_info(mx.device_info(), gpu.backend())


def gpu_cores() -> int | None:
    """How many GPU cores macOS counts; None elsewhere. Starts a program (some 10 ms): for reports only."""
    if sys.platform != "darwin":
        return None
    import subprocess  # imported here: answering needs no report

    try:
        told = subprocess.run(
            ["/usr/sbin/ioreg", "-rc", "AGXAccelerator", "-d1"], capture_output=True, text=True, timeout=5
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return cores_in(told)


def cores_in(ioreg: str) -> int | None:
    """The number behind "gpu-core-count" in ioreg's output."""
    found = re.search(r'"gpu-core-count"\s*=\s*(\d+)', ioreg)
    return int(found[1]) if found else None
