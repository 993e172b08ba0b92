"""One request on its way through the engine: what is asked, and how its answer comes back to asyncio."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from mlx_fastvlm.answer import GenerationResponse, StageClock
from mlx_fastvlm.image_content import ImageContent
from mlx_fastvlm.options import GenerationOptions
from mlx_fastvlm.prefix_cache import Position
from mlx_fastvlm.server.api_errors import ApiError
from mlx_fastvlm.token_draw import TokenDraw


@dataclass(frozen=True)
class Question:
    """A request that is read: all that the engine needs of it.

    Attributes:
        input_ids: the prompt, -200 at each image.
        images: in the order of those.
        options: of the answer.
        draw: draws its tokens, where it must follow a form.
    """

    input_ids: Sequence[int]
    images: Sequence[ImageContent]
    options: GenerationOptions
    draw: TokenDraw | None = None


@dataclass
class Job:
    """A question and its answer. Made and read in asyncio's thread; the engine's thread puts the answer in.

    Args:
        question: what is asked.
        clock: has run since the request came.
        deadline: on the monotonic clock, when the answer ends in any case.
    """

    question: Question
    clock: StageClock
    deadline: float
    cancelled: bool = False  # nobody waits for it any more
    positions: list[Position] = field(default_factory=list)  # what the decoder saw and drew; the engine's
    last: GenerationResponse | None = None  # the latest; the engine's

    def __post_init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[GenerationResponse | ApiError] = asyncio.Queue()

    @property
    def is_late(self) -> bool:
        """Whether its time is over."""
        return time.monotonic() > self.deadline

    def put(self, event: GenerationResponse | ApiError) -> None:
        """Send a token's response, or an error as the last event. From the engine's thread."""
        with suppress(RuntimeError):  # the loop is closed: nobody listens
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def next(self) -> GenerationResponse:
        """Wait for the next token's response. Raises ApiError if there is none to come."""
        event = await self._events.get()
        if isinstance(event, ApiError):
            raise event
        return event

    async def rest(self, first: GenerationResponse) -> AsyncIterator[GenerationResponse]:
        """`first` and all that follow it. Raises ApiError if the answer breaks off."""
        response = first
        yield response
        while response.finish_reason is None:
            response = await self.next()
            yield response

    def cancel(self) -> None:
        """Nobody wants the (rest of the) answer; its place is free with the engine's next step."""
        self.cancelled = True
