"""What a client of OpenAI's chat completions gets: an answer's tokens, whole or as chunks. schema.py has what it sends."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from mlx_fastvlm.answer import GenerationResponse
from mlx_fastvlm.server.api_errors import ApiError
from mlx_fastvlm.server.token_logprobs import LogprobsForm


class ChatReply:
    """One answer on its way to its client.

    Args:
        model_id: the model's name.
        logprobs: gives log-probabilities their form; None where none are asked for.
        with_usage: whether a streaming client wants token counts at the end.
    """

    def __init__(self, model_id: str, logprobs: LogprobsForm | None = None, with_usage: bool = False):
        self._common = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model_id}
        self._logprobs, self._with_usage = logprobs, with_usage

    def whole(self, responses: Sequence[GenerationResponse]) -> dict[str, Any]:
        """A finished answer, where the client does not stream."""
        last = responses[-1]
        message = {"role": "assistant", "content": "".join(response.text for response in responses), "refusal": None}
        entries = [entry for response in responses for entry in self._entries(response)]
        choice = {
            "index": 0,
            "message": message,
            "logprobs": None if self._logprobs is None else _logprobs(entries),
            "finish_reason": last.finish_reason,
        }
        return self._object("chat.completion", choices=[choice], usage=_usage(last), timings=_timings(last))

    def events(self, response: GenerationResponse) -> bytes:
        """What a streaming client gets for one token: often nothing."""
        events = [_event(chunk) for chunk in self._chunks(response)]
        return b"".join([*events, b"data: [DONE]\n\n"] if response.finish_reason is not None else events)

    def error(self, error: ApiError) -> bytes:
        """What a streaming client gets when its answer breaks off."""
        return _event(error.body)

    def _chunks(self, response: GenerationResponse) -> list[dict[str, Any]]:
        entries = self._entries(response)
        choices: list[dict[str, Any]] = []
        if response.generation_tokens == 1:
            choices.append(_choice({"role": "assistant", "content": ""}))
        if response.text:
            choices.append(_choice({"content": response.text}))
        if response.finish_reason is not None:
            choices.append(_choice({}, response.finish_reason))
        if entries:  # those of the text come with it
            choices[-2 if response.text and response.finish_reason is not None else -1]["logprobs"] = _logprobs(entries)
        more = {"usage": None} if self._with_usage else {}
        chunks = [self._object("chat.completion.chunk", choices=[choice], **more) for choice in choices]
        if response.generation_tokens == 1:
            chunks[0]["timings"] = _timings(response)
        if response.finish_reason is not None:
            chunks[-1]["timings"] = _timings(response)
            if self._with_usage:
                chunks.append(self._object("chat.completion.chunk", choices=[], usage=_usage(response)))
        return chunks

    def _entries(self, response: GenerationResponse) -> list[dict[str, Any]]:
        return [] if self._logprobs is None else self._logprobs.of(response)

    def _object(self, kind: str, **fields: Any) -> dict[str, Any]:
        return {**self._common, "object": kind, **fields}


def model_card(model_id: str, created: int, facts: Mapping[str, Any]) -> dict[str, Any]:
    """A model as GET /v1/models lists it.

    Args:
        model_id: what clients call it.
        created: seconds since 1970.
        facts: what OpenAI's clients do not ask for.
    """
    return {"id": model_id, "object": "model", "created": created, "owned_by": "mlx-fastvlm", "mlx_fastvlm": facts}


def _choice(delta: Mapping[str, str], finish_reason: str | None = None) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


def _logprobs(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {"content": entries, "refusal": None}


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


def _event(content: Mapping[str, Any]) -> bytes:
    return b"data: " + json.dumps(content).encode("ascii") + b"\n\n"
