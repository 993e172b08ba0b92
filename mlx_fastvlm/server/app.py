"""The routes: OpenAI's chat completions and models, Anthropic's messages, the page, health, figures for Prometheus."""

from __future__ import annotations

import asyncio
import ipaddress
import time
from collections.abc import AsyncIterator, Awaitable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from mlx_fastvlm import __version__
from mlx_fastvlm.answer import GenerationResponse
from mlx_fastvlm.auto_resolution import AUTO, AutoResolution
from mlx_fastvlm.errors import OptionError
from mlx_fastvlm.model import FastVLM
from mlx_fastvlm.processor import Processor
from mlx_fastvlm.server import openapi
from mlx_fastvlm.server.api_errors import MESSAGES_PATH, ApiError, bad_request, internal
from mlx_fastvlm.server.asked import Asked
from mlx_fastvlm.server.chat_reply import ChatReply, model_card
from mlx_fastvlm.server.engine import Engine
from mlx_fastvlm.server.fair_lock import FairLock
from mlx_fastvlm.server.fair_workers import FairWorkers
from mlx_fastvlm.server.guard import Guard
from mlx_fastvlm.server.job import Job
from mlx_fastvlm.server.limits import Limits
from mlx_fastvlm.server.messages import MessagesReply, MessagesRequest, read_messages
from mlx_fastvlm.server.metrics import CONTENT_TYPE, Metrics
from mlx_fastvlm.server.page_files import INDEX, read_page
from mlx_fastvlm.server.pictures import Pictures
from mlx_fastvlm.server.reader import Reader
from mlx_fastvlm.server.replies import AnswerStream, AsciiJSON, Reply, error_reply
from mlx_fastvlm.server.schema import ChatRequest, read_chat
from mlx_fastvlm.server.token_logprobs import LogprobsForm

T = TypeVar("T")

_TOKENIZED_AT_ONCE = 2
_SHOULD = "Input should be "  # how pydantic begins


@dataclass(frozen=True)
class ServedModel:
    """A model behind a server.

    Attributes:
        model_id: what clients call it.
        model, processor: from `load`; nobody else runs them meanwhile.
        defaults: keywords of `GenerationOptions` for what a request leaves open.
    """

    model_id: str
    model: FastVLM
    processor: Processor
    defaults: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Desk:
    """Where the requests for one model are read and answered."""

    model_id: str
    processor: Processor
    reader: Reader
    engine: Engine
    card: Mapping[str, Any]


def create_app(
    models: Sequence[ServedModel],
    *,
    limits: Limits,
    api_key: str | None = None,
    local_only: bool = True,
    allow_remote_images: bool = False,
    cors_origins: Collection[str] = (),
) -> FastAPI:
    """A server for one model or several, as an ASGI application.

    Its `state.engines`, by model id, answer while it runs. Several models take turns: the machine runs one at a time.

    Args:
        models: the first is what the page begins with.
        limits: how much is taken on, by each model.
        api_key, local_only: see `Guard`.
        allow_remote_images: whether http(s) URLs are fetched.
        cors_origins: whose web pages may call the server.

    Raises:
        OptionError: two models have the same name.
    """
    metrics = Metrics()
    turn = FairLock() if len(models) > 1 else None
    pictures = Pictures(limits, allow_remote_images)
    words, forms = FairWorkers(_TOKENIZED_AT_ONCE, "words"), FairWorkers(1, "forms")
    desks: dict[str, _Desk] = {}
    for served in models:
        if served.model_id in desks:
            raise OptionError(f"Two models are called {served.model_id}; clients could not tell them apart.")
        desks[served.model_id] = _Desk(
            served.model_id,
            served.processor,
            Reader(served.model, served.processor, served.defaults, limits, pictures, words, forms),
            Engine(served.model, served.processor, limits, metrics.of(served.model_id), turn=turn),
            _card(served, limits),
        )
    app = FastAPI(title="mlx-fastvlm", version=__version__, docs_url=None, redoc_url=None, lifespan=_answering)
    app.state.workers = (pictures, words, forms)
    app.state.engines = {model_id: desk.engine for model_id, desk in desks.items()}
    _add_answers(app, desks, metrics)
    _add_facts(app, desks, metrics)
    _add_page(app)
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
    for engine in app.state.engines.values():
        engine.start()
    yield
    for engine in app.state.engines.values():
        await run_in_threadpool(engine.stop, 0)
    for workers in app.state.workers:
        workers.close()


