"""Compiles translated kernels with clang and keeps the results in a cache named by their content.

The cache is a folder outside the project (METAL_EMULATOR_CACHE, else ~/.cache/metal-emulator). Every entry is written beside
its place and moved there, so several processes may build at the same time. It holds the runtime's object files and, per
mode, the precompiled prelude (shim/ and MLX's own preamble, read from the installed wheel) and one program per kernel.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx

from tests.metal_emulator.capture import CapturedKernel
from tests.metal_emulator.counting import insert_counters
from tests.metal_emulator.errors import EmulationError
from tests.metal_emulator.toolchain import Toolchain, find_toolchain
from tests.metal_emulator.translate import rewrite, translate

CACHE_VARIABLE = "METAL_EMULATOR_CACHE"
UNUSED_DAYS = 30
HERE = Path(__file__).parent
# The headers that MLX puts before every custom kernel, in that order; complex.h is replaced by shim/complex.h.
MLX_PREAMBLE = ("bf16.h", "bf16_math.h", "defines.h", "logging.h", "utils.h")

COMMON = [
    "-std=c++17",
    "-march=x86-64-v3",
    "-ffp-contract=on",
    "-fno-math-errno",
    "-Xclang",
    "-ffloat16-excess-precision=none",  # half arithmetic rounds after every operation, as a GPU's does
    "-Xclang",
    "-fbfloat16-excess-precision=none",
    "-Wno-everything",
    "-Wno-c++11-narrowing",
    "-Wno-reserved-user-defined-literal",
]
WATCHED = [
    "-fsanitize=thread",
    "-fno-vectorize",
    "-fno-slp-vectorize",
    "-mprefer-vector-width=128",
    "-mllvm",
    "-tsan-instrument-func-entry-exit=0",
    "-mllvm",
    "-tsan-instrument-read-before-write=1",
]
UNDEFINED = "array-bounds,shift-exponent,integer-divide-by-zero,signed-integer-overflow,float-cast-overflow"
LOSSY = "implicit-unsigned-integer-truncation,implicit-signed-integer-truncation"
FLAGS = {
    "run": ["-O2", "-gline-tables-only"],
    "check": ["-O1", "-gline-tables-only", *WATCHED, f"-fsanitize={UNDEFINED},{LOSSY}"],
    "count": ["-O2", *WATCHED],
    "as": ["-DMSL_STATIC_CHECK=1"],
}
RUNTIME_FLAGS = ["-std=c++20", "-O2", "-march=x86-64-v3"]
RUNTIME_SOURCES = ("fiber", "findings", "memory", "scheduler", "main")
MONITORS = {
    "run": ("monitor_none",),
    "check": ("monitor_check", "access_hooks", "undefined_behavior"),
    "count": ("monitor_count", "access_hooks"),
}


class CompileError(EmulationError):
    """clang rejects the kernel; `errors` are its messages, one per line."""

    def __init__(self, kernel: str, errors: list[str]):
        self.errors = errors
        super().__init__(f"kernel {kernel} does not compile:\n" + "\n".join(errors))


def toolchain() -> Toolchain:
    """The toolchain; raises EmulationError if there is none."""
    found = find_toolchain()
    if isinstance(found, str):
        raise EmulationError(found)
    return found


def cache_folder() -> Path:
    """Where builds are kept."""
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "metal-emulator"


def cached(name: str, make: Callable[[Path], object]) -> Path:
    """The cache entry of that name; `make` writes it (a file or a folder) to the path it is given if it is missing."""
    entry = cache_folder() / name
    if entry.exists():
        os.utime(entry)  # remove_unused goes by it
        return entry
    remove_unused()
    entry.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=entry.parent, prefix=".building-") as folder:
        made = Path(folder) / "entry"
        make(made)
        try:
            made.rename(entry)
        except OSError:  # another process was faster, and a folder cannot replace a folder
            if not entry.exists():
                raise
    return entry


@functools.cache
def remove_unused() -> None:
    """Removes, once per process, what no process has used for a month: kernels change, and each change is a new entry."""
    oldest = time.time() - UNUSED_DAYS * 24 * 3600
    for entry in [*cache_folder().glob("kernels/*"), *cache_folder().glob("static/*")]:
        with contextlib.suppress(OSError):  # another process removes it too
            if entry.is_file() and entry.stat().st_mtime < oldest:
                entry.unlink()


def digest(*parts: str) -> str:
    """A short name for content."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def run_clang(arguments: list[str]) -> str:
    """Runs clang++ and gives its output and messages.

    Raises:
        EmulationError: clang fails; the message is clang's.
    """
    result = subprocess.run([toolchain().clang, *arguments], capture_output=True, text=True)
    if result.returncode:
        raise EmulationError(result.stderr.strip())
    return result.stdout + result.stderr


