"""Which files are videos, by their first bytes: all that a command for pictures must know to hand one over.

Apart from video/, so that describing a picture loads nothing of that.
"""

from __future__ import annotations

import os
from pathlib import PurePosixPath
from urllib.parse import urlsplit

_SUFFIXES = frozenset(".mp4 .m4v .mov .mkv .webm .avi .mpg .mpeg .ts .m2ts .mts .wmv .flv .3gp .ogv .mxf".split())
_HEAD_BYTES = 512
_STILL_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1", b"avif", b"avis")
# First bytes of containers: offset, bytes. ISO files and transport streams are looked at more closely.
_CONTAINERS = (
    (0, b"\x1a\x45\xdf\xa3"),  # Matroska, WebM
    (8, b"AVI "),
    (0, b"FLV\x01"),
    (0, b"\x00\x00\x01\xba"),  # MPEG program stream
    (0, b"\x00\x00\x01\xb3"),  # MPEG-1 and MPEG-2 video without a container
    (0, b"OggS"),
    (0, b"\x06\x0e\x2b\x34"),  # MXF
    (0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11"),  # ASF: Windows Media
)
_ISO_BOXES = (b"moov", b"mdat", b"wide", b"free", b"skip")  # a QuickTime file without ftyp begins with one
_TS_SYNC = 0x47
_TS_PACKETS = ((0, 188), (4, 192))  # where the first begins, and bytes from one to the next; 192 of Blu-ray and AVCHD


def is_video(name: str) -> bool:
    """Whether a path is a video file by its first bytes, or an address by its suffix. False where it cannot be read."""
    try:
        if name.lower().startswith(("http://", "https://")):
            return PurePosixPath(urlsplit(name).path).suffix.lower() in _SUFFIXES
        if not os.path.isfile(name):  # a pipe could not be read again
            return False
        with open(name, "rb") as file:
            return _begins_like_video(file.read(_HEAD_BYTES))
    except (OSError, ValueError):
        return False


def _begins_like_video(head: bytes) -> bool:
    if head[4:8] == b"ftyp":
        return head[8:12] not in _STILL_BRANDS
    if head[4:8] in _ISO_BOXES:
        return True
    for first, packet in _TS_PACKETS:
        third = first + 2 * packet
        if len(head) > third and set(head[first : third + 1 : packet]) == {_TS_SYNC} != set(head):
            return True
    return any(head.startswith(start, offset) for offset, start in _CONTAINERS)
