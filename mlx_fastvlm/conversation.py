"""A conversation about pictures: turns, the question they lead to, and what is left out when the context is full.

Every question is asked with all that was said before; `Reuse` keeps it from being computed again.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from mlx_fastvlm.answer import GenerationResponse, StageClock
from mlx_fastvlm.conversation_file import Saved, Turn, load_conversation, save_conversation
from mlx_fastvlm.errors import OptionError
from mlx_fastvlm.generate import as_list, count_positions, stream_generate
from mlx_fastvlm.image_content import ImageContent, recognize
from mlx_fastvlm.image_decoding import ImageSource, open_image
from mlx_fastvlm.image_features import image_rows
from mlx_fastvlm.model import FastVLM
from mlx_fastvlm.options import GenerationOptions
from mlx_fastvlm.prefix_cache import common_length
from mlx_fastvlm.processor import Processor
from mlx_fastvlm.prompt import IMAGE_MARK, Message
from mlx_fastvlm.reuse import Reuse

Context = Literal["error", "slide"]

# Two questions whose tokens begin differently: what they share is known before a question is.
_UNLIKE_WORDS = ("0", "A")


class Conversation:
    """Questions and answers about pictures, one after the other.

        chat = Conversation(model, processor, image="photo.jpg")
        print(chat.ask("What is this?"))
        print(chat.ask("Which color is it?"))  # starts at once: the picture is known

    Args:
        model, processor: from `load`.
        image: one or several, shown with the first question.
        system: system line in place of the default.
        context: when the context is full, "error" raises ContextError, "slide" leaves the oldest turns out of what the
            model is told (not out of `turns`), a quarter of the context at a time; their images stay.
        reuse: shared with other conversations of the same model and thread; None makes one.
        options: defaults for every question, see `GenerationOptions`.

    Attributes:
        turns: all turns so far, to be read.
        system: may be assigned; the next question is asked with it.
        reuse: what is shared with branches.

    Raises:
        OptionError: an option is out of range, or `reuse` another model's.
        ImageError: an image cannot be read.
    """

    def __init__(
        self,
        model: FastVLM,
        processor: Processor,
        image: ImageSource | Sequence[ImageSource] | None = None,
        *,
        system: str | None = None,
        context: Context = "error",
        reuse: Reuse | None = None,
        **options: Any,
    ):
        GenerationOptions(**options)
        if context not in ("error", "slide"):
            raise OptionError(f"context is {context!r}; expected 'error' or 'slide'.")
        self.model = model
        self.processor = processor
        self.turns: list[Turn] = []
        self.system = system
        self.context: Context = context
        self.options = options
        self._shown: list[ImageContent] = []
        self.show([] if image is None else image)
        if reuse is not None:
            reuse.check_model(model, processor)
        self.reuse = Reuse(model, processor) if reuse is None else reuse

    def __repr__(self) -> str:
        return f"<Conversation: {len(self.turns)} turns, {len(self.images)} images>"

    def show(self, image: ImageSource | Sequence[ImageSource]) -> None:
        """Add images to the next question. Raises ImageError, and then adds none, if one cannot be read."""
        contents = self._recognized(image)
        for content in contents:
            open_image(content.open())  # a damaged one should be known before a question is asked about it
        self._shown += contents

    @property
    def images(self) -> tuple[ImageContent, ...]:
        """All images of the conversation, those shown for the next question last."""
        return tuple(image for turn in self.turns for image in turn.images) + tuple(self._shown)

    @property
    def context_limit(self) -> int:
        """How many positions the model's context holds."""
        return self.model.config.text_config.max_position_embeddings

    @property
    def context_tokens(self) -> int:
        """Positions that all turns and the images shown take, before the words of another question."""
        return self.count_tokens()

    def count_tokens(self, **options: Any) -> int:
        """`context_tokens` with options of the next question: its resolution is that of all images."""
        return self._positions([*self.turns, Turn("", images=tuple(self._shown))], self._chosen(options))

    def prepare(self, **options: Any) -> StageClock:
        """Run what is known already through encoder and decoder, so that the next question starts at once.

        Args:
            options: of the next question.

        Returns:
            Seconds by stage.

        Raises:
            ContextError: the context is full.
        """
        chosen = self._chosen(options)
        shown = tuple(self._shown)
        asked = [self._told([*self.turns, Turn(words, images=shown)], chosen) for words in _UNLIKE_WORDS]
        first, second = (self._tokenized(turns, chosen) for turns in asked)
        images = [image for turn in asked[0] for image in turn.images]
        return self.reuse.prefill(first[: common_length(first, second)], images, chosen)

    def stream(
        self, question: str, image: ImageSource | Sequence[ImageSource] | None = None, **options: Any
    ) -> Iterator[GenerationResponse]:
        """Ask, and get the answer in pieces. The turn is recorded when the answer ends or, once it has begun, is given up.

        Args:
            question: the user's words; `<image>` marks where images go.
            image: shown with the question, after those of `show`.
            options: for this question, over the conversation's own.

        Raises:
            OptionError, ImageError: on the first `next`; nothing is recorded.
        """
        chosen, shown = self._chosen(options), tuple(self._shown)
        turn = Turn(question, images=(*shown, *self._recognized(image)))
        yield from self._answer(self.turns, turn, chosen, len(shown))

    def ask(self, question: str, image: ImageSource | Sequence[ImageSource] | None = None, **options: Any) -> str:
        """Ask, and get the whole answer; arguments as for `stream`."""
        return "".join(response.text for response in self.stream(question, image, **options))

    def retry(self, **options: Any) -> Iterator[GenerationResponse]:
        """Ask the last question again, in place of its answer. Raises OptionError if there is none."""
        if not self.turns:
            raise OptionError("There is no question to ask again yet.")
        *earlier, last = self.turns
        yield from self._answer(earlier, replace(last, answer=""), self._chosen(options), shown=0)

    def branch(self, turns: int | None = None) -> Conversation:
        """A conversation that goes on from an earlier turn and leaves this one as it is.

        Args:
            turns: how many turns to take over; None takes all. Images shown for the next question are taken over with all.

        Raises:
            OptionError: there are not so many.
        """
        if turns is not None and not 0 <= turns <= len(self.turns):
            raise OptionError(f"There are {len(self.turns)} turns; a branch takes 0 to {len(self.turns)} of them.")
        branch = type(self)(
            self.model, self.processor, system=self.system, context=self.context, reuse=self.reuse, **self.options
        )
        branch.turns = self.turns[:turns]
        branch._shown = list(self._shown) if turns is None else []
        return branch

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the conversation as JSON, images included. Raises ConversationError if it cannot be written."""
        save_conversation(path, Saved(self.turns, tuple(self._shown), self.system))

    @classmethod
    def load(cls, model: FastVLM, processor: Processor, path: str | os.PathLike[str], **how: Any) -> Conversation:
        """Go on with a saved conversation. Raises ConversationError if it cannot be read.

        Args:
            how: as for a new conversation. Options are not in the file; a system line is, and gives way to one here.
        """
        saved = load_conversation(path)
        conversation = cls(model, processor, **{"system": saved.system, **how})
        conversation.turns = list(saved.turns)
        conversation._shown = [*saved.shown, *conversation._shown]
        return conversation

    def _chosen(self, options: Mapping[str, Any]) -> GenerationOptions:
        return GenerationOptions(**{"system": self.system, **self.options, **options})

    def _recognized(self, image: ImageSource | Sequence[ImageSource] | None) -> list[ImageContent]:
        return [recognize(each, self.processor.image_processor.background) for each in as_list(image)]

    def _answer(
        self, earlier: Sequence[Turn], turn: Turn, options: GenerationOptions, shown: int
    ) -> Iterator[GenerationResponse]:
        """Answer `turn` after `earlier`. Once that has begun these are the turns, however it ends.

        Args:
            earlier: `turns`, or the first of them; `turn` takes the place of the others.
            shown: how many of the images shown for the next question are used up by it.
        """
        told = self._told([*earlier, turn], options)
        answer = None
        try:
            for response in stream_generate(
                self.model,
                self.processor,
                _messages(told),
                [image for each in told for image in each.images],
                reuse=self.reuse,
                **vars(options),
            ):
                answer = (answer or "") + response.text
                yield response
        finally:
            if answer is not None:
                self.turns[len(earlier) :] = [replace(turn, answer=answer)]
                del self._shown[:shown]

    def _told(self, turns: Sequence[Turn], options: GenerationOptions) -> list[Turn]:
        """What the model is told to answer the last of `turns`: all of them, or with "slide" as many as fit.

        The window moves on by a quarter of the context at a time. Between its moves prompts begin alike, so that a
        question costs its own tokens only.
        """
        if self.context == "error":
            return list(turns)
        room = self.context_limit - options.max_tokens
        excess = self._positions(turns, options) - room
        if excess <= 0:
            return list(turns)
        step = self.context_limit // 4
        most = room + excess - -(-excess // step) * step
        left_out = self._least_left_out(turns, options, most)
        if left_out == len(turns) - 1:  # images take most of the context: a whole step would leave no turn
            left_out = self._least_left_out(turns, options, room)
        return _without_first(turns, left_out)

    def _least_left_out(self, turns: Sequence[Turn], options: GenerationOptions, most: int) -> int:
        """How many of the first turns must go for the rest to take `most` positions; all but the last, if even those."""
        return bisect_left(
            range(len(turns) - 1),
            True,
            key=lambda count: self._positions(_without_first(turns, count), options) <= most,
        )

    def _tokenized(self, turns: Sequence[Turn], options: GenerationOptions) -> list[int]:
        num_images = sum(len(turn.images) for turn in turns)
        return self.processor.tokenize(_messages(turns), num_images, options.system)

    def _positions(self, turns: Sequence[Turn], options: GenerationOptions) -> int:
        image_processor = self.processor.images_at(options.resolution, options.fit)
        images = [image for turn in turns for image in turn.images]
        rows = [image_rows(image, self.reuse.chosen_for(image, image_processor)) for image in images]
        return count_positions(self._tokenized(turns, options), rows)


def _messages(turns: Sequence[Turn]) -> list[Message]:
    """Turns as messages; the last one is the question to answer."""
    messages: list[Message] = []
    for turn in turns:
        # What a model calls <image> is no image.
        answer = turn.answer.replace(IMAGE_MARK, IMAGE_MARK.strip("<>"))
        messages += [{"role": "user", "content": turn.marked_question()}, {"role": "assistant", "content": answer}]
    return messages[:-1]


def _without_first(turns: Sequence[Turn], count: int) -> list[Turn]:
    """Turns less the oldest ones, whose images come with the next one, first."""
    images = [image for turn in turns[:count] for image in turn.images]
    following, *others = turns[count:]
    question = f"{IMAGE_MARK}\n" * len(images) + following.marked_question()
    return [replace(following, question=question, images=(*images, *following.images)), *others]
