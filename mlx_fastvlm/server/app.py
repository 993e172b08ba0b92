"""The routes: OpenAI's chat completions and models, health, and figures for Prometheus."""

from __future__ import annotations

import asyncio
import ipaddress
import time
from collections.abc import AsyncIterator, Awaitable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from mlx_fastvlm import __version__
from mlx_fastvlm.answer import GenerationResponse
from mlx_fastvlm.model import FastVLM
from mlx_fastvlm.processor import Processor
from mlx_fastvlm.server.api_errors import ApiError, bad_request, internal
from mlx_fastvlm.server.engine import Engine
from mlx_fastvlm.server.guard import Guard
from mlx_fastvlm.server.job import Job
from mlx_fastvlm.server.limits import Limits
from mlx_fastvlm.server.metrics import CONTENT_TYPE, Metrics
from mlx_fastvlm.server.reader import Reader
from mlx_fastvlm.server.replies import AnswerStream, AsciiJSON, error_reply
from mlx_fastvlm.server.schema import ChatRequest, Reply, model_card

T = TypeVar("T")

_ERRORS = {  # what OpenAPI says of them
    "4XX": {"description": "The request cannot be followed; error.message says why."},
    "5XX": {"description": "The server cannot answer now."},
}


def create_app(
    model: FastVLM,
    processor: Processor,
    *,
    model_id: str,
    limits: Limits,
    api_key: str | None = None,
    local_only: bool = True,
    allow_remote_images: bool = False,
    cors_origins: Collection[str] = (),
) -> FastAPI:
    """A server for one model, as an ASGI application. Its `state.engine` answers while the application runs.

    Args:
        model, processor: from `load`; nobody else runs them meanwhile.
        model_id: what clients call the model.
        limits: how much is taken on.
        api_key, local_only: see `Guard`.
        allow_remote_images: whether http(s) URLs are fetched.
        cors_origins: whose web pages may call the server.
    """
    metrics = Metrics()
    engine = Engine(model, processor, limits, metrics)
    app = FastAPI(title="mlx-fastvlm", version=__version__, docs_url=None, redoc_url=None, lifespan=_answering)
    app.state.engine = engine
    _add_answers(app, engine, Reader(model, processor, limits, allow_remote_images), model_id, metrics)
    _add_facts(app, engine, model_id, metrics)
    _add_error_handlers(app, metrics)
    guard = {"api_key": api_key, "local_only": local_only, "origins": cors_origins}
    app.add_middleware(Guard, limits=limits, metrics=metrics, **guard)
    if cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(cors_origins), allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    return app


@asynccontextmanager
async def _answering(app: FastAPI) -> AsyncIterator[None]:
    app.state.engine.start()
    yield
    await run_in_threadpool(app.state.engine.stop, 0)


def _add_answers(app: FastAPI, engine: Engine, reader: Reader, model_id: str, metrics: Metrics) -> None:
    @app.post("/v1/chat/completions", response_class=AsciiJSON, response_model=None, responses=_ERRORS)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        clock = request.state.clock
        clock.lap("receive")
        _check_model(body.model, model_id)
        question = await run_in_threadpool(reader.question, body, clock)
        job, reply = engine.submit(_client(request, body), question, clock), Reply(model_id)
        if not body.stream:
            return await _whole_answer(request, job, reply)
        # Until the first token it is an error with its own status that can be sent.
        first = await _unless_left(request, job, job.next())
        with_usage = bool(body.stream_options and body.stream_options.include_usage)
        return AnswerStream(job, first, reply, with_usage, metrics)


