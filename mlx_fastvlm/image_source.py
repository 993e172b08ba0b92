"""From what a user names (path, "-", URL, bytes, open file) to the bytes of an image file.

Knows where bytes come from and how many are too many. What the bytes mean is image_decoding's concern.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, BinaryIO
from urllib.parse import unquote_to_bytes

from mlx_fastvlm.errors import ImageError

if TYPE_CHECKING:
    import httpx

FileSource = str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO

MAX_FILE_BYTES = 256 * 2**20
MAX_DOWNLOAD_BYTES = 64 * 2**20
DOWNLOAD_SECONDS = 60.0  # for the whole download
SILENCE_SECONDS = 10.0  # for the connection and for each wait between two pieces
MAX_REDIRECTS = 5

_CHUNK_BYTES = 2**20
_NAME_LENGTH = 120
_NOT_IMAGES = ("text/html", "application/xhtml+xml", "application/json")


def read_image_bytes(source: FileSource, *, stdin: BinaryIO | None = None) -> bytes:
    """Read the whole image file that `source` names.

    Args:
        source: one of
            a path (`~` is expanded), at most `MAX_FILE_BYTES`; "paper.pdf#page=3" is the file paper.pdf unless a file
            has that very name;
            "-" for standard input, at most `MAX_FILE_BYTES`;
            an http:// or https:// URL, at most `MAX_DOWNLOAD_BYTES` and `DOWNLOAD_SECONDS`;
            a data: URL, as chat clients send;
            the bytes themselves; or a binary file object, read from where it stands, at most `MAX_FILE_BYTES`.
        stdin: binary stream that "-" reads instead of the process's standard input.

    Returns:
        The bytes, at least one. Whether they are an image is not checked.

    Raises:
        ImageError: nothing can be read there, or it is empty, too large or evidently not an image file.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        data = bytes(source)
    elif hasattr(source, "read"):
        data = _read_stream(source, source_name(source))
    elif isinstance(source, str) and source == "-":
        data = _read_stdin(stdin)
    elif isinstance(source, str) and (scheme := re.match(r"([a-z][a-z0-9+.-]*)://|(data):", source, re.IGNORECASE)):
        data = _read_url(source, (scheme[1] or scheme[2]).lower())
    elif isinstance(source, (str, os.PathLike)):
        data = _read_path(source)
    else:
        raise ImageError(f"No image can be read from {type(source).__name__}: give a path, a URL or the file's bytes.")
    if not data:
        raise ImageError(f"{source_name(source)} is empty (0 bytes): an image file was expected.")
    return data


def source_name(source: object) -> str:
    """What error messages call `source`, as a sentence's first words: short, on one line, without passwords."""
    if isinstance(source, str) and source == "-":
        return "Standard input"
    if not isinstance(source, (str, os.PathLike)):
        name = getattr(source, "name", None)
        return source_name(name) if isinstance(name, str) else "The image"
    name = re.sub(r"://[^/?#]*@", "://", str(source))
    if name.startswith("data:"):
        name = name.partition(",")[0]
    name = "".join(letter if letter.isprintable() else "?" for letter in name)
    return name if len(name) <= _NAME_LENGTH else name[: _NAME_LENGTH - 3] + "..."


def named_page(source: object) -> int | None:
    """The page that a path, URL or open file's name ends with, as in "paper.pdf#page=3"; None if it names none."""
    name = source if isinstance(source, (str, os.PathLike)) else getattr(source, "name", None)
    return split_page(name)[1] if isinstance(name, (str, os.PathLike)) else None


def split_page(name: str | os.PathLike[str]) -> tuple[str, int | None]:
    """A path or URL without its page, and the page. A file that has the whole of it as its name is no page."""
    path = os.fspath(name)
    match = re.fullmatch(r"(.+)#page=([0-9]{1,9})", path, re.DOTALL) if isinstance(path, str) else None
    if match is None or os.path.lexists(os.path.expanduser(path)):
        return path, None
    return match[1], int(match[2])


def _read_path(path: str | os.PathLike[str]) -> bytes:
    name = source_name(path)
    try:
        with open(os.path.expanduser(split_page(path)[0]), "rb") as file:
            return _join_within(iter(lambda: file.read(_CHUNK_BYTES), b""), MAX_FILE_BYTES, name)
    except FileNotFoundError:
        where = "" if os.path.isabs(path) else f" in {os.getcwd()}"
        raise ImageError(f"There is no file {name or repr(name)}{where}: check the path.") from None
    except IsADirectoryError:
        raise ImageError(f"{name} is a folder: name one image file in it.") from None
    except PermissionError:
        raise ImageError(f"{name} may not be read (permission denied): change its permissions or copy it.") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        reason = getattr(error, "strerror", None) or error
        raise ImageError(f"{name} cannot be read ({reason}): check the path.") from error


def _read_stdin(stdin: BinaryIO | None) -> bytes:
    stream = stdin if stdin is not None else getattr(sys.stdin, "buffer", sys.stdin)
    if stream is None or (hasattr(stream, "isatty") and stream.isatty()):
        raise ImageError('"-" reads an image from standard input, but nothing is piped in: try `... - < image.png`.')
    return _read_stream(stream, source_name("-"))


