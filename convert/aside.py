"""Folders that appear only when they are complete: written aside, then renamed; any error or Ctrl-C leaves nothing."""

from __future__ import annotations

import errno
import json
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlx_fastvlm.errors import CheckpointError, OptionError
from mlx_fastvlm.json_file import read_json_object

_ABANDONED_AFTER = 86400  # seconds
MADE_BY_US = ("conversion.json", "export.json")  # what marks a folder that --force may replace


def check_destination(destination: Path, force: bool) -> None:
    """Whether a folder may be made here, known before any work is done.

    Raises:
        OptionError: it exists, cannot be replaced, or has no parent folder.
    """
    if destination.exists():
        if not destination.is_dir():
            raise OptionError(f"{destination} is a file; give a folder to make.")
        if any(destination.iterdir()):
            if not force:
                raise OptionError(f"{destination} exists; give another folder, or --force to replace it.")
            _check_replaceable(destination)
    if not destination.absolute().parent.is_dir():
        raise OptionError(f"{destination.absolute().parent} is not a folder; make it first.")


def check_apart(source: Path, destination: Path) -> None:
    """Whether a folder that is read and one that is made do not overlap. Raises OptionError if they do."""
    if source.resolve() == destination.resolve():
        raise OptionError(f"Source and destination are the same folder, {source}.")
    if destination.resolve().is_relative_to(source.resolve()):
        raise OptionError(f"{destination} lies in {source}, which is read; give a folder elsewhere.")


def readable_size(count: int) -> str:
    """Bytes as people read them, in MB or GB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def check_room(folder: Path, needed: int) -> None:
    """Whether `needed` bytes fit on the disk of `folder`. Raises CheckpointError with both figures if not."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CheckpointError(
            f"The disk of {folder} has {readable_size(free)} free, but {readable_size(needed)} are needed; free some "
            "room or choose another folder."
        )


def hidden_beside(destination: Path) -> Path:
    """A new hidden name beside a folder to be made, by which `_remove_abandoned` knows what was left."""
    return destination.resolve().parent / f".{destination.name}.{uuid.uuid4().hex[:8]}.partial"


def make_folder(folder: Path) -> None:
    """A new folder. Raises CheckpointError if it cannot be made."""
    try:
        folder.mkdir()
    except OSError as error:
        raise CheckpointError(f"{folder.parent} cannot be written: {error.strerror or error}.") from None


@contextmanager
def written_aside(destination: Path, force: bool) -> Iterator[Path]:
    """A new folder beside `destination` that takes its place at the end, or vanishes on any error or Ctrl-C.

    Raises:
        CheckpointError: the disk is full, or the folder cannot be written.
    """
    destination = destination.resolve()
    _remove_abandoned(destination)
    aside = hidden_beside(destination)
    try:
        aside.mkdir()
        yield aside
        if force and destination.exists() and any(destination.iterdir()):
            _exchange(aside, destination)
        else:
            aside.rename(destination)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            free = shutil.disk_usage(destination.parent).free
            raise CheckpointError(
                f"The disk of {destination.parent} is full ({readable_size(free)} free); free some room."
            ) from None
        raise CheckpointError(f"{destination} cannot be written: {error.strerror or error}.") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def read_notes(folder: Path) -> dict[str, Any] | None:
    """What the maker of a folder wrote down about it, its conversion.json or export.json; None if nobody did.

    Raises:
        CheckpointError: that is damaged.
    """
    path = next((folder / name for name in MADE_BY_US if (folder / name).exists()), None)
    return None if path is None else read_json_object(path, CheckpointError)


def write_json(path: Path, value: object) -> None:
    """A readable JSON file."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _exchange(aside: Path, destination: Path) -> None:
    """Put `aside` in the place of `destination`; if that fails, the old folder is back where it was."""
    old = aside.with_suffix(".old")
    destination.rename(old)
    try:
        aside.rename(destination)
    except BaseException:
        old.rename(destination)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _check_replaceable(destination: Path) -> None:
    """Whether everything in a folder was made by a conversion. Raises OptionError if not."""
    notes = read_notes(destination)
    if notes is None:
        raise OptionError(f"{destination} is not a converted model; --force will not delete it.")
    made = notes.get("sha256") or notes.get("files")
    if not isinstance(made, dict | list):  # an older release's, which did not list its files
        return
    allowed = {*made, *MADE_BY_US, "README.md", "fidelity.json", ".DS_Store"}
    others = sorted(path.name for path in destination.iterdir() if path.name not in allowed)
    if others:
        raise OptionError(
            f"{destination} also holds {others[0]}, which --force will not delete; move it elsewhere first."
        )


def _remove_abandoned(destination: Path) -> None:
    """Remove what a conversion to the same place left when it was killed outright.

    Folders being written are kept for a day: another process may be at it. A replaced folder's remains are not needed
    once the new one is in its place.
    """
    ours = re.compile(rf"\.{re.escape(destination.name)}\.[0-9a-f]{{8}}(\.source)?\.(partial|old)")
    for left in destination.parent.iterdir():
        if not ours.fullmatch(left.name):
            continue
        try:
            age = time.time() - left.stat().st_mtime
        except OSError:  # its own process has just removed it
            continue
        if age > _ABANDONED_AFTER or (left.suffix == ".old" and destination.exists()):
            shutil.rmtree(left, ignore_errors=True)
