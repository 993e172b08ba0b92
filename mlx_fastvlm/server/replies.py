"""How replies travel: JSON that can quote anything, errors that are counted, answers as server-sent events."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

from starlette.responses import JSONResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from mlx_fastvlm.answer import GenerationResponse
from mlx_fastvlm.server.api_errors import ApiError
from mlx_fastvlm.server.job import Job
from mlx_fastvlm.server.metrics import Metrics


class Reply(Protocol):
    """One answer in the form that its client reads."""

    def whole(self, responses: Sequence[GenerationResponse]) -> dict[str, Any]:
        """All of it, from the responses of its tokens."""

    def events(self, response: GenerationResponse) -> bytes:
        """Server-sent events for one token: often none."""

    def error(self, error: ApiError) -> bytes:
        """The last event of an answer that breaks off."""


class AsciiJSON(JSONResponse):
    """JSON that can quote anything a client sent: half a surrogate pair has no UTF-8."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content).encode("ascii")


def error_reply(error: ApiError, path: str, metrics: Metrics) -> AsciiJSON:
    """An error as the clients of a path expect it; it is counted."""
    metrics.error(error.status)
    return AsciiJSON(error.body_for(path), error.status, dict(error.headers))


class AnswerStream(StreamingResponse):
    """An answer as server-sent events. When the client leaves, its job is cancelled.

    Args:
        job: makes the answer.
        first: its first token's response.
        reply: gives the events their content.
        metrics: is told of an error in the middle.
    """

    def __init__(self, job: Job, first: GenerationResponse, reply: Reply, metrics: Metrics):
        self._job, self._metrics = job, metrics
        # X-Accel-Buffering: proxies like nginx would hold the events back.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(self._events(first, reply), media_type="text/event-stream", headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.cancel()  # also if the client left before the first event

    async def _events(self, first: GenerationResponse, reply: Reply) -> AsyncIterator[bytes]:
        try:
            async for response in self._job.rest(first):
                if events := reply.events(response):
                    yield events
        except ApiError as error:
            self._metrics.error(error.status)
            yield reply.error(error)
