"""OpenAI's chat completions: what clients send, checked. Fields that are not named here are ignored.

Fields that OpenAI has and that cannot be followed here are refused, not ignored: a client should not take an answer for
something it is not. What clients get is chat_reply.py's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from mlx_fastvlm.server.api_errors import bad_request
from mlx_fastvlm.server.asked import Asked, ImageField, Part, given, turn

_MAX_STOPS = 4  # as at OpenAI
_MAX_TOP = 20  # likeliest tokens, as at OpenAI

Resolution = Annotated[
    int | Literal["auto"] | None,
    Field(description="Side of the square that the model sees, in pixels; auto: as the picture's detail needs it."),
]
_UNSUPPORTED = ("frequency_penalty", "presence_penalty", "logit_bias", "tools")  # unless empty, or 0


class _Part(BaseModel):
    """Values have the type they are said to have: "5" is no number."""

    model_config = ConfigDict(strict=True)


class TextPart(_Part):
    type: Literal["text"]
    text: str


class ImageUrl(_Part):
    url: str = Field(description="A data: URL; with --allow-remote-images also http(s).")
    detail: Literal["auto", "low", "high", "original"] | None = Field(
        default=None, description="low, for all images: half the model's resolution, unless `resolution` is given."
    )


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
    resolution: Resolution = None
    fit: Literal["pad", "crop", "native"] | None = Field(default=None, description="How a picture comes to its shape.")
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=_MAX_TOP)] | None = None
    # Known, and not to be had:
    n: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    tools: list[Any] | None = None


def read_chat(request: ChatRequest) -> Asked:
    """What a request asks for. Raises ApiError if it cannot be had."""
    _check_supported(request)
    messages, images = _conversation(request)
    is_named_anew = request.max_completion_tokens is not None
    return Asked(
        model=request.model,
        messages=messages,
        images=images,
        max_tokens=request.max_completion_tokens if is_named_anew else request.max_tokens,
        max_tokens_field="max_completion_tokens" if is_named_anew else "max_tokens",
        options=given(
            temp=request.temperature,
            top_p=request.top_p,
            top_k=request.top_k,
            repetition_penalty=request.repetition_penalty,
            seed=None if request.seed is None else request.seed % 2**64,
            stop=request.stop,
            json_schema=_json_schema(request.response_format),
            logprobs=(request.top_logprobs or 0) if request.logprobs else None,
            resolution=request.resolution,
            fit=request.fit,
        ),
        user=request.user,
        stream=bool(request.stream),
    )


def _check_supported(request: ChatRequest) -> None:
    if request.n not in (None, 1):
        raise bad_request(f"n is {request.n}; one answer a request can be had: send several requests.", "n")
    if request.stream_options is not None and not request.stream:
        raise bad_request("stream_options are given without stream: true.", "stream_options")
    if request.top_logprobs and not request.logprobs:
        raise bad_request("top_logprobs is given without logprobs: true.", "top_logprobs")
    for name in _UNSUPPORTED:
        if getattr(request, name):
            raise bad_request(f"{name} cannot be had from this server; leave it out.", name, "unsupported_parameter")


def _conversation(request: ChatRequest) -> tuple[list[Mapping[str, Any]], list[ImageField]]:
    messages, images = [], []
    for number, message in enumerate(request.messages):
        place = f"messages[{number}].content"
        role = "system" if message.role == "developer" else message.role
        parts = [message.content] if isinstance(message.content, str) else _parts(message.content, place)
        messages.append(turn(role, parts, place))
        images += [part for part in parts if isinstance(part, ImageField)]
    return messages, images


def _parts(content: list[TextPart | ImagePart], place: str) -> list[Part]:
    return [
        part.text
        if isinstance(part, TextPart)
        else ImageField(part.image_url.url, f"{place}[{index}].image_url.url", part.image_url.detail == "low")
        for index, part in enumerate(content)
    ]


def _json_schema(form: ResponseFormat | None) -> Mapping[str, Any] | bool | None:
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return True
    if form.json_schema is None:
        raise bad_request("response_format has type json_schema but no json_schema.", "response_format.json_schema")
    schema = form.json_schema.schema_
    if schema is None:
        return True
    try:
        json.dumps(schema, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        place = "response_format.json_schema.schema"
        raise bad_request(f"{place} has half a surrogate pair, which is no character.", place) from None
    return schema
