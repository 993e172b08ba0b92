"""Files that a comparison writes: whether they can be is known before it, and nobody sees half of one."""

from __future__ import annotations

import tempfile
from pathlib import Path

from mlx_fastvlm.errors import OptionError
from mlx_fastvlm.replace_file import replace_file


def check_writable(path: Path) -> None:
    """Whether a file can be written to `path`; leaves no trace.

    Raises:
        OptionError: it is a folder, or the one it should lie in is missing or does not take it.
    """
    try:
        if path.is_dir():
            raise OptionError(f"{path} is a folder; give a file to write.")
        parent = path.absolute().parent
        if not parent.is_dir():
            raise OptionError(f"{parent} is not a folder; make it first.")
        with tempfile.NamedTemporaryFile(
            dir=parent, prefix=f".{path.name}."
        ):  # as long a name as it will be written by
            pass
    except OSError as error:
        raise _refused(path, error) from None


def write_output(path: Path, content: bytes) -> Path:
    """Write a file, aside and then renamed. Raises OptionError, see `check_writable`."""
    check_writable(path)
    try:
        replace_file(path, content)
    except OSError as error:
        raise _refused(path, error) from None
    return path


def _refused(path: Path, error: OSError) -> OptionError:
    return OptionError(f"{path} cannot be written ({error.strerror or error}); choose another place.")
