"""A file that one process at a time appends records to, so that whatever ends it leaves whole ones and one torn at most.

What the records are, and what becomes of a torn one, is the caller's matter.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from mlx_fastvlm.errors import OptionError


def open_locked(path: Path, name: Path | None = None) -> BinaryIO:
    """Open a file, made if it is missing, that no other process writes.

    Args:
        path: of the file; a link stays one.
        name: what messages call it; else its path.

    Returns:
        It, unbuffered, to read and to append to; the lock is given up when it is closed.

    Raises:
        OptionError: it cannot be opened, or another process writes it.
    """
    name = name or path
    try:
        return _open_locked(Path(os.path.realpath(path)), name)
    except OSError as error:
        raise cannot_open(name, error) from None


def cannot_open(name: Path, error: OSError) -> OptionError:
    """What to raise where an output is not to be had."""
    return OptionError(f"{name} cannot be written ({error.strerror or error}); give another --out.")


@contextmanager
def closed_on_failure(close: Callable[[], None], failure: Callable[[OSError], Exception]) -> Iterator[None]:
    """Let go of an opened file if what it holds stops the run.

    Args:
        close: closes it.
        failure: makes of an OSError what is raised instead.
    """
    try:
        yield
    except OSError as error:
        close()
        raise failure(error) from None
    except BaseException:
        close()
        raise


def _open_locked(path: Path, name: Path) -> BinaryIO:
    while True:
        file = open(path, "a+b", buffering=0)  # noqa: SIM115, it stays open
        try:
            lock(file, name)
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        except BaseException:
            file.close()
            raise
        file.close()  # the other process renamed a new file over it in between


def lock(file: BinaryIO, name: Path) -> None:
    """Keep other processes that lock it from an open file. Raises OptionError if one holds it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OptionError(f"{name} is being written by another run: wait for it, or give another --out.") from None
    except OSError as error:
        if error.errno not in (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS):
            raise  # those four: a network file system without locks, on which nobody can be kept out


def append(file: BinaryIO, record: bytes) -> None:
    """Write a record behind what is there, or nothing of it. Raises OSError."""
    end = os.fstat(file.fileno()).st_size
    try:
        write_all(file, record)
    except OSError:
        with suppress(OSError):
            file.truncate(end)
        raise


def write_all(file: BinaryIO, data: bytes) -> None:
    """Write all; a disk that fills up may take a part before it refuses. Raises OSError."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]
