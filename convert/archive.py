"""Where a source lies on disk: a folder as it is, or a zip whose safetensors are read in place. Neither reaches outside.

Knows nothing of what the files say: `checkpoint.py` reads weights, the rest of `convert` reads small files by path.
"""

from __future__ import annotations

import re
import shutil
import stat
import struct
import unicodedata
import uuid
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from mlx_fastvlm.checkpoint_files import WEIGHT_SUFFIXES, is_training_state
from mlx_fastvlm.errors import CheckpointError
from mlx_fastvlm.loading import OnProgress

from .aside import readable_size

MAX_MEMBERS = 10_000
MAX_SMALL_FILE = 64 * 2**20  # bytes; the largest, a tokenizer.json, has about 11 MB
MAX_SMALL_TOTAL = 256 * 2**20
MAX_RATIO = 200  # unpacked over packed; weights reach 3 and JSON 20, a zip bomb 1000
_RATIO_MATTERS_FROM = 2**20  # bytes: tiny repetitive files may compress better than that
_SPARE_DISK = 16 * 2**20  # bytes left free when unpacking
_CHUNK = 2**20
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")  # APPNOTE.TXT 4.3.7
_ENCRYPTED, _UTF8 = 0x1, 0x800  # bits of a member's flags


@dataclass(frozen=True)
class Extent:
    """Bytes `offset` … `offset + length` − 1 of the file `path`."""

    path: Path
    offset: int
    length: int


@dataclass(frozen=True)
class Folder:
    """A source as the converter sees it.

    Attributes:
        path: holds the small files, and every weight file that is not in `embedded`. Temporary if the source is a zip.
        origin: what the user gave, for messages and records.
        embedded: name → place of the .safetensors files that are read inside the zip.
    """

    path: Path
    origin: Path
    embedded: dict[str, Extent] = field(default_factory=dict)

    def holds(self, name: str) -> bool:
        """Whether there is a file of this name, unpacked or not."""
        return name in self.embedded or (self.path / name).is_file()

    def names(self) -> set[str]:
        """Names of the files, unpacked or not."""
        return {path.name for path in self.path.iterdir() if path.is_file()} | set(self.embedded)


@contextmanager
def open_source(source: Path, beside: Path, on_progress: OnProgress | None = None) -> Iterator[Folder]:
    """A checkpoint folder or zip, ready to be read; what a zip made necessary to unpack is removed at the end.

    Small files of a zip are unpacked into a hidden folder next to `beside`, so are weights that cannot be read in place
    (compressed ones and PyTorch's), and folders ending in .mlpackage. Stored .safetensors are not copied, but read once
    to verify the zip's checksum of them; their headers are checked as everywhere.

    Args:
        source: a folder, or a zip with the checkpoint's files at its top or in one folder.
        beside: the conversion's destination; the temporary folder lies in the same parent, so on the same disk.
        on_progress: called with (what is being done, bytes done, bytes in all) while checksums are verified.

    Raises:
        CheckpointError: no such source, a folder that cannot be read or a link in it that leads out of it, or a zip that
            is damaged, unsafe to unpack or too large for the disk.
    """
    if source.is_dir():
        check_links(source)
        yield Folder(source, source)
        return
    _check_is_zip(source)
    beside = beside.absolute()
    temporary = beside.parent / f".{beside.name}.{uuid.uuid4().hex[:8]}.source.partial"
    try:
        try:
            temporary.mkdir(mode=0o700)
            embedded = _unpack(source, temporary, on_progress)
        except (zipfile.BadZipFile, zlib.error, struct.error, EOFError) as error:
            raise CheckpointError(f"{source} is damaged ({error}); download it again.") from None
        except (NotImplementedError, UnicodeError) as error:  # a feature of zip that Python does not know
            raise CheckpointError(f"{source} cannot be read ({error}); pack it again as a plain zip.") from None
        except OSError as error:
            raise CheckpointError(f"{source} cannot be unpacked: {error.strerror or error}.") from None
        yield Folder(temporary, source, embedded)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_inside(folder: Path, path: Path) -> Path:
    """`path` itself, after checking that it leads to a place inside `folder`, through whatever symlinks.

    The one way out that is allowed is the Hugging Face cache's: `models--…/snapshots/<commit>/file` may lead to a file
    directly in the same repository's `blobs`.

    Raises:
        CheckpointError: a symlink leads elsewhere or in a circle, or the path is no regular file (a pipe, a device).
    """
    try:
        root, real = folder.resolve(), path.resolve()
    except (OSError, RuntimeError) as error:  # a circle of symlinks is a RuntimeError up to Python 3.12
        raise CheckpointError(f"{path} cannot be followed ({error}); replace it by the file itself.") from None
    repository = root.parent.parent
    of_hub_cache = root.parent.name == "snapshots" and repository.name.startswith("models--")
    if not real.is_relative_to(root) and not (of_hub_cache and real.parent == repository / "blobs"):
        raise CheckpointError(
            f"{path} is a link that leads out of the checkpoint, to {real}; replace it by the file itself."
        )
    if real.exists() and not real.is_file() and not real.is_dir():
        raise CheckpointError(f"{path} is not a regular file; expected a file of the checkpoint.")
    return path


