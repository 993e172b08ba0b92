"""OpenAI's chat completions: what clients send, checked, and what they get. Fields that are not named here are ignored.

Fields that OpenAI has and that cannot be followed here are refused, not ignored: a client should not take an answer for
something it is not. Knows neither models nor images, only what stands in a request.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from mlx_fastvlm.answer import GenerationResponse
from mlx_fastvlm.errors import OptionError
from mlx_fastvlm.options import GenerationOptions
from mlx_fastvlm.prompt import IMAGE_MARK, Message
from mlx_fastvlm.server.api_errors import bad_request, from_library

_MAX_STOPS = 4  # as at OpenAI


class _Part(BaseModel):
    """Values have the type they are said to have: "5" is no number."""

    model_config = ConfigDict(strict=True)


class TextPart(_Part):
    type: Literal["text"]
    text: str


class ImageUrl(_Part):
    url: str = Field(description="A data: URL; with --allow-remote-images also http(s).")


class ImagePart(_Part):
    type: Literal["image_url"]
    image_url: ImageUrl


class ChatMessage(_Part):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Annotated[TextPart | ImagePart, Field(discriminator="type")]], Field(min_length=1)]


class JsonSchema(_Part):
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")


class ResponseFormat(_Part):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StreamOptions(_Part):
    include_usage: bool | None = None


class ChatRequest(_Part):
    """The body of POST /v1/chat/completions."""

    model: str
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | Annotated[list[str], Field(max_length=_MAX_STOPS)] | None = None
    response_format: ResponseFormat | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    # Known, and not to be had:
    n: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    tools: list[Any] | None = None


@dataclass(frozen=True)
class ImageField:
    """An image of a request: its URL and where that stands."""

    url: str
    param: str


def check_supported(request: ChatRequest) -> None:
    """Raise ApiError if the request asks for what cannot be had."""
    if request.n not in (None, 1):
        raise bad_request(f"n is {request.n}; one answer a request can be had: send several requests.", "n")
    if request.stream_options is not None and not request.stream:
        raise bad_request("stream_options are given without stream: true.", "stream_options")
    for name in ("logprobs", "top_logprobs", "frequency_penalty", "presence_penalty", "logit_bias", "tools"):
        if getattr(request, name):
            raise bad_request(f"{name} cannot be had from this server; leave it out.", name, "unsupported_parameter")


def conversation(request: ChatRequest) -> tuple[list[Message], list[ImageField]]:
    """Messages as `build_prompt` takes them, and their images in order. Raises ApiError.

    An image that follows its message's words is moved before them, as the model was trained; images between words stay.
    """
    messages, images = [], []
    for number, message in enumerate(request.messages):
        place = f"messages[{number}].content"
        role = "system" if message.role == "developer" else message.role
        parts = [TextPart(type="text", text=message.content)] if isinstance(message.content, str) else message.content
        for index, part in enumerate(parts):
            if isinstance(part, ImagePart):
                if role != "user":
                    raise bad_request(f"A message of the {message.role} has an image; only the user's can.", place)
                images.append(ImageField(part.image_url.url, f"{place}[{index}].image_url.url"))
            elif IMAGE_MARK in part.text:
                raise bad_request(f"The text has {IMAGE_MARK}, which the model takes for an image; reword it.", place)
        messages.append({"role": role, "content": _in_trained_order(parts)})
    return messages, images


def asked_tokens(request: ChatRequest) -> int | None:
    """The longest answer that the request names, under either of OpenAI's names."""
    return request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens


def generation_options(request: ChatRequest, max_tokens: int) -> GenerationOptions:
    """How the answer is made; what the request leaves open is as in the library, so without a temperature it is greedy.

    Raises:
        ApiError: a value is out of range.
    """
    given = {
        "temp": request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k,
        "repetition_penalty": request.repetition_penalty,
        "seed": None if request.seed is None else request.seed % 2**64,
        "stop": request.stop,
        "json_schema": _json_schema(request.response_format),
    }
    try:
        return GenerationOptions(max_tokens=max_tokens, **{k: v for k, v in given.items() if v is not None})
    except OptionError as error:
        raise from_library(error) from None


