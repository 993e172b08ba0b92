"""Running the application on a socket until it is told to stop."""

from __future__ import annotations

import asyncio
import socket

import uvicorn
from fastapi import FastAPI

from mlx_fastvlm.errors import OptionError
from mlx_fastvlm.server.connection import ImpatientProtocol

_FAREWELL_SECONDS = 2  # for connections, after their answers have ended


def open_socket(host: str, port: int) -> socket.socket:
    """A socket bound to an address; 0 takes a free port. Raises OptionError if it cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise _unusable(host, port, error) from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()  # now: two that are bound and do not listen yet may have the same port
    except OSError as error:
        listener.close()
        raise _unusable(host, port, error) from None
    return listener


class Server(uvicorn.Server):
    """Serves an application; `run(sockets=[...])` returns after Ctrl-C or SIGTERM, or when `should_exit` is set.

    It ends answers before it ends connections, so that each client is told.

    Args:
        app: from `create_app`.
        grace_seconds: that running answers may still take then; no new ones are taken.
    """

    def __init__(self, app: FastAPI, grace_seconds: float):
        config = uvicorn.Config(
            app,
            http=ImpatientProtocol,
            ws="none",
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=grace_seconds + _FAREWELL_SECONDS,
        )
        super().__init__(config)
        self._engines, self._grace_seconds = app.state.engines.values(), grace_seconds

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        answers = [asyncio.create_task(asyncio.to_thread(engine.stop, self._grace_seconds)) for engine in self._engines]
        await super().shutdown(sockets)
        await asyncio.gather(*answers)


def _unusable(host: str, port: int, error: OSError) -> OptionError:
    return OptionError(
        f"{host} port {port} cannot be used ({error.strerror or error}); choose another with --port or --host."
    )