@functools.cache
def runtime_objects(mode: str) -> tuple[str, ...]:
    """The object files of a mode's runtime. Only its monitor differs from other modes' and needs compiling again."""
    folder = HERE / "runtime"
    headers = [path.read_text() for path in sorted(folder.glob("*.h"))]

    def compile_one(name: str) -> str:
        source = folder / f"{name}.cpp"
        key = digest(str(RUNTIME_FLAGS), toolchain().version, source.read_text(), *headers)
        command = [*RUNTIME_FLAGS, "-c", str(source), "-o"]
        return str(cached(f"runtime/{name}-{key}.o", lambda target: run_clang([*command, str(target)])))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return tuple(pool.map(compile_one, [*RUNTIME_SOURCES, *MONITORS[mode]]))


def mlx_preamble(address_spaces: bool) -> str:
    """MLX's preamble as C++, from the headers of the installed wheel."""
    folder = mlx_include_folder() / "mlx/backend/metal/kernels"
    parts = []
    for name in MLX_PREAMBLE:
        text = (folder / name).read_text()
        text = re.sub(r'^[ \t]*#[ \t]*(include[ \t]*"[^"]*"|pragma once)[^\n]*$', "", text, flags=re.M)
        # clang has no arrays of another address space as parameters; they are pointers anyway.
        text = re.sub(r"constant const int64_t strides\[\d\]", "constant const int64_t* strides", text)
        parts.append(f'#line 1 "{name}"\n{rewrite(text, address_spaces)}\n')
    return "".join(parts)


def mlx_include_folder() -> Path:
    """The include folder of the installed MLX."""
    for folder in mx.__spec__.submodule_search_locations or [str(Path(mx.__file__).parent)]:
        if (Path(folder) / "include").is_dir():
            return Path(folder) / "include"
    raise EmulationError("the installed MLX has no include folder with its Metal headers")


@functools.cache
def prelude(mode: str) -> Path:
    """The precompiled prelude of a mode: shim/ and MLX's preamble."""
    headers = sorted((HERE / "shim").iterdir())
    sources = [*((header, "shim") for header in headers), (HERE / "runtime" / "interface.h", "runtime")]
    preamble = mlx_preamble(address_spaces=mode == "as")
    flags = [*COMMON, *FLAGS[mode]]
    key = digest(str(flags), toolchain().version, preamble, *(source.read_text() for source, _ in sources))

    def copy_headers(target: Path) -> None:
        for source, place in sources:
            (target / place).mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target / place / source.name)
        (target / "all.h").write_text(f'#include "shim/prelude.h"\n{preamble}')

    # Copies: a precompiled header is tied to the files it was made of, and these never change.
    folder = cached(f"prelude-{mode}-{key}", copy_headers)
    precompile = [*flags, "-x", "c++-header", "-Xclang", "-fno-pch-timestamp", str(folder / "all.h"), "-o"]
    return cached(f"prelude-{mode}-{key}.pch", lambda target: run_clang([*precompile, str(target)]))


def kernel_flags(mode: str) -> list[str]:
    """clang's arguments before the name of a translated kernel."""
    return [*COMMON, *FLAGS[mode], "-include-pch", str(prelude(mode))]


def compiler_errors(output: str) -> list[str]:
    """clang's errors without the source excerpts: `name.metal:3:5: error: ...`."""
    errors = [line for line in output.splitlines() if re.search(r"\berror: |\bnote: in instantiation", line)]
    return [re.sub(r"^\S*/(?=[^/]*:\d+:\d+)", "", line) for line in errors] or output.splitlines()[:20]


def build(kernel: CapturedKernel, mode: str) -> Path:
    """The program that runs this kernel in mode "run", "check" or "count".

    Raises:
        CompileError: the kernel is not valid.
    """
    text = translate(kernel)
    key = digest(mode, str(kernel_flags(mode)), str(runtime_objects(mode)), text, counting_version())

    def make(target: Path) -> None:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "kernel.cpp"
            source.write_text(text)
            link = ["-no-pie", *runtime_objects(mode), "-pthread", "-lm", "-o", str(target)]
            try:
                if mode == "count":
                    ir = Path(folder) / "kernel.ll"
                    run_clang([*kernel_flags(mode), "-S", "-emit-llvm", str(source), "-o", str(ir)])
                    ir.write_text(insert_counters(ir.read_text()))
                    run_clang(["-O1", "-Xclang", "-disable-llvm-passes", "-Wno-everything", str(ir), *link])
                else:
                    compiled = Path(folder) / "kernel.o"
                    run_clang([*kernel_flags(mode), "-c", str(source), "-o", str(compiled)])
                    run_clang([str(compiled), *link])
            except EmulationError as error:
                raise CompileError(kernel.name, compiler_errors(str(error))) from None

    return cached(f"kernels/{kernel.name}-{mode}-{key}", make)


@functools.cache
def counting_version() -> str:
    """Changes whenever counting.py does."""
    return digest((HERE / "counting.py").read_text())
