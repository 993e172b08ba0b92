"""What a client is told when a request fails, with its HTTP status: OpenAI's form of an error, and Anthropic's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_fastvlm.errors import ContextError, FastVLMError

RETRY_SECONDS = 2  # what clients are asked to wait when there is no room
MESSAGES_PATH = "/v1/messages"  # whose clients read Anthropic's form

_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class ApiError(Exception):
    """A request that gets no answer.

    Args:
        status: HTTP status.
        message: what was found, what was expected, what to do.
        code: the error's name for programs.
        param: the field of the request that it is about.
    """

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None):
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param

    @property
    def body(self) -> dict[str, Any]:
        """The error as OpenAI's clients read it."""
        return {
            "error": {"message": self.message, "type": _error_type(self.status), "param": self.param, "code": self.code}
        }

    @property
    def anthropic_body(self) -> dict[str, Any]:
        """The error as Anthropic's clients read it."""
        fallback = "invalid_request_error" if self.status < 500 else "api_error"
        kind = _ANTHROPIC_TYPES.get(self.status, fallback)
        return {"type": "error", "error": {"type": kind, "message": self.message}}

    def body_for(self, path: str) -> dict[str, Any]:
        """The error as the clients of a route read it."""
        return self.anthropic_body if path == MESSAGES_PATH else self.body

    @property
    def headers(self) -> Mapping[str, str]:
        """Headers that belong to the status."""
        if self.status in (429, 503):
            return {"Retry-After": str(RETRY_SECONDS)}
        return {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request that would fail again however often it is sent."""
    return ApiError(400, message, code=code, param=param)


def from_library(error: FastVLMError, param: str | None = None) -> ApiError:
    """What the library says of a client's prompt, image or options."""
    code = "context_length_exceeded" if isinstance(error, ContextError) else None
    return bad_request(str(error), param or ("messages" if code else None), code)


def internal(message: str = "The server failed to answer; its log says why.") -> ApiError:
    """A fault of ours."""
    return ApiError(500, message, code="internal_error")


def stopping() -> ApiError:
    """The server is being stopped."""
    return ApiError(503, "The server is stopping; try again when it is back.", code="server_stopping")


def _error_type(status: int) -> str:
    if status in (401, 403):
        return "authentication_error"
    if status == 429:
        return "rate_limit_error"
    return "invalid_request_error" if status < 500 else "server_error"
