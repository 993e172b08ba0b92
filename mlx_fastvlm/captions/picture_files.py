"""Which pictures a list of files and folders stands for, in the order in which they are worked on.

Goes by names alone: whether a file holds what its name promises is known when it is read.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from mlx_fastvlm.errors import ImageError, OptionError
from mlx_fastvlm.image_source import split_page
from mlx_fastvlm.pdf_pages import count_pages

PDF_SUFFIX = ".pdf"
MAX_PDF_PAGES = 10_000  # of one document; a damaged one may claim a million
# What is taken from a folder; a file that is named itself may have any suffix.
SUFFIXES = frozenset(
    ".avif .bmp .gif .heic .heif .hif .jfif .jp2 .jpe .jpeg .jpg .mpo .pdf .pgm .png .pnm .ppm .tif .tiff .webp".split()
)

_URL = re.compile(r"https?://", re.IGNORECASE)
_DIGITS = re.compile(r"([0-9]+)")


@dataclass(frozen=True)
class Picture:
    """One picture to work on: a file, a URL, or a page of a PDF document.

    Attributes:
        path: as it was named, or the folder as it was named and the way from there.
        page: from 1, of a PDF document; None for what has no pages.
    """

    path: str
    page: int | None = None

    @property
    def is_url(self) -> bool:
        return _URL.match(self.path) is not None

    @property
    def name(self) -> str:
        """What messages call it, and what every place that takes an image takes."""
        return self.path if self.page is None else f"{self.path}#page={self.page}"

    @property
    def source(self) -> str | Path:
        """What `open_image` takes; a Path where the name of a file might be mistaken for a data: URL."""
        return self.name if self.is_url else Path(self.name)


def find_pictures(
    paths: Iterable[str], *, recursive: bool = False, on_unreadable: Callable[[str], None] = lambda message: None
) -> Iterator[Picture]:
    """The pictures that files, folders and URLs stand for, each once.

    Paths keep the order in which they are given. A folder stands for the pictures in it, by suffix, in natural order
    (2.jpg before 10.jpg) and without hidden ones; a PDF document stands for its pages. At most one folder's names are
    held at a time, beside what was found.

    Args:
        paths: what to go through. One that does not exist is yielded, for reading it to say so.
        recursive: whether folders inside folders count, links to folders included; each folder counts once.
        on_unreadable: is told, in one line, of a folder inside a folder that cannot be listed, and of a document of
            more than `MAX_PDF_PAGES`.

    Raises:
        ImageError: a folder in `paths` cannot be listed.
    """
    seen: set[tuple[str, int | None]] = set()
    folders: set[tuple[int, int]] = set()
    for path in paths:
        if _URL.match(path):
            found = iter([path])
        else:
            path = str(Path(os.path.expanduser(path)))  # without ./ and //, so that a path is the same in every run
            found = _files_in(path, recursive, folders, on_unreadable) if os.path.isdir(path) else iter([path])
        for file in found:
            for picture in _pages(file, on_unreadable):
                key = (picture.path if picture.is_url else os.path.abspath(picture.path), picture.page)
                if key not in seen:
                    seen.add(key)
                    yield picture


def require_paths(paths: Iterable[str]) -> None:
    """Raises ImageError for the first path, of those that somebody typed, where there is nothing."""
    for path in paths:
        file = os.path.expanduser(split_page(path)[0])
        if not _URL.match(path) and not os.path.lexists(file):
            raise ImageError(f"There is no file or folder {path}: check the path.")


def read_list(stream: BinaryIO, name: str) -> list[str]:
    """The paths in a list: one a line, or separated by null bytes as `find -print0` writes them.

    Raises:
        OptionError: it cannot be read.
    """
    try:
        content = stream.read()
    except OSError as error:
        raise OptionError(f"{name} cannot be read ({error.strerror or error}); give a list of paths.") from None
    lines = content.split(b"\0") if b"\0" in content else content.splitlines()
    return [os.fsdecode(line) for line in lines if line.strip()]


def natural_key(name: str) -> tuple[list[str | int], str]:
    """Sorts names as people do: numbers by value, letters without regard to case; the name itself decides ties."""
    pieces = _DIGITS.split(name.casefold())
    return [int(piece) if i % 2 else piece for i, piece in enumerate(pieces)], name


def _files_in(
    folder: str, recursive: bool, folders: set[tuple[int, int]], on_unreadable: Callable[[str], None]
) -> Iterator[str]:
    """Paths of a folder's pictures; `folders` are those that were gone through, which ends loops of links."""
    status = os.stat(folder)
    if (status.st_dev, status.st_ino) in folders:
        return
    folders.add((status.st_dev, status.st_ino))
    try:
        with os.scandir(folder) as listing:
            entries = sorted((entry for entry in listing if _is_wanted(entry, recursive)), key=_entry_key)
    except OSError as error:
        raise ImageError(f"{folder} cannot be listed ({error.strerror or error}): check its permissions.") from None
    for entry in entries:
        path = entry.name if folder == "." else os.path.join(folder, entry.name)
        if not os.path.isdir(path):
            yield path
            continue
        try:
            yield from _files_in(path, recursive, folders, on_unreadable)
        except (ImageError, OSError) as error:
            on_unreadable(str(error))


def _entry_key(entry: os.DirEntry[str]) -> tuple[list[str | int], str]:
    return natural_key(entry.name)


def _is_wanted(entry: os.DirEntry[str], recursive: bool) -> bool:
    if entry.name.startswith("."):
        return False
    # A link that leads nowhere is a picture that is missing; a pipe or device that has a picture's name is not one.
    missing = entry.is_symlink() and not os.path.exists(entry.path)
    if not missing and entry.is_dir():
        return recursive
    return (missing or entry.is_file()) and os.path.splitext(entry.name)[1].lower() in SUFFIXES


def _pages(path: str, on_unreadable: Callable[[str], None]) -> Iterator[Picture]:
    """A file as one picture, a PDF document as one for each page."""
    document, page = split_page(path)
    if page is not None or not path.lower().endswith(PDF_SUFFIX) or _URL.match(path):
        yield Picture(document, page)
        return
    try:
        pages = count_pages(Path(path))
    except ImageError:
        yield Picture(path)  # reading it says what is wrong
        return
    if pages > MAX_PDF_PAGES:
        on_unreadable(f"{path} has {pages} pages; at most {MAX_PDF_PAGES} are read: split it.")
        return
    for page in range(1, pages + 1):
        yield Picture(path, page)
