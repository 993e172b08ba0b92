"""NVRTC through ctypes: CUDA C++ → PTX, with the library and headers of NVIDIA's pip wheels. No driver, no GPU."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from tests.cuda_twin.source import DEVICE_HEADER, STUB_HEADER

INSTALL = "pip install nvidia-cuda-nvrtc nvidia-cuda-runtime nvidia-cuda-cccl"
DEFAULT_ARCHITECTURE = "sm_80"


class CudaCompileError(Exception):
    """NVRTC rejects a source; the message is its log."""


@dataclass(frozen=True)
class Nvrtc:
    """The loaded library and the folders with CUDA's headers."""

    library: ctypes.CDLL
    include_folders: tuple[Path, ...]


@functools.cache
def find_nvrtc() -> Nvrtc | str:
    """NVRTC of the installed wheels, or one line that says what is missing and what to install."""
    roots = _wheel_folders()
    libraries = [path for root in roots for path in sorted(root.glob("*/lib/libnvrtc.so.*"))]
    if not libraries:
        return f"no NVRTC: {INSTALL}"
    includes = tuple(
        folder
        for root in roots
        for folder in sorted([*root.glob("*/include"), *root.glob("*/include/cccl")])
        if folder.is_dir()
    )
    for header, wheel in (
        ("cuda_fp16.h", "nvidia-cuda-runtime"),
        ("cooperative_groups.h", "nvidia-cuda-runtime"),
        ("cuda/std/array", "nvidia-cuda-cccl"),
    ):
        if not any((folder / header).is_file() for folder in includes):
            return f"NVRTC is there, {header} of {wheel} is not: {INSTALL}"
    try:
        for builtins in libraries[-1].parent.glob("libnvrtc-builtins.so.*"):
            ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
        return Nvrtc(ctypes.CDLL(str(libraries[-1])), includes)
    except OSError as error:
        return f"NVRTC cannot be loaded ({error}): {INSTALL}"


def compile_to_ptx(source: str, architecture: str = DEFAULT_ARCHITECTURE) -> str:
    """PTX of a CUDA source, compiled with the options that MLX uses.

    Args:
        source: what source.cuda_source made.
        architecture: such as "sm_80" or "sm_90".

    Raises:
        CudaCompileError: NVRTC rejects the source, or is not installed.
    """
    nvrtc = find_nvrtc()
    if isinstance(nvrtc, str):
        raise CudaCompileError(nvrtc)
    library = nvrtc.library
    program = ctypes.c_void_p()
    created = library.nvrtcCreateProgram(
        ctypes.byref(program),
        source.encode(),
        b"kernel.cu",
        1,
        (ctypes.c_char_p * 1)(STUB_HEADER.encode()),
        (ctypes.c_char_p * 1)(DEVICE_HEADER.encode()),
    )
    if created:
        raise CudaCompileError(f"NVRTC cannot create a program (error {created})")
    options = [f"--gpu-architecture={architecture}", "--std=c++17", "-default-device"]
    options += [f"--include-path={folder}" for folder in nvrtc.include_folders]
    encoded = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    try:
        if library.nvrtcCompileProgram(program, len(options), encoded):
            raise CudaCompileError(_text(library, program, "ProgramLog").strip())
        return _text(library, program, "PTX")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _text(library: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> str:
    """What nvrtcGet<what> gives."""
    size = ctypes.c_size_t()
    getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    getattr(library, f"nvrtcGet{what}")(program, text)
    return text.value.decode(errors="replace")


def _wheel_folders() -> list[Path]:
    """Folders named nvidia/ of the installed wheels, which share that namespace."""
    spec = importlib.util.find_spec("nvidia")
    return [Path(folder) for folder in spec.submodule_search_locations or []] if spec else []