def stored_extent(file: BinaryIO, path: Path, member: zipfile.ZipInfo) -> Extent:
    """Where the bytes of an uncompressed member lie in the zip file itself.

    Raises:
        zipfile.BadZipFile: the directory at the zip's end and the member's own header do not agree.
    """
    flags, method, stored_name, offset = _own_header(file, member)
    name = stored_name.decode("utf-8" if flags & _UTF8 else "cp437")
    is_stored = method == member.compress_type == zipfile.ZIP_STORED and member.file_size == member.compress_size
    if name != member.orig_filename or not is_stored:
        raise zipfile.BadZipFile(f"{member.filename} has two different headers")
    return Extent(path, offset, member.file_size)


def _own_header(file: BinaryIO, member: zipfile.ZipInfo) -> tuple[int, int, bytes, int]:
    """What stands before a member's bytes: flags, method of compression, name, and where the bytes begin."""
    file.seek(member.header_offset)
    raw = file.read(_LOCAL_HEADER.size)
    signature, _, flags, method, *_, name_length, extra_length = _LOCAL_HEADER.unpack(raw)
    if signature != b"PK\x03\x04":
        raise zipfile.BadZipFile(f"{member.filename} is not where the directory says")
    start = member.header_offset + _LOCAL_HEADER.size + name_length + extra_length
    return flags, method, file.read(name_length), start


def check_links(folder: Path) -> None:
    """Raise CheckpointError if a folder cannot be read or a link leads out of it; one that leads nowhere does no harm."""
    try:
        inside = [*folder.iterdir(), *(path for package in folder.glob("*.mlpackage") for path in package.rglob("*"))]
        links = [path for path in inside if path.is_symlink() and path.exists()]
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read ({error.strerror or error}).") from None
    for path in links:
        check_inside(folder, path)


def _check_is_zip(source: Path) -> None:
    """Raise CheckpointError if a source that is no folder is no zip file either, or is what is left of one."""
    if source.is_file():
        try:
            source.open("rb").close()
        except OSError as error:
            raise CheckpointError(f"{source} cannot be read ({error.strerror or error}).") from None
        if zipfile.is_zipfile(source):
            return
        if source.suffix.lower() == ".zip":
            raise CheckpointError(f"{source} is empty, cut off or damaged, so it is no zip file; download it again.")
    raise CheckpointError(f"{source} is neither a folder nor a zip file; give the checkpoint's folder or zip.")


def _unpack(source: Path, folder: Path, on_progress: OnProgress | None) -> dict[str, Extent]:
    """Unpack what must be on disk into `folder`; return where the rest lies."""
    with zipfile.ZipFile(source) as archive:
        members = _checked_members(source, archive)
        embedded, unpacked = {}, {}
        for name, member in members.items():
            in_place = name.endswith(".safetensors") and member.compress_type == zipfile.ZIP_STORED
            (embedded if in_place and "/" not in name else unpacked)[name] = member
        with source.open("rb") as file:
            _check_apart(source, archive, file)
            places = {name: stored_extent(file, source, member) for name, member in embedded.items()}
            _check_sizes(source, unpacked, folder)
            for name, member in unpacked.items():
                _unpack_member(source, archive, member, folder / name)
            _check_sums(file, [(member, places[name]) for name, member in embedded.items()], on_progress)
        return places


def _check_sums(file: BinaryIO, members: list[tuple[zipfile.ZipInfo, Extent]], on_progress: OnProgress | None) -> None:
    """Read every member once and compare with the zip's checksum. Raises zipfile.BadZipFile if one differs."""
    total, done = sum(extent.length for _, extent in members), 0
    for member, extent in members:
        file.seek(extent.offset)
        checksum, left = 0, extent.length
        while left and (chunk := file.read(min(_CHUNK, left))):
            checksum = zlib.crc32(chunk, checksum)
            left -= len(chunk)
            done += len(chunk)
            if on_progress:
                on_progress("Checking the zip", done, total)
        if left or checksum != member.CRC:
            raise zipfile.BadZipFile(f"{member.filename} does not have its checksum")


