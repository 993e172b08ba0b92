"""Vectors in files: an array that numpy reads or maps, and beside it the pictures of its rows, a line each."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np

from mlx_fastvlm.captions.picture_files import Picture
from mlx_fastvlm.errors import FastVLMError, OptionError
from mlx_fastvlm.locked_file import cannot_open, open_locked, write_all

_SUFFIX = ".npy"
_INDEX_SUFFIX = ".jsonl"
_HEADER_BYTES = 128  # room for the shape of any array; a multiple of 64, as the format has it


class EmbeddingFile:
    """A .npy file of float32 vectors, and a .jsonl file of the same name: line i is the picture of row i.

    Vectors go to disk one by one. Both files are written aside and appear with `finish`; without it, nothing changes.

    Args:
        path: of the .npy file.
        settings: what the vectors are made with, a part of every line.
        overwrite: whether files that are there are replaced.

    Raises:
        OptionError: the suffix is another, a file is there, another process makes it, or none can be made.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], *, overwrite: bool = False):
        if path.suffix != _SUFFIX:
            raise OptionError(f"The output {path} has an unknown suffix: give a file that ends with {_SUFFIX}.")
        self._path, self.index_path = path, path.with_suffix(_INDEX_SUFFIX)
        for file in (self._path, self.index_path):
            if file.exists() and not overwrite:
                raise OptionError(f"{file} exists: give another --out, or --overwrite to replace it.")
        self._settings = dict(settings)
        self._shape: tuple[int, ...] | None = None  # of one vector
        self.rows = 0
        self._is_finished = False
        with ExitStack() as stack:
            try:
                self._lines = stack.enter_context(open_locked(_aside(self.index_path), path))
                self._lines.truncate(0)  # of what a run that was killed has left
                self._vectors = stack.enter_context(open(_aside(self._path), "wb"))
                self._vectors.write(bytes(_HEADER_BYTES))
            except OSError as error:
                raise cannot_open(path, error) from None
            self._open = stack.pop_all()

    def add(self, picture: Picture, vector: np.ndarray) -> None:
        """Append a row. Raises FastVLMError if it cannot be written."""
        assert self._shape in (None, vector.shape), f"{vector.shape} after {self._shape}"
        self._shape = vector.shape
        page = {} if picture.page is None else {"page": picture.page}
        line = {"path": picture.path, **page, **self._settings}
        try:
            self._vectors.write(np.ascontiguousarray(vector, "<f4").data)
            write_all(self._lines, json.dumps(line).encode() + b"\n")
        except OSError as error:
            raise self._failure(error) from None
        self.rows += 1

    def finish(self) -> None:
        """Put both files into their places. Raises FastVLMError if that fails."""
        try:
            self._vectors.seek(0)
            self._vectors.write(_header((self.rows, *(self._shape or (0,)))))
            for file in (self._vectors, self._lines):
                file.flush()
                os.fsync(file.fileno())
            # A kill in between leaves vectors without a list, never vectors with another's.
            self.index_path.unlink(missing_ok=True)
            os.replace(_aside(self._path), self._path)
            os.replace(_aside(self.index_path), self.index_path)  # last, since this one is locked
        except OSError as error:
            raise self._failure(error) from None
        self._is_finished = True
        self.close()

    def close(self) -> None:
        """Let others write the files; what was not finished is removed first."""
        if not self._is_finished:
            for file in (self._path, self.index_path):
                _aside(file).unlink(missing_ok=True)
        with suppress(OSError):  # a full disk fails once more
            self._open.close()

    def _failure(self, error: OSError) -> FastVLMError:
        return FastVLMError(f"{self._path} cannot be written ({error.strerror or error}): mend that and try again.")


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.new")


def _header(shape: tuple[int, ...]) -> bytes:
    """Version 1.0 of numpy's format (numpy.lib.format), of a length that does not depend on the number of rows."""
    description = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({', '.join(map(str, shape))},), }}"
    start = b"\x93NUMPY\x01\x00" + struct.pack("<H", _HEADER_BYTES - 10)
    return start + description.encode().ljust(_HEADER_BYTES - 11) + b"\n"
