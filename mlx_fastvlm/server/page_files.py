"""The page's files, read once when the server starts, and the headers that keep a browser from doing more with them.

Only what lies in page/ then is served, by its name: what a client writes never becomes a path.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_FOLDER = Path(__file__).parent / "page"
_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".ico": "image/x-icon",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".webmanifest": "application/manifest+json",
    ".woff2": "font/woff2",
}
# The page asks nobody but this server, and nobody may show it inside a page of theirs.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "media-src 'self' blob: mediastream:; connect-src 'self'; manifest-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Permissions-Policy": "camera=(self), display-capture=(self), microphone=()",
    "Cache-Control": "no-cache",  # kept by the browser, but asked for again: the ETag says whether it has changed
}

INDEX = "index.html"


@dataclass(frozen=True)
class PageFile:
    """A file as it is sent.

    Attributes:
        content: its bytes.
        headers: of the response, its type and ETag included.
    """

    content: bytes
    headers: Mapping[str, str]

    def is_known(self, if_none_match: str | None) -> bool:
        """Whether a request's If-None-Match says that the client has it."""
        known = {tag.strip().removeprefix("W/") for tag in (if_none_match or "").split(",")}
        return self.headers["ETag"] in known or "*" in known


def read_page(folder: Path = _FOLDER) -> dict[str, PageFile]:
    """The files of a folder whose type is known, by name; what begins with a dot is left out."""
    paths = folder.glob("[!.]*.*") if folder.is_dir() else []
    return {path.name: _page_file(path) for path in paths if path.suffix in _TYPES and path.is_file()}


def _page_file(path: Path) -> PageFile:
    content = path.read_bytes()
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    return PageFile(content, {**_HEADERS, "Content-Type": _TYPES[path.suffix], "ETag": tag})