def _checked_members(source: Path, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Path below the checkpoint's folder → member, of every file that a checkpoint may need.

    Raises:
        CheckpointError: any entry, needed or not, could not be unpacked safely.
    """
    entries = archive.infolist()
    if len(entries) > MAX_MEMBERS:
        raise CheckpointError(f"{source} has {len(entries)} entries; a checkpoint has at most {MAX_MEMBERS}.")
    files: dict[str, zipfile.ZipInfo] = {}
    seen: set[str] = set()
    for entry in entries:
        problem = _problem(entry)
        folded = unicodedata.normalize("NFC", entry.filename).casefold().rstrip("/")
        if problem is None and folded in seen:  # also where case alone differs: macOS would overwrite
            problem = "is there twice"
        if problem is not None:
            raise CheckpointError(f"{source}: entry {entry.orig_filename!r} {problem}; it will not be unpacked.")
        seen.add(folded)
        if not entry.is_dir() and not _is_litter(PurePosixPath(entry.filename)):
            files[entry.filename] = entry
    top = _top_folder(source, files)
    below = {name.removeprefix(top): entry for name, entry in files.items()}
    return {name: entry for name, entry in below.items() if _is_needed(PurePosixPath(name))}


def _problem(entry: zipfile.ZipInfo) -> str | None:
    """What makes an entry unsafe, or None."""
    name, mode = entry.orig_filename, entry.external_attr >> 16
    if name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:", name):
        return "has an absolute path"
    if ".." in re.split(r"[/\\]", name):
        return "leads out of its folder"
    if any(character in '\\:*?"<>|' or ord(character) < 32 for character in name) or "//" in name or not name:
        return "has a name that is not a plain path"
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is a link or a special file"
    if entry.flag_bits & _ENCRYPTED:
        return "is encrypted"
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return f"is compressed by method {entry.compress_type} (expected none or deflate)"
    if entry.file_size > max(_RATIO_MATTERS_FROM, MAX_RATIO * entry.compress_size):
        return f"claims to unpack to more than {MAX_RATIO} times its size, as zip bombs do"
    return None


def _is_litter(path: PurePosixPath) -> bool:
    """What macOS adds to the zips it packs."""
    return path.parts[0] == "__MACOSX" or path.name == ".DS_Store"


def _top_folder(source: Path, files: dict[str, zipfile.ZipInfo]) -> str:
    """The one folder that all files are in, with a slash, or nothing if some lie at the top."""
    tops = {name.partition("/")[0] if "/" in name else "" for name in files}
    if "" in tops or not tops:
        return ""
    if len(tops) > 1:
        raise CheckpointError(
            f"{source} has several folders ({', '.join(sorted(tops)[:4])}); expected one checkpoint, at the top or in one."
        )
    return f"{tops.pop()}/"


def _is_needed(path: PurePosixPath) -> bool:
    """Files of the checkpoint's folder itself, and Core ML packages; not checkpoint-500/optimizer.pt and the like."""
    return not is_training_state(path.name) and (len(path.parts) == 1 or path.parts[0].endswith(".mlpackage"))


def _check_sizes(source: Path, unpacked: dict[str, zipfile.ZipInfo], folder: Path) -> None:
    small = {
        name: member.file_size
        for name, member in unpacked.items()
        if "/" not in name and not name.endswith(WEIGHT_SUFFIXES)
    }
    for name, size in small.items():
        if size > MAX_SMALL_FILE:
            raise CheckpointError(f"{source}: {name} has {readable_size(size)}; expected a small file or weights.")
    if sum(small.values()) > MAX_SMALL_TOTAL:
        raise CheckpointError(
            f"{source} has {readable_size(sum(small.values()))} of files besides its weights; "
            f"a checkpoint has at most {readable_size(MAX_SMALL_TOTAL)}."
        )
    needed = sum(member.file_size for member in unpacked.values()) + _SPARE_DISK
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CheckpointError(
            f"Unpacking what cannot be read inside {source} needs {readable_size(needed)} beside the destination; "
            f"{folder.parent} has {readable_size(free)} free. Free some room or choose another destination."
        )


def _unpack_member(source: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> None:
    """Write one member; the bytes that come out are counted against the claim, and their checksum is verified."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = 0
    with archive.open(member) as packed, path.open("xb") as file:
        while chunk := packed.read(_CHUNK):
            written += len(chunk)
            if written > member.file_size:
                break
            file.write(chunk)
    if written != member.file_size:
        raise CheckpointError(
            f"{source}: {member.filename} claims {member.file_size} bytes but does not have them; download it again."
        )


def _check_apart(source: Path, archive: zipfile.ZipFile, file: BinaryIO) -> None:
    """No entry's bytes may be another's as well, or reach into the directory at the end."""
    entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
    starts = [*(entry.header_offset for entry in entries[1:]), archive.start_dir]
    for entry, following in zip(entries, starts, strict=False):
        *_, start = _own_header(file, entry)
        if start + entry.compress_size > following:
            raise CheckpointError(
                f"{source}: {entry.filename} overlaps what follows it, so the file is damaged; download it again."
            )
