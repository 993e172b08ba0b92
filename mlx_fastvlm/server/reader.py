"""From a checked request to a question that the engine can answer: all the work that needs no model."""

from __future__ import annotations

from mlx_fastvlm.answer import StageClock
from mlx_fastvlm.errors import FastVLMError
from mlx_fastvlm.generate import check_context, count_positions
from mlx_fastvlm.model import FastVLM
from mlx_fastvlm.processor import Processor
from mlx_fastvlm.server.api_errors import bad_request, from_library
from mlx_fastvlm.server.job import Question
from mlx_fastvlm.server.limits import Limits
from mlx_fastvlm.server.pictures import Pictures
from mlx_fastvlm.server.schema import ChatRequest, asked_tokens, check_supported, conversation, generation_options


class Reader:
    """Reads requests for one model, which it asks for sizes only. May be called from several threads.

    Args:
        model, processor: that the requests are for.
        limits: of a request.
        allow_remote_images: whether http(s) URLs are fetched.
    """

    def __init__(self, model: FastVLM, processor: Processor, limits: Limits, allow_remote_images: bool):
        self._model, self._processor, self._limits = model, processor, limits
        self._pictures = Pictures(processor.image_processor, limits, allow_remote_images)

    def question(self, request: ChatRequest, clock: StageClock) -> Question:
        """Tokenize the words and read the images; the stages are booked on `clock`. Raises ApiError."""
        check_supported(request)
        asked = self._asked_tokens(request)
        generation_options(request, max_tokens=1)  # what is wrong there is said before any work
        messages, image_fields = conversation(request)
        images = self._pictures.read(image_fields)
        clock.lap("decode")
        try:
            input_ids = self._processor.tokenize(messages, len(images))
            clock.lap("tokenize")
            prompt_tokens = count_positions(self._model, self._processor, input_ids, len(images))
            max_tokens = asked or max(1, min(self._limits.max_tokens, self._context - prompt_tokens))
            check_context(self._model, prompt_tokens, max_tokens)
        except FastVLMError as error:
            raise from_library(error, "messages") from None
        return Question(input_ids, images, generation_options(request, max_tokens))

    @property
    def _context(self) -> int:
        return self._model.config.text_config.max_position_embeddings

    def _asked_tokens(self, request: ChatRequest) -> int | None:
        asked = asked_tokens(request)
        if asked is not None and asked > self._limits.max_tokens:
            raise bad_request(
                f"{asked} tokens are asked for; this server's answers have at most {self._limits.max_tokens}.",
                "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens",
            )
        return asked
