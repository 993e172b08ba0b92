"""How a server is doing, in Prometheus' text format."""

from __future__ import annotations

import mlx.core as mx
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from mlx_fastvlm.answer import GenerationResponse

CONTENT_TYPE = CONTENT_TYPE_LATEST

_TTFT_SECONDS = (0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6)
_ANSWER_SECONDS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 300)
_TOKENS = tuple(2**power for power in range(0, 14))


class Metrics:
    """The figures of one server. Every method may be called from any thread."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = self._counter("requests", "Requests by how they ended.", ["outcome"])
        self._errors = self._counter("http_errors", "Requests that got an error, by its status.", ["status"])
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens, image rows included.")
        self._cached_tokens = self._counter("cached_prompt_tokens", "Prompt tokens known from earlier requests.")
        self._generated_tokens = self._counter("generated_tokens", "Tokens of answers.")
        self._with_images = self._counter("image_requests", "Answered requests with images.")
        self._encoded = self._counter("encoded_requests", "Answered requests for which the image encoder had to run.")
        self._ttft = self._histogram("ttft_seconds", "From a request's arrival to its first token.", _TTFT_SECONDS)
        self._seconds = self._histogram(
            "answer_seconds", "From a request's arrival to its last token.", _ANSWER_SECONDS
        )
        self._prompt_lengths = self._histogram("prompt_length_tokens", "Tokens of a prompt.", _TOKENS)
        self._answer_lengths = self._histogram("answer_length_tokens", "Tokens of an answer.", _TOKENS)
        self._waiting = self._gauge("requests_waiting", "Requests without a place yet.")
        self._running = self._gauge("requests_running", "Answers being decoded.")
        self._kept_rows = self._gauge("kept_image_bytes", "Bytes of image rows kept for later requests.")
        self._kept_prefixes = self._gauge("kept_prefix_bytes", "Bytes of keys and values kept for later requests.")
        self._gauge("memory_bytes", "Bytes that MLX's arrays take now.").set_function(mx.get_active_memory)
        self._gauge("memory_peak_bytes", "The most bytes they took.").set_function(mx.get_peak_memory)

    def answered(self, response: GenerationResponse, seconds: float, has_images: bool) -> None:
        """An answer ended with this response, so many seconds after its request had come."""
        self._requests.labels(response.finish_reason).inc()
        self._prompt_tokens.inc(response.prompt_tokens)
        self._cached_tokens.inc(response.cached_tokens)
        self._generated_tokens.inc(response.generation_tokens)
        self._with_images.inc(has_images)
        self._encoded.inc("encode" in response.timings)
        self._ttft.observe(response.ttft)
        self._seconds.observe(seconds)
        self._prompt_lengths.observe(response.prompt_tokens)
        self._answer_lengths.observe(response.generation_tokens)

    def unanswered(self, outcome: str) -> None:
        """A request ended without (all of) its answer: "cancelled" by its client, "refused" or "failed"."""
        self._requests.labels(outcome).inc()

    def error(self, status: int) -> None:
        """A client was told of an error."""
        self._errors.labels(str(status)).inc()

    def load(self, waiting: int, running: int) -> None:
        """So many requests are there now."""
        self._waiting.set(waiting)
        self._running.set(running)

    def kept(self, row_bytes: int, prefix_bytes: int) -> None:
        """So much is kept for later requests now."""
        self._kept_rows.set(row_bytes)
        self._kept_prefixes.set(prefix_bytes)

    def page(self) -> bytes:
        """All figures, of type `CONTENT_TYPE`."""
        return generate_latest(self._registry)

    def _counter(self, name: str, description: str, labels: list[str] | None = None) -> Counter:
        return Counter(f"mlx_fastvlm_{name}", description, labels or (), registry=self._registry)

    def _gauge(self, name: str, description: str) -> Gauge:
        return Gauge(f"mlx_fastvlm_{name}", description, registry=self._registry)

    def _histogram(self, name: str, description: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"mlx_fastvlm_{name}", description, buckets=buckets, registry=self._registry)
