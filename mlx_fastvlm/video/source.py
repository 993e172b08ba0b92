"""What the name of a video source stands for: a file, an address, a camera or a screen.

Opens nothing; that is reader.py's.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit, urlunsplit

from mlx_fastvlm.errors import OptionError

# FFmpeg's input devices, named as in its documentation. lavfi makes test pictures.
_DEVICES = ("v4l2", "x11grab", "kmsgrab", "avfoundation", "lavfi")
_WEB_SCHEMES = ("http", "https")
_LIVE_SCHEMES = ("rtsp", "rtsps", "rtmp", "rtmps", "rtp", "udp", "tcp", "srt")
_DEVICE_RATE = {"framerate": "30"}  # avfoundation's own default, 29.97, is none that cameras offer
_WEB_TIMEOUT = 15.0  # seconds for a connection, and for every read


@dataclass(frozen=True)
class Source:
    """Where frames come from.

    Attributes:
        kind: "file", "address", "camera" or "screen"; "device" for one of FFmpeg's named by the user.
        location: what FFmpeg opens.
        name: for messages and rows; an address is without its password.
        format: FFmpeg's input format; None to recognize it.
        options: of that format.
        timeout: seconds that opening, and every read, may take; None for as long as it takes.
    """

    kind: str
    location: str
    name: str
    format: str | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    timeout: float | None = None

    @property
    def is_live(self) -> bool | None:
        """Whether frames come in their own time; None where that shows only when it is open."""
        if self.kind != "address":
            return self.kind != "file"
        return None if urlsplit(self.location).scheme.lower() in _WEB_SCHEMES else True


def parse_source(name: str, *, platform: str = sys.platform) -> Source:
    """What a user means.

    Args:
        name: a path; an http(s), rtsp, rtmp or udp address; a camera's number, or its device as /dev/video0; "screen",
            or "screen:1" for the second one; or DEVICE:NAME with one of FFmpeg's input devices, as "x11grab::0.0".
        platform: as sys.platform names it.

    Raises:
        OptionError: it is none of these, or this system has no such thing.
    """
    scheme, colon, rest = name.partition(":")
    if name == "-":
        raise OptionError("A video cannot be read from standard input: give a file, since its parts lie in any order.")
    if name.isascii() and name.isdigit():
        return _camera(int(name), platform)
    if name == "screen" or scheme == "screen":
        return _screen(rest or "0", platform)
    if name.startswith("/dev/video"):
        return Source("camera", name, name, "v4l2")
    if rest.startswith("//"):
        return _address(name, scheme.lower())
    if colon and scheme in _DEVICES and not os.path.exists(name):
        return Source("device", rest, name, scheme)
    return Source("file", f"file:{name}", name)  # which keeps FFmpeg from taking 10:30.mp4 for a protocol


def _camera(number: int, platform: str) -> Source:
    name = f"camera {number}"
    if platform == "darwin":
        return Source("camera", f"{number}:none", name, "avfoundation", _DEVICE_RATE)
    return Source("camera", f"/dev/video{number}", f"{name} (/dev/video{number})", "v4l2")


def _screen(number: str, platform: str) -> Source:
    if not (number.isascii() and number.isdigit()):
        raise OptionError(f'The screen "{number}" is not known; give screen, or screen:1 for the second one.')
    name = f"screen {number}"
    if platform == "darwin":
        options = {**_DEVICE_RATE, "capture_cursor": "1"}
        return Source("screen", f"Capture screen {number}:none", name, "avfoundation", options)
    display = os.environ.get("DISPLAY")
    if not display:
        raise OptionError(
            "There is no X display to watch (DISPLAY is not set). Under Wayland let a recorder write to a virtual camera "
            "(v4l2loopback), and watch that."
        )
    host, _, rest = display.rpartition(":")
    return Source("screen", f"{host}:{rest.split('.')[0]}.{number}", name, "x11grab", _DEVICE_RATE)


def _address(name: str, scheme: str) -> Source:
    if scheme not in _WEB_SCHEMES + _LIVE_SCHEMES:
        known = ", ".join(_WEB_SCHEMES + _LIVE_SCHEMES)
        raise OptionError(f"{_without_password(name)} cannot be watched: its scheme is none of {known}.")
    options = {"rtsp_transport": "tcp"} if scheme in ("rtsp", "rtsps") else {}  # UDP loses packets: gray frames
    return Source("address", name, _without_password(name), options=options, timeout=_WEB_TIMEOUT)


def _without_password(address: str) -> str:
    try:
        parts = urlsplit(address)
    except ValueError as error:
        raise OptionError(f"The address cannot be understood ({error}).") from None
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
