"""Gives MLX's Linux CPU wheel an optimized matrix product, without rebuilding it.

The wheel links the reference BLAS (2-5 GFLOP/s). libmlx.so reaches it through one pointer in its procedure linkage
table, `cblas_sgemm`; `use_openblas()` points that one at OpenBLAS from the `scipy-openblas32` wheel (BSD, the build that
NumPy and SciPy ship), which is 20-50x faster. Only libmlx.so sees the change: NumPy, torch and MLX's own LAPACK calls
keep theirs, and it works whether mlx was imported before or after. Linux with glibc, x86-64 and arm64; nothing happens
elsewhere. docs/cpu.md has the alternatives that were measured.

Left to others: which ops to run where (kernels/).
"""

import contextlib
import ctypes
import functools
import importlib.util
import os
import platform
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

OFF_SWITCH = "MLX_FASTVLM_BLAS"

# <elf.h>: tags of the dynamic section, and the type of a relocation that fills a procedure linkage slot
_DT_NULL, _DT_PLTRELSZ, _DT_STRTAB, _DT_SYMTAB, _DT_JMPREL = 0, 2, 5, 6, 23
_JUMP_SLOT = {"x86_64": 7, "aarch64": 1026}
_RTLD_DI_LINKMAP = 2


class _LinkMap(ctypes.Structure):
    """The public head of glibc's `struct link_map` (<link.h>)."""

    _fields_ = [("l_addr", ctypes.c_size_t), ("l_name", ctypes.c_char_p), ("l_ld", ctypes.c_size_t)]


class _Dyn(ctypes.Structure):
    _fields_ = [("tag", ctypes.c_int64), ("value", ctypes.c_uint64)]


class _Rela(ctypes.Structure):
    _fields_ = [
        ("offset", ctypes.c_uint64),
        ("type", ctypes.c_uint32),  # r_info, little endian: the low half is the type,
        ("symbol", ctypes.c_uint32),  # the high half the index into the symbol table
        ("addend", ctypes.c_int64),
    ]


_SIZEOF_SYM = 24  # Elf64_Sym; its first four bytes are the name's offset in the string table


@functools.cache
def openblas() -> ctypes.CDLL | None:
    """Opens the OpenBLAS of the `scipy-openblas32` package, or returns None where it is not installed.

    Its symbols carry the prefix `scipy_`. Integers are 32-bit, as in the BLAS that MLX was built against.
    """
    spec = importlib.util.find_spec("scipy_openblas32")
    if spec is None or spec.origin is None:
        return None
    lib = ctypes.CDLL(str(Path(spec.origin).parent / "lib" / "libscipy_openblas.so"))
    i, f, p = ctypes.c_int, ctypes.c_float, ctypes.c_void_p
    lib.scipy_cblas_sgemm.argtypes = [i, i, i, i, i, i, f, p, i, p, i, f, p, i]
    lib.scipy_cblas_sgemm.restype = None
    lib.scipy_cblas_sgemv.argtypes = [i, i, i, i, f, p, i, p, i, f, p, i]
    lib.scipy_cblas_sgemv.restype = None
    return lib


def use_openblas() -> str:
    """Points MLX's float32 matrix product at OpenBLAS; calling it again changes nothing.

    Returns:
        "openblas", or why MLX's own BLAS stays: "off: ...". Never raises: everything works without it, slowly.
        MLX_FASTVLM_BLAS=off in the environment leaves MLX as it is.
    """
    if os.environ.get(OFF_SWITCH, "").lower() == "off":
        return f"off: {OFF_SWITCH}=off"
    if sys.platform != "linux" or platform.machine() not in _JUMP_SLOT:
        return "off: not Linux x86-64 or arm64"
    try:
        lib = openblas()
        if lib is None:
            return "off: scipy-openblas32 is not installed"
        slot = _slot("cblas_sgemm")
    except (OSError, AttributeError) as error:  # AttributeError: a build of OpenBLAS without these symbols
        return f"off: {error}"
    if slot is None:
        return "off: this build of MLX does not reach cblas_sgemm through a writable slot"
    slot.value = ctypes.cast(lib.scipy_cblas_sgemm, ctypes.c_void_p).value
    return "openblas"


def in_use() -> bool:
    """Whether MLX's cblas_sgemm is OpenBLAS's now. Costs under a millisecond."""
    lib = openblas()
    slot = _slot("cblas_sgemm") if lib is not None else None
    return slot is not None and slot.value == ctypes.cast(lib.scipy_cblas_sgemm, ctypes.c_void_p).value


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """While open, a call into OpenBLAS uses its caller's thread only; nothing happens where there is no OpenBLAS.

    For callers that bring their own threads, and for small products: OpenBLAS's threads wait for each other by spinning,
    once a product, which costs more than they gain; on a busy machine each may spin for a whole time slice.

    Threads may open it at once and within itself: the setting is the process's, until the last one leaves.
    """
    lib = openblas()
    if lib is None:
        yield
        return
    with _one_thread.lock:
        if _one_thread.users == 0:
            _one_thread.threads_before = lib.scipy_openblas_get_num_threads()
            lib.scipy_openblas_set_num_threads(1)
        _one_thread.users += 1
    try:
        yield
    finally:
        with _one_thread.lock:
            _one_thread.users -= 1
            if _one_thread.users == 0:
                lib.scipy_openblas_set_num_threads(_one_thread.threads_before)


class _OneThread:
    """Who keeps OpenBLAS at one thread, and how many it had."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.users = 0
        self.threads_before = 0


_one_thread = _OneThread()


@functools.cache
def _slot(name: str) -> ctypes.c_void_p | None:
    """Finds the pointer through which libmlx.so calls the function `name`, if it has one and it can be written."""
    import mlx.core  # noqa: F401  loads libmlx.so

    maps = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    path = next((m[5] for m in maps if len(m) == 6 and m[5].endswith("/libmlx.so")), None)
    if path is None:
        return None
    handle = ctypes.CDLL(path, mode=os.RTLD_NOLOAD | os.RTLD_LAZY)._handle
    address = ctypes.c_void_p()
    dlinfo = ctypes.CDLL(None).dlinfo
    dlinfo.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p]
    if dlinfo(handle, _RTLD_DI_LINKMAP, ctypes.byref(address)) != 0:
        return None
    link = _LinkMap.from_address(address.value)
    dynamic, at = {}, link.l_ld
    while (entry := _Dyn.from_address(at)).tag != _DT_NULL:
        dynamic[entry.tag] = entry.value  # glibc has already turned the table addresses into absolute ones
        at += ctypes.sizeof(_Dyn)
    if not {_DT_JMPREL, _DT_PLTRELSZ, _DT_SYMTAB, _DT_STRTAB} <= dynamic.keys():
        return None
    count = dynamic[_DT_PLTRELSZ] // ctypes.sizeof(_Rela)
    for rela in (_Rela * count).from_address(dynamic[_DT_JMPREL]):
        symbol = dynamic[_DT_SYMTAB] + rela.symbol * _SIZEOF_SYM
        string = dynamic[_DT_STRTAB] + ctypes.c_uint32.from_address(symbol).value
        if rela.type == _JUMP_SLOT[platform.machine()] and ctypes.string_at(string) == name.encode():
            slot = link.l_addr + rela.offset
            # A build linked with -z now has the table read-only; writing there would end the process.
            return ctypes.c_void_p.from_address(slot) if _writable(slot, maps) else None
    return None


def _writable(address: int, maps: list[list[str]]) -> bool:
    for span, mode, *_ in maps:
        low, high = (int(edge, 16) for edge in span.split("-"))
        if low <= address < high:
            return "w" in mode
    return False