def _add_answers(app: FastAPI, desks: Mapping[str, _Desk], metrics: Metrics) -> None:
    @app.post("/v1/chat/completions", response_class=AsciiJSON, response_model=None, responses=openapi.CHAT)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        asked = read_chat(body)
        desk = _desk_of(asked.model, desks)
        texts = None
        if body.logprobs:
            texts = await _unless_left(request, desk.reader.token_texts(_client(request, asked)))
        with_usage = bool(body.stream_options and body.stream_options.include_usage)
        reply = ChatReply(desk.model_id, texts and LogprobsForm(texts), with_usage)
        return await _answer(request, desk, asked, reply, metrics)

    @app.post(MESSAGES_PATH, response_class=AsciiJSON, response_model=None, responses=openapi.MESSAGES)
    async def messages(body: MessagesRequest, request: Request) -> Response:
        asked = read_messages(body)
        desk = _desk_of(asked.model, desks)
        processor, stops = desk.processor, body.stop_sequences or ()
        reply = MessagesReply(desk.model_id, stops, processor.decode, processor.eos_token_ids)
        return await _answer(request, desk, asked, reply, metrics)


def _add_facts(app: FastAPI, desks: Mapping[str, _Desk], metrics: Metrics) -> None:
    @app.get("/v1/models", response_class=AsciiJSON, response_model=None, responses=openapi.MODELS)
    async def models() -> Response:
        return AsciiJSON({"object": "list", "data": [desk.card for desk in desks.values()]})

    @app.get("/v1/models/{model:path}", response_class=AsciiJSON, response_model=None, responses=openapi.MODEL)
    async def one_model(model: str) -> Response:
        return AsciiJSON(_desk_of(model, desks).card)

    @app.get("/health", response_class=AsciiJSON, response_model=None, responses=openapi.HEALTH)
    async def health() -> Response:
        failures = [desk.engine.failure for desk in desks.values() if desk.engine.failure is not None]
        if failures:
            return AsciiJSON({"status": "failed", "reason": failures[0]}, 503)
        return AsciiJSON({"status": "ok", "models": list(desks)})

    @app.get("/metrics", response_class=Response, response_model=None, responses=openapi.METRICS)
    async def figures() -> Response:
        return Response(metrics.page(), media_type=CONTENT_TYPE)


def _add_page(app: FastAPI) -> None:
    files = read_page()

    def answer(request: Request, name: str) -> Response:
        file = files.get(name)
        if file is None:
            raise ApiError(404, "There is no such file.")
        if file.is_known(request.headers.get("if-none-match")):
            return Response(status_code=304, headers=dict(file.headers))
        return Response(file.content, headers=dict(file.headers))

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def page(request: Request) -> Response:
        return answer(request, INDEX)

    @app.api_route("/page/{name}", methods=["GET", "HEAD"], include_in_schema=False)
    async def page_file(name: str, request: Request) -> Response:
        return answer(request, name)


def _add_error_handlers(app: FastAPI, metrics: Metrics) -> None:
    @app.exception_handler(ApiError)
    async def known(request: Request, error: ApiError) -> Response:
        return error_reply(error, request.url.path, metrics)

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> Response:
        return error_reply(_malformed(error), request.url.path, metrics)

    @app.exception_handler(HTTPException)
    async def unroutable(request: Request, error: HTTPException) -> Response:
        return error_reply(ApiError(error.status_code, str(error.detail)), request.url.path, metrics)

    @app.exception_handler(ClientLeft)
    async def left(request: Request, error: ClientLeft) -> Response:
        return Response(status_code=499)  # for the books: nobody reads it

    @app.exception_handler(Exception)
    async def unknown(request: Request, error: Exception) -> Response:
        return error_reply(internal(), request.url.path, metrics)


