"""Finds clang, and says in one line what to install where it is missing."""

from __future__ import annotations

import functools
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass

CLANG_VARIABLE = "METAL_EMULATOR_CLANG"
OLDEST_CLANG = 19  # bfloat arithmetic and the generic bit builtins
NEWEST_TRIED = 30
INSTALL = "apt-get install clang-19 llvm-19"


@dataclass(frozen=True)
class Toolchain:
    """A usable clang.

    Attributes:
        clang: the C++ compiler's path.
        version: what it says of itself; part of every build's key.
        symbolizer: llvm-symbolizer's path.
    """

    clang: str
    version: str
    symbolizer: str


def candidates() -> list[str]:
    """Compilers to try: the one the user names, else clang++ and its versioned names, newest first."""
    named = os.environ.get(CLANG_VARIABLE)
    if named:
        return [named]
    return ["clang++", *(f"clang++-{version}" for version in range(NEWEST_TRIED, OLDEST_CLANG - 1, -1))]


def llvm_symbolizer(clang: str) -> str | None:
    """The symbolizer of the same version as this clang, or any."""
    suffix = re.search(r"-\d+$", clang)
    beside = os.path.join(os.path.dirname(os.path.realpath(clang)), "llvm-symbolizer")
    names = [f"llvm-symbolizer{suffix.group()}" if suffix else "", beside, "llvm-symbolizer"]
    names += [f"llvm-symbolizer-{version}" for version in range(NEWEST_TRIED, OLDEST_CLANG - 1, -1)]
    return next((path for path in map(shutil.which, filter(None, names)) if path), None)


@functools.cache
def find_toolchain() -> Toolchain | str:
    """The toolchain, or one line that says why there is none and what to install."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"the Metal emulator runs on Linux on x86-64 only, not on {sys.platform} {platform.machine()}"
    flags = _cpu_flags()
    if flags and not {"avx2", "fma", "f16c"} <= flags:
        return "the Metal emulator needs a CPU with AVX2, FMA and F16C (x86-64-v3)"
    for name in candidates():
        path = shutil.which(name)
        if path is None:
            continue
        version = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
        number = re.search(r"clang version (\d+)", version)
        if number and int(number.group(1)) >= OLDEST_CLANG:
            symbolizer = llvm_symbolizer(path)
            if symbolizer is None:
                return f"{name} is there, llvm-symbolizer is not: {INSTALL}"
            return Toolchain(path, version, symbolizer)
    return f"no clang++ of version {OLDEST_CLANG} or newer: {INSTALL} (or name one in {CLANG_VARIABLE})"


def _cpu_flags() -> set[str]:
    """The CPU's features as Linux lists them; empty if it does not."""
    try:
        with open("/proc/cpuinfo") as file:
            found = re.search(r"^flags\s*:(.*)$", file.read(), re.M)
    except OSError:
        return set()
    return set(found.group(1).split()) if found else set()
