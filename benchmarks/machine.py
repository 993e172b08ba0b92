"""What a measurement was taken on, and how much memory a process has needed."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
import time
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_fastvlm.blas import OFF_SWITCH, use_openblas
from mlx_fastvlm.kernels.choice import KERNELS_VARIABLE


def describe_machine() -> dict[str, Any]:
    """Processor, memory, system, versions, commit and how busy the machine is now."""
    return {
        "cpu": cpu_name(),
        "cores": _usable_cores(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "mlx": version("mlx"),
        "mlx_device": mx.default_device().type.name,
        "blas": use_openblas(),
        "numba": _version("numba"),
        "kernels": os.environ.get(KERNELS_VARIABLE, "auto"),
        "mlx_fastvlm": version("mlx-fastvlm"),
        "commit": _commit(),
        "load_average": load_average(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def load_average() -> float:
    """How many processes wanted a core in the last minute, this one included."""
    return round(os.getloadavg()[0], 2)


def machine_line(machine: dict[str, Any]) -> str:
    """The description as one line above a table."""
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB, {machine['system']}; "
        f"MLX {machine['mlx']} on the {machine['mlx_device']}, BLAS {machine['blas']}, numba {machine['numba'] or 'none'}, "
        f"kernels {machine['kernels']}; load average {machine['load_average']}"
        + (f", {machine['load_average_after']} at the end" if "load_average_after" in machine else "")
    )


def use_device(choice: str) -> None:
    """Where MLX computes from here on: its default device ("auto"), or the "cpu"."""
    if choice == "cpu":
        mx.set_default_device(mx.cpu)


def computes_on_cpu(choice: str) -> bool:
    """Whether MLX computes on the CPU: its default device ("auto") is one, or it was told to ("cpu")."""
    return choice == "cpu" or mx.default_device().type == mx.DeviceType.cpu


def use_blas(choice: str) -> str:
    """Give MLX on a Linux CPU the matrix product the runtime would use, in a process that runs somebody else's code.

    Args:
        choice: "auto" as the runtime decides, "off" for MLX's own.

    Returns:
        What is in use, or why MLX's own is.
    """
    if choice == "off":
        os.environ[OFF_SWITCH] = "off"
    return use_openblas()


def matmul_gflops(size: int = 768) -> float:
    """Rate of a float32 matrix product on the default device: it tells which BLAS is at work, whatever it is called."""
    a, b = mx.random.normal((2, size, size))
    mx.eval(a @ b)
    start = time.perf_counter()
    mx.eval(a @ b)
    return round(2e-9 * size**3 / (time.perf_counter() - start), 1)


def peak_rss() -> int:
    """Most memory this process has had resident, in bytes.

    Linux's ru_maxrss starts from the parent's size at the fork, so /proc is asked first.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return child_rss_bytes(resource.getrusage(resource.RUSAGE_SELF))
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def resident_bytes(pid: int) -> int | None:
    """Memory that a process has resident now; None once it has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        kibibytes = _output("ps", "-o", "rss=", "-p", str(pid))  # where there is no /proc
        return int(kibibytes) * 1024 if kibibytes else None


def child_rss_bytes(usage: resource.struct_rusage) -> int:
    """ru_maxrss in bytes: Linux counts KiB, macOS bytes."""
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def cpu_name() -> str:
    """What the processor calls itself."""
    if sys.platform == "darwin":
        return _output("sysctl", "-n", "machdep.cpu.brand_string") or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _commit() -> str | None:
    """The commit of a source checkout, with "+" when files differ from it; None for an installed package."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    commit = _output("git", "-C", str(root), "rev-parse", "--short", "HEAD")
    changed = _output("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    return commit and commit + ("+" if changed else "")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
