"""A caption inside the picture's own file, as alternative text for those who cannot see it.

Through Exiv2 (the exiv2 package, in the extra `metadata`), which edits metadata and copies everything else as it is.
Written are, as far as the format has them: XMP's Iptc4xmpCore:AltTextAccessibility and dc:description, and the caption
of an IPTC record, 2:120, all as the IPTC Photo Metadata Standard names them.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from types import ModuleType

from mlx_fastvlm.errors import ImageError, OptionError

ALT_TEXT = "Xmp.iptc.AltTextAccessibility"
DESCRIPTION = "Xmp.dc.description"
IPTC_CAPTION = "Iptc.Application2.Caption"

_LANGUAGE = "x-default"
_IPTC_CHARSET = "Iptc.Envelope.CharacterSet"
_IPTC_UTF8 = "\x1b%G"
_IPTC_CAPTION_BYTES = 2000
_PICTURE_INDEX = b"MPF\0"


class NoPlaceForCaption(ImageError):
    """The picture's format cannot hold a caption, or Exiv2 does not write it."""


def check_available() -> None:
    """Raises OptionError where the extra is not installed."""
    _exiv2()


def read_alt_text(path: Path) -> str | None:
    """The alternative text that a picture's file holds; None if it holds none, or cannot hold or show one.

    Raises:
        OptionError: see `check_available`.
    """
    exiv2 = _exiv2()
    try:
        image = exiv2.ImageFactory.open(os.fspath(path))
        image.readMetadata()
    except exiv2.Exiv2Error:
        return None
    return _text(image.xmpData(), ALT_TEXT)


def write_caption(path: Path, caption: str, *, overwrite: bool = False) -> bool:
    """Put a caption into a picture's file. Pixels and all other metadata stay as they are.

    The new file is written aside and renamed, so that no reader and no crash sees half of it. Permissions and extended
    attributes stay; the time of modification becomes now, for backups to notice. Of a link, its target is replaced.

    Args:
        path: the picture.
        caption: the text.
        overwrite: whether to replace an alternative text that is there. Without it a description or an IPTC caption
            that is there stays as well.

    Returns:
        False if there is an alternative text, other than `caption`, that stays.

    Raises:
        NoPlaceForCaption: the format cannot hold a caption.
        ImageError: the file is damaged or cannot be replaced.
        OptionError: see `check_available`.
    """
    exiv2 = _exiv2()
    path = Path(os.path.realpath(path))
    try:
        content = path.read_bytes()
        image = exiv2.ImageFactory.open(content)
        if not image.checkMode(exiv2.MetadataId.Xmp) & exiv2.AccessMode.Write:
            raise NoPlaceForCaption(f"{path} cannot hold a caption: Exiv2 does not write {image.mimeType()} files.")
        image.readMetadata()
        present = _text(image.xmpData(), ALT_TEXT)
        if present is not None and not overwrite:
            return present == caption
        _set_xmp(image.xmpData(), caption, overwrite)
        if image.checkMode(exiv2.MetadataId.Iptc) & exiv2.AccessMode.Write:
            _set_iptc(image.iptcData(), caption, overwrite)
        image.writeMetadata()
        edited = bytes(image.io().mmap())
        if _way_from_picture_index(edited) != _way_from_picture_index(content):
            raise ImageError(f"{path} cannot take a caption (the further pictures inside it would be lost).")
        _replace(path, edited)
    except exiv2.Exiv2Error as error:
        if error.code == exiv2.ErrorCode.kerMemoryContainsUnknownImageType:
            raise NoPlaceForCaption(f"{path} cannot hold a caption: Exiv2 does not know its format.") from None
        raise ImageError(f"{path} cannot take a caption ({error.message}).") from None
    except OSError as error:
        raise ImageError(f"{path} cannot be replaced ({error.strerror or error}).") from None
    return True


def _exiv2() -> ModuleType:
    try:
        import exiv2  # here, because it is an extra
    except ImportError:
        raise OptionError(
            "Captions in the pictures' files need the exiv2 package: run `pip install 'mlx-fastvlm[metadata]'`."
        ) from None
    exiv2.LogMsg.setLevel(exiv2.LogMsg.Level.mute)  # its warnings are about odd metadata that stays as it is
    return exiv2


def _set_xmp(xmp: object, caption: str, overwrite: bool) -> None:
    """Set the text of no particular language; those in other languages stay."""
    for key in (ALT_TEXT, DESCRIPTION):
        if overwrite or _text(xmp, key) is None:
            translations = dict(xmp[key].value()) if key in xmp else {}
            xmp[key] = {_LANGUAGE: caption, **{k: v for k, v in translations.items() if k != _LANGUAGE}}


def _set_iptc(iptc: object, caption: str, overwrite: bool) -> None:
    """Set the caption unless that takes another encoding than the record's other texts have."""
    if IPTC_CAPTION in iptc and not overwrite:
        return
    if len(iptc) and iptc.detectCharset() not in ("UTF-8", "ASCII"):
        return
    iptc[_IPTC_CHARSET] = _IPTC_UTF8
    iptc[IPTC_CAPTION] = caption.encode()[:_IPTC_CAPTION_BYTES].decode(errors="ignore")


def _text(xmp: object, key: str) -> str | None:
    """The text of no particular language, or else of the first one there is."""
    if key not in xmp:
        return None
    value = xmp[key].value()
    translations = dict(value) if hasattr(value, "keys") else {_LANGUAGE: str(value)}
    return translations.get(_LANGUAGE) or next(filter(None, translations.values()), None)


def _way_from_picture_index(jpeg: bytes) -> int:
    """Bytes from the index of a JPEG with several pictures (CIPA DC-007) to the end; 0 if it has no index.

    Its further pictures lie behind the first one, and the index knows them by their distance from itself. Exiv2, which
    puts metadata into an order of its own, may move what stood behind the index to before it.
    """
    place = jpeg.find(_PICTURE_INDEX)
    return len(jpeg) - place if place >= 0 else 0


def _replace(path: Path, content: bytes) -> None:
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # it replaces somebody's picture: not even a power failure may cost that
        shutil.copystat(path, aside)
        os.utime(aside)
        os.replace(aside, path)
    except BaseException:
        os.unlink(aside)
        raise
