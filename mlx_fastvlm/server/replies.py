"""The forms that replies take on the wire: JSON, errors, and streams of events that give up their answer when left."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import JSONResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from mlx_fastvlm.answer import GenerationResponse
from mlx_fastvlm.server.api_errors import ApiError
from mlx_fastvlm.server.job import Job
from mlx_fastvlm.server.metrics import Metrics
from mlx_fastvlm.server.schema import Reply


class AsciiJSON(JSONResponse):
    """JSON that can quote anything a client sent: half a surrogate pair has no UTF-8."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content).encode("ascii")


def error_reply(error: ApiError, metrics: Metrics) -> AsciiJSON:
    """An error as OpenAI's clients expect it; it is counted."""
    metrics.error(error.status)
    return AsciiJSON(error.body, error.status, dict(error.headers))


class AnswerStream(StreamingResponse):
    """An answer as server-sent events. When the client leaves, its job is cancelled.

    Args:
        job: makes the answer.
        first: its first token's response.
        reply: gives the events their content.
        with_usage: whether token counts are sent at the end.
        metrics: is told of an error in the middle.
    """

    def __init__(self, job: Job, first: GenerationResponse, reply: Reply, with_usage: bool, metrics: Metrics):
        self._job, self._metrics = job, metrics
        # X-Accel-Buffering: proxies like nginx would hold the events back.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(self._events(first, reply, with_usage), media_type="text/event-stream", headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.cancel()  # also if the client left before the first event

    async def _events(self, first: GenerationResponse, reply: Reply, with_usage: bool) -> AsyncIterator[bytes]:
        try:
            async for response in self._job.rest(first):
                if chunks := reply.chunks(response, with_usage):
                    yield b"".join(_event(chunk) for chunk in chunks)
            yield b"data: [DONE]\n\n"
        except ApiError as error:
            self._metrics.error(error.status)
            yield _event(error.body)


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(content).encode("ascii") + b"\n\n"
