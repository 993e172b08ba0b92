"""What /openapi.json says of replies; what it says of requests comes from schema.py and messages.py."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]


def _object(required: Schema, optional: Schema | None = None) -> Schema:
    return {"type": "object", "required": list(required), "properties": {**required, **(optional or {})}}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _one_of(*values: str) -> Schema:
    return {"enum": list(values)}


_TEXT: Schema = {"type": "string"}
_NUMBER: Schema = {"type": "number"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_STREAM: Schema = {"text/event-stream": {"schema": {"type": "string"}}}

_LOGPROB = {"token": _TEXT, "logprob": _NUMBER, "bytes": _or_null(_list(_COUNT))}
_LOGPROBS = _object(
    {"content": _list(_object({**_LOGPROB, "top_logprobs": _list(_object(_LOGPROB))})), "refusal": {"type": "null"}}
)
_CHAT_USAGE = _object(
    {
        "prompt_tokens": _COUNT,
        "completion_tokens": _COUNT,
        "total_tokens": _COUNT,
        "prompt_tokens_details": _object({"cached_tokens": _COUNT}),
    }
)
_TIMINGS = _object(
    {"ttft": _NUMBER, "generation_tps": _NUMBER, "stages": {"type": "object", "additionalProperties": _NUMBER}}
)
_CHOICE = _object(
    {
        "index": _COUNT,
        "message": _object({"role": _one_of("assistant"), "content": _TEXT, "refusal": {"type": "null"}}),
        "logprobs": _or_null(_LOGPROBS),
        "finish_reason": _one_of("stop", "length"),
    }
)
_CHAT_COMPLETION = _object(
    {
        "id": _TEXT,
        "object": _one_of("chat.completion"),
        "created": _COUNT,
        "model": _TEXT,
        "choices": _list(_CHOICE),
        "usage": _CHAT_USAGE,
        "timings": _TIMINGS,
    }
)
_MESSAGES_USAGE = _object(
    {
        "input_tokens": _COUNT,
        "output_tokens": _COUNT,
        "cache_creation_input_tokens": _COUNT,
        "cache_read_input_tokens": _COUNT,
    }
)
_MESSAGE = _object(
    {
        "id": _TEXT,
        "type": _one_of("message"),
        "role": _one_of("assistant"),
        "model": _TEXT,
        "content": _list(_object({"type": _one_of("text"), "text": _TEXT})),
        "stop_reason": _one_of("end_turn", "max_tokens", "stop_sequence"),
        "stop_sequence": _or_null(_TEXT),
        "usage": _MESSAGES_USAGE,
    }
)
_FACTS = {
    "resolution": _COUNT,
    "default_resolution": {"anyOf": [_COUNT, _one_of("auto")]},
    **dict.fromkeys(("fit", "default_fit"), _one_of("pad", "crop", "native")),
    **dict.fromkeys(("min_resolution", "max_resolution", "resolution_step"), _COUNT),
    **dict.fromkeys(("max_tokens", "max_images", "context_length"), _COUNT),
}
_CARD = _object(
    {
        "id": _TEXT,
        "object": _one_of("model"),
        "created": _COUNT,
        "owned_by": _TEXT,
        "mlx_fastvlm": _object(_FACTS),
    }
)
_ERROR = _object(
    {"error": _object({"message": _TEXT, "type": _TEXT, "param": _or_null(_TEXT), "code": _or_null(_TEXT)})}
)
_ANTHROPIC_ERROR = _object({"type": _one_of("error"), "error": _object({"type": _TEXT, "message": _TEXT})})


def _reply(description: str, schema: Schema, more: Schema | None = None) -> Schema:
    return {"description": description, "content": {"application/json": {"schema": schema}, **(more or {})}}


def _errors(schema: Schema) -> Schema:
    return {
        "4XX": _reply("The request cannot be followed; error.message says why.", schema),
        "5XX": _reply("The server cannot answer now.", schema),
    }


CHAT = {
    "200": _reply("The answer; with stream: true its chunks as server-sent events.", _CHAT_COMPLETION, _STREAM),
    **_errors(_ERROR),
}
MESSAGES = {
    "200": _reply("The answer; with stream: true its events as server-sent events.", _MESSAGE, _STREAM),
    **_errors(_ANTHROPIC_ERROR),
}
MODELS = {
    "200": _reply("The models.", _object({"object": _one_of("list"), "data": _list(_CARD)})),
    **_errors(_ERROR),
}
MODEL = {"200": _reply("The model.", _CARD), **_errors(_ERROR)}
HEALTH = {
    "200": _reply("Answers can be had.", _object({"status": _one_of("ok"), "models": _list(_TEXT)})),
    "503": _reply("No answers can be had.", _object({"status": _one_of("failed"), "reason": _TEXT})),
}
METRICS = {"200": {"description": "Figures for Prometheus.", "content": {"text/plain": {"schema": _TEXT}}}}
