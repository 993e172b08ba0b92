"""Anthropic's Messages: what clients send, checked, and what they get. Fields that are not named here are ignored.

As in schema.py, what cannot be followed is refused where ignoring it would change the answer.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from mlx_fastvlm.answer import GenerationResponse
from mlx_fastvlm.server.api_errors import ApiError, bad_request
from mlx_fastvlm.server.asked import Asked, ImageField, Part, given, turn
from mlx_fastvlm.server.schema import Resolution

_MAX_STOPS = 16
_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens"}


class _Block(BaseModel):
    """Values have the type they are said to have: "5" is no number."""

    model_config = ConfigDict(strict=True)


class TextBlock(_Block):
    type: Literal["text"]
    text: str


class Base64Source(_Block):
    type: Literal["base64"]
    media_type: str
    data: str


class UrlSource(_Block):
    type: Literal["url"]
    url: str = Field(description="http(s), with --allow-remote-images; or a data: URL.")


class ImageBlock(_Block):
    type: Literal["image"]
    source: Annotated[Base64Source | UrlSource, Field(discriminator="type")]


class InputMessage(_Block):
    role: Literal["user", "assistant"]
    content: str | Annotated[list[Annotated[TextBlock | ImageBlock, Field(discriminator="type")]], Field(min_length=1)]


class Metadata(_Block):
    user_id: str | None = None


class Thinking(_Block):
    type: str


class MessagesRequest(_Block):
    """The body of POST /v1/messages."""

    model: str
    max_tokens: Annotated[int, Field(ge=1)]
    messages: Annotated[list[InputMessage], Field(min_length=1)]
    system: str | list[TextBlock] | None = None
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    stop_sequences: Annotated[list[str], Field(max_length=_MAX_STOPS)] | None = None
    stream: bool | None = None
    metadata: Metadata | None = None
    resolution: Resolution = None
    fit: Literal["pad", "crop", "native"] | None = Field(default=None, description="How a picture comes to its shape.")
    # Known, and not to be had:
    tools: list[Any] | None = None
    thinking: Thinking | None = None


def read_messages(request: MessagesRequest) -> Asked:
    """What a request asks for. Raises ApiError if it cannot be had."""
    if request.tools:
        raise bad_request("tools cannot be had from this server; leave them out.", "tools")
    if request.thinking is not None and request.thinking.type != "disabled":
        raise bad_request("thinking cannot be had from this server; leave it out.", "thinking")
    if request.messages[-1].role == "assistant":
        raise bad_request("The last message is the assistant's; this server does not go on with answers.", "messages")
    turns, images = [], []
    if request.system:
        words = [request.system] if isinstance(request.system, str) else [block.text for block in request.system]
        turns.append(turn("system", words, "system"))
    for number, message in enumerate(request.messages):
        place = f"messages[{number}].content"
        parts = [message.content] if isinstance(message.content, str) else _parts(message.content, place)
        turns.append(turn(message.role, parts, place))
        images += [part for part in parts if isinstance(part, ImageField)]
    return Asked(
        model=request.model,
        messages=turns,
        images=images,
        max_tokens=request.max_tokens,
        options=given(
            temp=request.temperature,
            top_p=request.top_p,
            top_k=request.top_k,
            stop=request.stop_sequences,
            resolution=request.resolution,
            fit=request.fit,
        ),
        user=request.metadata.user_id if request.metadata else None,
        stream=bool(request.stream),
    )


class MessagesReply:
    """One answer on its way to its client.

    Args:
        model_id: the model's name.
        stop_sequences: that the client gave.
        decode: tokens → text.
        eos_token_ids: tokens with which the model itself ends an answer.
    """

    def __init__(
        self,
        model_id: str,
        stop_sequences: Sequence[str],
        decode: Callable[[Sequence[int]], str],
        eos_token_ids: frozenset[int],
    ):
        self._id, self._model_id = f"msg_{uuid.uuid4().hex}", model_id
        self._stop_sequences, self._decode, self._eos_token_ids = stop_sequences, decode, eos_token_ids
        self._tokens: list[int] = []

    def whole(self, responses: Sequence[GenerationResponse]) -> dict[str, Any]:
        """A finished answer, where the client does not stream."""
        self._tokens = [response.token for response in responses]
        last, text = responses[-1], "".join(response.text for response in responses)
        return {**self._message([{"type": "text", "text": text}], last), **self._ending(last)}

    def events(self, response: GenerationResponse) -> bytes:
        """What a streaming client gets for one token: often nothing."""
        self._tokens.append(response.token)
        events = []
        if response.generation_tokens == 1:
            message = {**self._message([], response), "stop_reason": None, "stop_sequence": None}
            events.append(_event("message_start", message=message))
            events.append(_event("content_block_start", index=0, content_block={"type": "text", "text": ""}))
        if response.text:
            delta = {"type": "text_delta", "text": response.text}
            events.append(_event("content_block_delta", index=0, delta=delta))
        if response.finish_reason is not None:
            usage = {"output_tokens": response.generation_tokens}
            events.append(_event("content_block_stop", index=0))
            events.append(_event("message_delta", delta=self._ending(response), usage=usage))
            events.append(_event("message_stop"))
        return b"".join(events)

    def error(self, error: ApiError) -> bytes:
        """What a streaming client gets when its answer breaks off."""
        return _event("error", error=error.anthropic_body["error"])

    def _message(self, content: Sequence[Mapping[str, str]], response: GenerationResponse) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model_id,
            "content": content,
            "usage": _usage(response),
        }

    def _ending(self, last: GenerationResponse) -> dict[str, str | None]:
        stop = self._stop_sequence() if last.finish_reason == "stop" and last.token not in self._eos_token_ids else None
        reason = _STOP_REASONS[last.finish_reason] if stop is None else "stop_sequence"
        return {"stop_reason": reason, "stop_sequence": stop}

    def _stop_sequence(self) -> str | None:
        """The one that ended the answer: the first in the text of its tokens."""
        text = self._decode(self._tokens)
        found = [(text.find(stop), stop) for stop in self._stop_sequences if stop and stop in text]
        return min(found)[1] if found else None


def _parts(content: Sequence[TextBlock | ImageBlock], place: str) -> list[Part]:
    return [
        block.text
        if isinstance(block, TextBlock)
        else ImageField(_url(block.source), f"{place}[{index}].source.{_FIELDS[block.source.type]}")
        for index, block in enumerate(content)
    ]


_FIELDS = {"base64": "data", "url": "url"}


def _url(source: Base64Source | UrlSource) -> str:
    return source.url if isinstance(source, UrlSource) else f"data:{source.media_type};base64,{source.data}"


def _usage(response: GenerationResponse) -> dict[str, int]:
    """Token counts in Anthropic's way: what was known from earlier requests is no part of `input_tokens`."""
    return {
        "input_tokens": response.prompt_tokens - response.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": response.cached_tokens,
        "output_tokens": response.generation_tokens,
    }


def _event(kind: str, **fields: Any) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields})}\n\n".encode("ascii")