class ClientLeft(Exception):
    """There is nobody to answer any more."""


async def _answer(request: Request, desk: _Desk, asked: Asked, reply: Reply, metrics: Metrics) -> Response:
    clock, client = request.state.clock, _client(request, asked)
    clock.lap("receive")
    question = await _unless_left(request, desk.reader.question(asked, client, clock))
    job = desk.engine.submit(client, question, clock)
    if not asked.stream:
        return AsciiJSON(reply.whole(await _unless_left(request, _all_of(job), job)))
    # Until the first token it is an error with its own status that can be sent.
    first = await _unless_left(request, job.next(), job)
    return AnswerStream(job, first, reply, metrics)


async def _all_of(job: Job) -> list[GenerationResponse]:
    return [response async for response in job.rest(await job.next())]


async def _unless_left(request: Request, work: Awaitable[T], job: Job | None = None) -> T:
    """The result of `work`; if the client leaves first, or anything goes wrong, it and the job are cancelled.

    Raises ClientLeft.
    """
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
        if job is not None and not is_done:
            job.cancel()


async def _departure(request: Request) -> None:
    """Return when the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _card(served: ServedModel, limits: Limits) -> dict[str, Any]:
    """A model as GET /v1/models lists it, with what OpenAI's clients do not ask for but the page does."""
    image_processor = served.processor.image_processor
    resolutions = image_processor.resolutions
    default = served.defaults.get("resolution")
    facts = {
        "resolution": image_processor.image_size,
        "default_resolution": AUTO if isinstance(default, AutoResolution) else default or image_processor.image_size,
        "fit": image_processor.fit,
        "default_fit": served.defaults.get("fit", image_processor.fit),
        "min_resolution": resolutions[0],
        "max_resolution": resolutions[-1],
        "resolution_step": resolutions.step,
        "max_tokens": limits.max_tokens,
        "max_images": limits.max_images,
        "context_length": served.model.config.text_config.max_position_embeddings,
    }
    return model_card(served.model_id, int(time.time()), facts)


def _desk_of(asked: str, desks: Mapping[str, _Desk]) -> _Desk:
    if asked not in desks:
        names = ", ".join(map(repr, desks))
        message = f"The model {asked[:100]!r} is not here; this server has {names}."
        raise ApiError(404, message, code="model_not_found", param="model")
    return desks[asked]


def _client(request: Request, asked: Asked) -> str:
    """Who takes turns with others: an address; programs on this machine, which have one in common, may name a user."""
    address = request.client.host if request.client else ""
    with suppress(ValueError):
        if ipaddress.ip_address(address).is_loopback and asked.user is not None:
            return f"{address} {asked.user}"
    return address


def _malformed(error: RequestValidationError) -> ApiError:
    """What is wrong with a body. Of alternatives each has its fault: the deepest is meant, and not one of a wrong type
    unless all are; where several are as deep, all that may stand there is said."""
    faults = [(_field(fault, error.body), fault) for fault in error.errors()]
    place, fault = max(faults, key=lambda pair: (len(pair[0]), not pair[1]["type"].endswith("_type")))
    if fault["type"] == "json_invalid":
        return bad_request(f"The body is not valid JSON: {fault['ctx']['error']}.")
    if not place:
        return bad_request("The body is not a JSON object; send one, with Content-Type: application/json.")
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)[1:]
    expected = [each["msg"] for where, each in faults if where == place and each["msg"].startswith(_SHOULD)]
    if fault["msg"] not in expected:
        return bad_request(f"{param}: {fault['msg']}.", param)
    return bad_request(f"{param}: {_SHOULD}{' or '.join(each.removeprefix(_SHOULD) for each in expected)}.", param)


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