def _add_facts(app: FastAPI, engine: Engine, model_id: str, metrics: Metrics) -> None:
    card = model_card(model_id, int(time.time()))

    @app.get("/v1/models", response_class=AsciiJSON)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{model:path}", response_class=AsciiJSON, responses=_ERRORS)
    async def one_model(model: str) -> dict[str, Any]:
        _check_model(model, model_id)
        return card

    @app.get("/health", response_class=AsciiJSON, responses={"503": {"description": "No answers can be had."}})
    async def health() -> Response:
        if engine.failure is not None:
            return AsciiJSON({"status": "failed", "reason": engine.failure}, 503)
        return AsciiJSON({"status": "ok", "model": model_id})

    @app.get("/metrics")
    async def figures() -> Response:
        return Response(metrics.page(), media_type=CONTENT_TYPE)


def _add_error_handlers(app: FastAPI, metrics: Metrics) -> None:
    @app.exception_handler(ApiError)
    async def known(request: Request, error: ApiError) -> Response:
        return error_reply(error, metrics)

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> Response:
        return error_reply(_malformed(error), metrics)

    @app.exception_handler(HTTPException)
    async def unroutable(request: Request, error: HTTPException) -> Response:
        return error_reply(ApiError(error.status_code, str(error.detail)), metrics)

    @app.exception_handler(ClientLeft)
    async def left(request: Request, error: ClientLeft) -> Response:
        return Response(status_code=499)  # for the books: nobody reads it

    @app.exception_handler(Exception)
    async def unknown(request: Request, error: Exception) -> Response:
        return error_reply(internal(), metrics)


class ClientLeft(Exception):
    """There is nobody to answer any more."""


async def _whole_answer(request: Request, job: Job, reply: Reply) -> Response:
    async def collect() -> tuple[str, GenerationResponse]:
        text = ""
        async for response in job.rest(await job.next()):
            text += response.text
        return text, response

    return AsciiJSON(reply.whole(*await _unless_left(request, job, collect())))


async def _unless_left(request: Request, job: Job, work: Awaitable[T]) -> T:
    """The result of `work`; if the client leaves first, or anything goes wrong, its job is cancelled. Raises ClientLeft."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_departure(request))
    is_done = False
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientLeft
        result = working.result()
        is_done = True
        return result
    finally:
        for task in (working, leaving):
            task.cancel()
        if not is_done:
            job.cancel()


async def _departure(request: Request) -> None:
    """Return when the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _check_model(asked: str, model_id: str) -> None:
    if asked != model_id:
        raise ApiError(
            404,
            f"The model {asked[:100]!r} is not here; this server has {model_id!r}.",
            code="model_not_found",
            param="model",
        )


def _client(request: Request, body: ChatRequest) -> str:
    """Who takes turns with others: an address; programs on this machine, which have one in common, may name a user."""
    address = request.client.host if request.client else ""
    with suppress(ValueError):
        if ipaddress.ip_address(address).is_loopback and body.user is not None:
            return f"{address} {body.user}"
    return address


def _malformed(error: RequestValidationError) -> ApiError:
    """What is wrong with a body. Of alternatives each has its fault: the deepest, and not of a wrong type, is meant."""
    faults = [(_field(fault, error.body), fault) for fault in error.errors()]
    field, fault = max(faults, key=lambda pair: (len(pair[0]), not pair[1]["type"].endswith("_type")))
    if fault["type"] == "json_invalid":
        return bad_request(f"The body is not valid JSON: {fault['ctx']['error']}.")
    if not field:
        return bad_request("The body is not a JSON object; send one, with Content-Type: application/json.")
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in field)[1:]
    return bad_request(f"{param}: {fault['msg']}.", param)


def _field(fault: Mapping[str, Any], body: Any) -> Sequence[str | int]:
    """Where a fault lies in the body. Its location also names alternatives of the schema; those are left out."""
    location, field = fault["loc"][1:], []
    for index, part in enumerate(location):
        is_missing = fault["type"] == "missing" and index == len(location) - 1
        if isinstance(body, dict) and isinstance(part, str) and (part in body or is_missing):
            field, body = [*field, part], body.get(part)
        elif isinstance(body, list) and isinstance(part, int) and part < len(body):
            field, body = [*field, part], body[part]
    return field
