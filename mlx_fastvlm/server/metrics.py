"""How a server is doing, in Prometheus' text format, by model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import mlx.core as mx
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from mlx_fastvlm.answer import GenerationResponse

CONTENT_TYPE = CONTENT_TYPE_LATEST

_PREFIX = "mlx_fastvlm_"

_TTFT_SECONDS = (0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6)
_ANSWER_SECONDS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 300)
_TOKENS = tuple(2**power for power in range(0, 14))

_BY_MODEL = {  # name → kind, description
    "prompt_tokens": (Counter, "Prompt tokens, image rows included."),
    "cached_prompt_tokens": (Counter, "Prompt tokens known from earlier requests."),
    "generated_tokens": (Counter, "Tokens of answers."),
    "image_requests": (Counter, "Answered requests with images."),
    "encoded_requests": (Counter, "Answered requests for which the image encoder had to run."),
    "ttft_seconds": (partial(Histogram, buckets=_TTFT_SECONDS), "From a request's arrival to its first token."),
    "answer_seconds": (partial(Histogram, buckets=_ANSWER_SECONDS), "From a request's arrival to its last token."),
    "prompt_length_tokens": (partial(Histogram, buckets=_TOKENS), "Tokens of a prompt."),
    "answer_length_tokens": (partial(Histogram, buckets=_TOKENS), "Tokens of an answer."),
    "requests_waiting": (Gauge, "Requests without a place yet."),
    "requests_running": (Gauge, "Answers being decoded."),
    "kept_image_bytes": (Gauge, "Bytes of image rows kept for later requests."),
    "kept_prefix_bytes": (Gauge, "Bytes of keys and values kept for later requests."),
}


class Metrics:
    """The figures of one server. Every method may be called from any thread."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._errors = Counter(
            f"{_PREFIX}http_errors", "Requests that got an error, by its status.", ["status"], registry=self._registry
        )
        self._requests = Counter(
            f"{_PREFIX}requests", "Requests by how they ended.", ["model", "outcome"], registry=self._registry
        )
        self._by_model = {
            name: kind(_PREFIX + name, description, ["model"], registry=self._registry)
            for name, (kind, description) in _BY_MODEL.items()
        }
        self._memory("memory_bytes", "Bytes that MLX's arrays take now.", mx.get_active_memory)
        self._memory("memory_peak_bytes", "The most bytes they took.", mx.get_peak_memory)

    def of(self, model_id: str) -> ModelMetrics:
        """The figures of one of its models."""
        figures = {name: family.labels(model_id) for name, family in self._by_model.items()}
        return ModelMetrics(figures, lambda outcome: self._requests.labels(model_id, outcome))

    def error(self, status: int) -> None:
        """A client was told of an error."""
        self._errors.labels(str(status)).inc()

    def page(self) -> bytes:
        """All figures, of type `CONTENT_TYPE`."""
        return generate_latest(self._registry)

    def _memory(self, name: str, description: str, read: Callable[[], int]) -> None:
        Gauge(f"{_PREFIX}{name}", description, registry=self._registry).set_function(read)


class ModelMetrics:
    """The figures of one model of a server; from `Metrics.of`. Every method may be called from any thread."""

    def __init__(self, figures: Mapping[str, Any], requests: Callable[[str], Counter]):
        self._figures, self._requests = figures, requests

    def answered(self, response: GenerationResponse, seconds: float, has_images: bool) -> None:
        """An answer ended with this response, so many seconds after its request had come."""
        self._requests(response.finish_reason).inc()
        figures = self._figures
        figures["prompt_tokens"].inc(response.prompt_tokens)
        figures["cached_prompt_tokens"].inc(response.cached_tokens)
        figures["generated_tokens"].inc(response.generation_tokens)
        figures["image_requests"].inc(has_images)
        figures["encoded_requests"].inc("encode" in response.timings)
        figures["ttft_seconds"].observe(response.ttft)
        figures["answer_seconds"].observe(seconds)
        figures["prompt_length_tokens"].observe(response.prompt_tokens)
        figures["answer_length_tokens"].observe(response.generation_tokens)

    def unanswered(self, outcome: str) -> None:
        """A request ended without (all of) its answer: "cancelled" by its client, "refused" or "failed"."""
        self._requests(outcome).inc()

    def load(self, waiting: int, running: int) -> None:
        """So many requests are there now."""
        self._figures["requests_waiting"].set(waiting)
        self._figures["requests_running"].set(running)

    def kept(self, row_bytes: int, prefix_bytes: int) -> None:
        """So much is kept for later requests now."""
        self._figures["kept_image_bytes"].set(row_bytes)
        self._figures["kept_prefix_bytes"].set(prefix_bytes)
