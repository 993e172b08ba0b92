"""Who may call a server and how much they may send: judged before a request's body is read.

Browsers let any web page call a server on the same machine. Its reply is kept from the page, but the work is done; and
a page whose name comes to resolve to 127.0.0.1 reads the reply too. So the names by which a local server is called are
checked, and where a page that calls it comes from.
"""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Collection
from contextlib import suppress
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlx_fastvlm.answer import StageClock
from mlx_fastvlm.server.api_errors import ApiError
from mlx_fastvlm.server.limits import Limits
from mlx_fastvlm.server.metrics import Metrics
from mlx_fastvlm.server.replies import error_reply

LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")

_HEALTH = "/health"
_OPEN_PATHS = ("/", _HEALTH)  # need no key
_OPEN_FOLDER = "/page/"  # nor do the page's files; what the page asks for does
# So much of too large a body is read, so that its sender comes to read the reply: times the limit, and for how long.
_DISCARDED = 4
_DISCARD_SECONDS = 10


class Guard:
    """ASGI middleware that turns away what is not allowed or too much, and notes when a request came.

    Args:
        app: gets the rest.
        limits: of a request's size and of requests at once.
        metrics: is told of the errors.
        api_key: that clients must send; None asks for none.
        local_only: whether it must be called by a name of this machine.
        origins: from where web pages may call, besides the server's own; "*" for all.
    """

    def __init__(
        self,
        app: ASGIApp,
        limits: Limits,
        metrics: Metrics,
        *,
        api_key: str | None,
        local_only: bool,
        origins: Collection[str],
    ):
        self._app, self._limits, self._metrics = app, limits, metrics
        self._api_key, self._local_only, self._origins = api_key, local_only, frozenset(origins)
        self._open_requests = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope.setdefault("state", {})["clock"] = StageClock()
        self._open_requests += 1
        try:
            self._check(Headers(scope=scope), scope["path"])
            await self._check_announced_size(Headers(scope=scope), receive)
            await self._app(scope, _bounded(receive, self._limits), send)
        except ApiError as error:
            await error_reply(error, scope["path"], self._metrics)(scope, receive, send)
        finally:
            self._open_requests -= 1

    def _check(self, headers: Headers, path: str) -> None:
        host = headers.get("host", "")
        if self._local_only and _name_of(host) not in LOCAL_NAMES:
            raise ApiError(403, "This server is called by the name localhost or 127.0.0.1 only.", code="unknown_host")
        origin = headers.get("origin")
        if origin is not None and not self._is_welcome(origin, host):
            raise ApiError(
                403, "Web pages from there may not call this server; see --cors-origin.", code="unknown_origin"
            )
        is_open = path in _OPEN_PATHS or path.startswith(_OPEN_FOLDER)
        if self._api_key is not None and not is_open and not self._has_key(headers):
            raise ApiError(
                401, "The API key is missing or wrong; send it as: Authorization: Bearer KEY", code="invalid_api_key"
            )
        if self._open_requests > self._limits.max_open_requests and path != _HEALTH:
            raise ApiError(503, "Too many requests are open; try later.", code="overloaded")

    def _is_welcome(self, origin: str, host: str) -> bool:
        return "*" in self._origins or origin in self._origins or origin.partition("://")[2] == host

    def _has_key(self, headers: Headers) -> bool:
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        keys = [bearer] if scheme.lower() == "bearer" else []
        keys += headers.getlist("x-api-key")  # Anthropic's clients
        # In bytes: compare_digest takes no other text than ASCII.
        return any(hmac.compare_digest(key.strip().encode(), self._api_key.encode()) for key in keys)

    async def _check_announced_size(self, headers: Headers, receive: Receive) -> None:
        announced = headers.get("content-length", "")
        limit = self._limits.max_request_bytes
        if announced.isascii() and announced.isdecimal() and int(announced) > limit:
            await _discard(receive, _DISCARDED * limit)
            raise ApiError(413, _too_large(limit), code="request_too_large")


def _bounded(receive: Receive, limits: Limits) -> Receive:
    """`receive` until a body is longer than it may be, or takes longer."""
    size, is_complete = 0, False
    deadline = time.monotonic() + limits.max_seconds

    async def receive_bounded() -> Message:
        nonlocal size, is_complete
        if is_complete:  # what is left to receive is that the client leaves
            return await receive()
        try:
            message = await asyncio.wait_for(receive(), max(0.0, deadline - time.monotonic()))
        except asyncio.TimeoutError:
            # FastAPI passes no other exception on while it reads a body.
            raise HTTPException(408, f"The request is not complete after {limits.max_seconds:g} s.") from None
        is_complete = not message.get("more_body", False)
        size += len(message.get("body", b""))
        if size > limits.max_request_bytes:
            if not is_complete:
                await _discard(receive, _DISCARDED * limits.max_request_bytes)
            raise HTTPException(413, _too_large(limits.max_request_bytes))
        return message

    return receive_bounded


async def _discard(receive: Receive, limit: int) -> None:
    """Read the rest of a body, or so many bytes of it, for a while."""

    async def read() -> None:
        size, more = 0, True
        while more and size < limit:
            message = await receive()
            size += len(message.get("body", b""))
            more = message.get("more_body", False)

    with suppress(asyncio.TimeoutError):
        await asyncio.wait_for(read(), _DISCARD_SECONDS)


def _too_large(limit: int) -> str:
    return f"The request is larger than {limit / 2**20:.3g} MiB; send smaller or fewer images."


def _name_of(host: str) -> str | None:
    """The name in a Host header, without the port."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:  # brackets that do not match
        return None
