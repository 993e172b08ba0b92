"""From a checked request to a question that the engine can answer: all the work that needs no model.

Each kind of work has threads of its own, in which clients take turns: a picture of many pixels or a form that takes
seconds to compile holds up no words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mlx_fastvlm.answer import StageClock
from mlx_fastvlm.errors import ContextError, FastVLMError
from mlx_fastvlm.generate import check_context, count_positions
from mlx_fastvlm.image_content import ImageContent
from mlx_fastvlm.image_features import image_rows
from mlx_fastvlm.image_processing import ImageProcessor
from mlx_fastvlm.model import FastVLM
from mlx_fastvlm.options import GenerationOptions
from mlx_fastvlm.processor import Processor
from mlx_fastvlm.server.api_errors import bad_request, from_library
from mlx_fastvlm.server.asked import Asked
from mlx_fastvlm.server.fair_workers import FairWorkers
from mlx_fastvlm.server.job import Question
from mlx_fastvlm.server.limits import Limits
from mlx_fastvlm.server.pictures import Pictures
from mlx_fastvlm.server.token_logprobs import TokenTexts
from mlx_fastvlm.token_draw import make_draw

_CHARACTERS_A_TOKEN = 16  # on average, at most; English has four or five


class Reader:
    """Reads requests for one model, which it asks for sizes only. Used from one event loop.

    Args:
        model, processor: that the requests are for.
        defaults: options for what a request leaves open.
        limits: of a request.
        pictures: reads images.
        words: threads that tokenize.
        forms: threads that compile answers' forms, which may take seconds (`constraint` bounds it).
    """

    def __init__(
        self,
        model: FastVLM,
        processor: Processor,
        defaults: Mapping[str, Any],
        limits: Limits,
        pictures: Pictures,
        words: FairWorkers,
        forms: FairWorkers,
    ):
        self._model, self._processor, self._defaults, self._limits = model, processor, defaults, limits
        self._pictures, self._words, self._forms = pictures, words, forms

    async def question(self, asked: Asked, client: str, clock: StageClock) -> Question:
        """Read the images and tokenize the words; the stages are booked on `clock`. Raises ApiError."""
        self._check_length(asked)
        self._check_words(asked)
        options = self._options(asked, max_tokens=1)  # what is wrong there is said before any work
        images, image_processor = await self._pictures.read(asked.images, self._image_processor(options), client, clock)
        # "auto" is a number by now.
        asked = replace(asked, options={**asked.options, "resolution": image_processor.image_size})
        question = await self._words.run(client, self._tokenized, asked, images, image_processor, clock)
        if not question.options.is_constrained:
            return question
        try:
            draw = await self._forms.run(client, make_draw, self._processor, question.options)
        except FastVLMError as error:
            raise from_library(error, "response_format") from None
        return replace(question, draw=draw)

    async def token_texts(self, client: str) -> TokenTexts:
        """How the model's tokens are written. Raises ApiError if they cannot be."""
        try:
            return await self._words.run(client, TokenTexts, self._processor)
        except FastVLMError as error:
            raise from_library(error, "logprobs") from None

    def _tokenized(
        self, asked: Asked, images: Sequence[ImageContent], image_processor: ImageProcessor, clock: StageClock
    ) -> Question:
        clock.lap("wait")
        try:
            input_ids = self._processor.tokenize(asked.messages, len(images))
            clock.lap("tokenize")
            prompt_tokens = count_positions(input_ids, [image_rows(image, image_processor) for image in images])
            max_tokens = asked.max_tokens or max(1, min(self._limits.max_tokens, self._context - prompt_tokens))
            check_context(self._model, prompt_tokens, max_tokens)
        except FastVLMError as error:
            raise from_library(error, "messages") from None
        return Question(input_ids, images, self._options(asked, max_tokens))

    def _options(self, asked: Asked, max_tokens: int) -> GenerationOptions:
        """How the answer is made; what is left open is as in the library, so without a temperature it is greedy."""
        options = {**self._defaults, **asked.options, "max_tokens": max_tokens}
        if asked.low_detail and self._low_resolution is not None:
            options.setdefault("resolution", self._low_resolution)
        try:
            return GenerationOptions(**options)
        except FastVLMError as error:
            raise from_library(error) from None

    def _image_processor(self, options: GenerationOptions) -> ImageProcessor:
        try:
            return self._processor.images_at(options.resolution, options.fit)
        except FastVLMError as error:
            raise from_library(error, "resolution") from None

    @property
    def _low_resolution(self) -> int | None:
        """Half the model's own, a quarter of the positions; None if that cannot be had."""
        own = self._processor.image_processor
        half = own.image_size // 2
        return half if half in own.resolutions else None

    @property
    def _context(self) -> int:
        return self._model.config.text_config.max_position_embeddings

    def _check_length(self, asked: Asked) -> None:
        if asked.max_tokens is not None and asked.max_tokens > self._limits.max_tokens:
            raise bad_request(
                f"{asked.max_tokens} tokens are asked for; this server's answers have at most {self._limits.max_tokens}.",
                asked.max_tokens_field,
            )

    def _check_words(self, asked: Asked) -> None:
        """Refuse at once what cannot fit: the tokenizer would take a minute and gigabytes for all that a request holds."""
        characters = sum(len(part["text"]) for turn in asked.messages for part in turn["content"] if "text" in part)
        if characters > _CHARACTERS_A_TOKEN * self._context:
            message = (
                f"The messages have {characters} characters; the model's context holds {self._context} tokens, and "
                f"{_CHARACTERS_A_TOKEN * self._context} characters are taken for them at most. Shorten the prompt."
            )
            raise from_library(ContextError(message))