def _read_stream(stream: BinaryIO, name: str) -> bytes:
    try:
        # Reading by pieces keeps an endless stream from filling memory before the limit is noticed.
        return _join_within(iter(lambda: _read_binary(stream, name), b""), MAX_FILE_BYTES, name)
    except (OSError, ValueError) as error:  # ValueError: the file is closed
        raise ImageError(f"{name} cannot be read ({error}): open it again, in binary mode.") from error


def _read_binary(stream: BinaryIO, name: str) -> bytes:
    piece = stream.read(_CHUNK_BYTES)
    if isinstance(piece, str):
        raise ImageError(f'{name} is open in text mode: open it in binary mode ("rb").')
    return piece or b""


def _join_within(pieces: Iterable[bytes], limit: int, name: str) -> bytes:
    """Join pieces, reading no further than the piece that passes `limit` bytes."""
    kept, size = [], 0
    for piece in pieces:
        size += len(piece)
        if size > limit:
            raise ImageError(f"{name} is larger than {limit / 2**20:g} MiB: use a smaller copy.")
        kept.append(piece)
    return b"".join(kept)


def _read_url(url: str, scheme: str) -> bytes:
    if scheme == "data":
        return _read_data_url(url)
    if scheme not in ("http", "https"):
        raise ImageError(f"{source_name(url)} cannot be fetched: use an http:// or https:// URL, or a plain path.")
    return _download(url)


def _read_data_url(url: str) -> bytes:
    header, comma, body = url.partition(",")
    name = source_name(header)
    if not comma:
        raise ImageError(f"{name} has no comma, so it holds no data: write data:image/png;base64,....")
    if len(body) > MAX_DOWNLOAD_BYTES * 4 / 3:
        raise ImageError(f"{name} is larger than {MAX_DOWNLOAD_BYTES / 2**20:g} MiB: use a smaller copy.")
    data = unquote_to_bytes(body)
    if not header.lower().endswith(";base64"):
        return data
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error as error:
        raise ImageError(f"{name} is not valid base64 ({error}): encode the image file again.") from error


def _download(url: str) -> bytes:
    name = source_name(url)
    try:
        import httpx  # here, because most runs read local files and start-up time counts
    except ImportError:
        raise ImageError(f"{name} needs the httpx package to be fetched: run `pip install httpx`.") from None

    deadline = time.monotonic() + DOWNLOAD_SECONDS
    headers = {"User-Agent": "mlx-fastvlm", "Accept": "image/*,*/*;q=0.5", "Accept-Encoding": "identity"}
    try:
        # httpx itself refuses to follow a redirect to anything but http and https.
        with (
            httpx.Client(timeout=SILENCE_SECONDS, follow_redirects=True, max_redirects=MAX_REDIRECTS) as client,
            client.stream("GET", url, headers=headers) as response,
        ):
            _check_response(response, name)
            return _join_within(_until(deadline, response.iter_bytes(), name), MAX_DOWNLOAD_BYTES, name)
    except httpx.TimeoutException:
        raise ImageError(
            f"{name} gave no answer for {SILENCE_SECONDS:g} seconds: try again, or download it and give its path."
        ) from None
    except httpx.TooManyRedirects:
        raise ImageError(f"{name} redirects more than {MAX_REDIRECTS} times: use the URL it leads to.") from None
    except (httpx.HTTPError, httpx.InvalidURL, ImportError, ValueError) as error:
        # ImportError, ValueError: a proxy from the environment that httpx lacks a package for, or cannot parse.
        raise ImageError(
            f"{name} cannot be fetched ({error}): check the URL and the network, or download it and give its path."
        ) from error


def _check_response(response: httpx.Response, name: str) -> None:
    """Refuse an answer whose headers already say that no usable image follows."""
    if not response.is_success:
        status = f"{response.status_code} {response.reason_phrase}".strip()
        raise ImageError(f"{name} answered {status}: check the URL, or download the image and give its path.")
    content_type = response.headers.get("Content-Type", "").split(";")[0].strip().lower()
    if content_type in _NOT_IMAGES:
        raise ImageError(f"{name} is not an image but {content_type}: use the URL of the image file itself.")
    announced = response.headers.get("Content-Length", "")
    if announced.isdecimal() and int(announced) > MAX_DOWNLOAD_BYTES:
        raise ImageError(
            f"{name} is {int(announced) / 2**20:.0f} MiB; at most {MAX_DOWNLOAD_BYTES / 2**20:g} MiB are downloaded: "
            "use a smaller copy, or download it and give its path."
        )


def _until(deadline: float, pieces: Iterator[bytes], name: str) -> Iterator[bytes]:
    """Pass pieces on until `deadline` on the monotonic clock, so that a trickle of bytes cannot go on forever."""
    for piece in pieces:
        if time.monotonic() > deadline:
            raise ImageError(f"{name} is not complete after {DOWNLOAD_SECONDS:g} seconds: try again, or give a path.")
        yield piece