class Reply:
    """Turns one answer's responses into what the client gets.

    Args:
        model_id: the model's name.
    """

    def __init__(self, model_id: str):
        self._common = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model_id}

    def whole(self, text: str, last: GenerationResponse) -> dict[str, Any]:
        """A finished answer, where the client does not stream."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": last.finish_reason}
        return self._object("chat.completion", choices=[choice], usage=_usage(last), timings=_timings(last))

    def chunks(self, response: GenerationResponse, with_usage: bool) -> list[dict[str, Any]]:
        """What a streaming client gets for one token: often nothing.

        Args:
            response: of the token.
            with_usage: whether the client wants token counts at the end.
        """
        deltas: list[tuple[dict[str, str], str | None]] = []
        if response.generation_tokens == 1:
            deltas.append(({"role": "assistant", "content": ""}, None))
        if response.text:
            deltas.append(({"content": response.text}, None))
        if response.finish_reason is not None:
            deltas.append(({}, response.finish_reason))
        more = {"usage": None} if with_usage else {}
        chunks = [self._chunk([_choice(delta, reason)], **more) for delta, reason in deltas]
        if response.finish_reason is not None:
            chunks[-1]["timings"] = _timings(response)
            if with_usage:
                chunks.append(self._chunk([], usage=_usage(response)))
        return chunks

    def _chunk(self, choices: Sequence[Mapping[str, Any]], **more: Any) -> dict[str, Any]:
        return self._object("chat.completion.chunk", choices=choices, **more)

    def _object(self, kind: str, **fields: Any) -> dict[str, Any]:
        return {**self._common, "object": kind, **fields}


def model_card(model_id: str, created: int) -> dict[str, Any]:
    """A model as GET /v1/models lists it."""
    return {"id": model_id, "object": "model", "created": created, "owned_by": "mlx-fastvlm"}


def _in_trained_order(parts: Sequence[TextPart | ImagePart]) -> list[Mapping[str, str]]:
    kinds = [part.type for part in parts]
    ordered = sorted(parts, key=lambda part: part.type != "image_url") if _images_are_together(kinds) else parts
    content: list[Mapping[str, str]] = []
    for part in ordered:
        if isinstance(part, ImagePart):
            content.append({"type": "image"})
        else:
            follows_text = bool(content) and content[-1]["type"] == "text"
            content.append({"type": "text", "text": ("\n" if follows_text else "") + part.text})
    return content


def _images_are_together(kinds: Sequence[str]) -> bool:
    """Whether no text stands between two images."""
    places = [place for place, kind in enumerate(kinds) if kind == "image_url"]
    return not places or places[-1] - places[0] == len(places) - 1


def _json_schema(form: ResponseFormat | None) -> Mapping[str, Any] | bool | None:
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return True
    if form.json_schema is None:
        raise bad_request("response_format has type json_schema but no json_schema.", "response_format.json_schema")
    return True if form.json_schema.schema_ is None else form.json_schema.schema_


def _choice(delta: Mapping[str, str], finish_reason: str | None) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


def _usage(response: GenerationResponse) -> dict[str, Any]:
    """Token counts: image rows are tokens of the prompt, the token that ends an answer is one of the answer."""
    return {
        "prompt_tokens": response.prompt_tokens,
        "completion_tokens": response.generation_tokens,
        "total_tokens": response.prompt_tokens + response.generation_tokens,
        "prompt_tokens_details": {"cached_tokens": response.cached_tokens},
    }


def _timings(response: GenerationResponse) -> dict[str, Any]:
    """Ours, not OpenAI's: seconds, and tokens per second, from the request's arrival at the server."""
    return {"ttft": response.ttft, "generation_tps": response.generation_tps, "stages": response.timings}
