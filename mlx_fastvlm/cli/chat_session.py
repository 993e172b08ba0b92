"""One chat: what is entered → what the conversation does and the view shows. Knows neither keyboard nor terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_fastvlm.cli.chat_commands import (
    COMMANDS,
    KEYS_HELP,
    Question,
    file_name,
    parse,
    parse_setting,
    picture_names,
)
from mlx_fastvlm.cli.chat_keys import StopRequest
from mlx_fastvlm.cli.chat_view import View
from mlx_fastvlm.cli.statistics import statistics
from mlx_fastvlm.errors import ContextError, FastVLMError, OptionError
from mlx_fastvlm.generate import SEVERAL_IMAGES
from mlx_fastvlm.options import GenerationOptions
from mlx_fastvlm.prompt import DEFAULT_SYSTEM

if TYPE_CHECKING:
    from mlx_fastvlm.answer import GenerationResponse
    from mlx_fastvlm.conversation import Conversation
    from mlx_fastvlm.image_content import ImageContent

_MAKE_ROOM = (
    "To make room: /undo, /branch N or /clear; /set max_tokens for a shorter answer. Or start the chat with "
    "--context slide, which leaves out the oldest turns."
)
_SIZE_SETTINGS = ("resolution", "fit")  # a picture must be read anew with another one
_SHOWN_LETTERS = 100  # of a question that a note mentions


class Session:
    """Carries out what is entered.

    Args:
        conversation: that goes on.
        view: where things are shown.
        load: from a saved chat's path to its conversation.
        stopping: a block in which an answer can be stopped.
        settings: options of every question, which /set changes.
        file: what the conversation was loaded from.
        statistics: whether to show them after every answer.
    """

    def __init__(
        self,
        conversation: Conversation,
        view: View,
        *,
        load: Callable[[Path], Conversation],
        stopping: Callable[[], AbstractContextManager[StopRequest]],
        settings: dict[str, Any],
        file: Path | None = None,
        statistics: bool = False,
    ):
        self.conversation = conversation
        self._view = view
        self._load = load
        self._stopping = stopping
        self._settings = settings
        self._file = file
        self._statistics = statistics
        self._last: GenerationResponse | None = None
        self._images_noticed = 0
        self._prepared = 0.0  # seconds since the last answer that made the next one start sooner
        self._prepared_last = 0.0  # the same of the last answer
        self._commands: dict[str, Callable[[str], None]] = {
            "image": self._image,
            "system": self._system,
            "retry": self._retry,
            "undo": self._undo,
            "branch": self._branch,
            "clear": self._clear,
            "history": self._history,
            "save": self._save,
            "load": self._load_file,
            "set": self._set,
            "stats": self._stats,
            "help": self._help,
        }

    def enter(self, line: str) -> bool:
        """Do what a line asks for. What goes wrong is shown in a line, and leaves the conversation as it was.

        Args:
            line: as entered; nothing is done for a blank one.

        Returns:
            Whether the chat goes on.

        Raises:
            KeyboardInterrupt: Ctrl-C before an answer began, or during a command.
        """
        try:
            if not line.strip():
                return True
            entered = parse(line)
            if isinstance(entered, Question):
                self._ask(entered)
            elif entered.command == "exit":
                return False
            else:
                self._commands[entered.command](entered.argument)
        except FastVLMError as error:
            self._view.error(str(error))
        return True

    def prepare(self) -> None:
        """Get ready for the next question: read all that is known already, so that its answer starts at once."""
        start = time.perf_counter()
        what = _listed(self._shown()) or ("the conversation" if self.conversation.turns else "")
        try:
            with self._view.status(f"Reading {what}") if what else nullcontext():
                self.conversation.prepare(**self._settings)
        except OptionError as error:
            self._refuse(error)
        self._prepared += time.perf_counter() - start
        self._notice_several_images()

    def _notice_several_images(self) -> None:
        """Say once for every picture that comes to others what several do to answers."""
        count = len(self.conversation.images)
        if count > max(self._images_noticed, 1):
            self._view.note(SEVERAL_IMAGES)
        self._images_noticed = count

    def _ask(self, question: Question) -> None:
        if question.pictures:
            self._show(question.pictures)
        try:
            self._answer(self.conversation.stream(question.text, **self._settings))
        except OptionError as error:
            self._refuse(error)

    def _refuse(self, error: OptionError) -> None:
        """Show why nothing can be asked and, if the context is full, how to make room."""
        self._view.error(str(error))
        if isinstance(error, ContextError):
            self._view.note(_MAKE_ROOM)

    def _answer(self, responses: Iterator[GenerationResponse]) -> None:
        last, said = None, False
        with self._stopping() as stop, self._view.answer() as shown, closing(responses):
            for response in responses:
                stop.waits = True
                shown.add(response.text)
                last, said = response, said or bool(response.text.strip())
                if stop.pressed:
                    break
        self._last = last
        self._prepared_last, self._prepared = self._prepared, 0.0
        if not said:
            self._view.note("The model says nothing.")
        if last.finish_reason is None:
            self._view.note("Stopped. The next question goes on from here.")
        elif last.finish_reason == "length":
            self._view.note(f"Cut off after {last.generation_tokens} tokens; /set max_tokens allows longer answers.")
        if self._statistics:
            self._stats("")

    def _shown(self) -> tuple[ImageContent, ...]:
        """The images that wait for the next question."""
        asked = sum(len(turn.images) for turn in self.conversation.turns)
        return self.conversation.images[asked:]

    def _show(self, names: Sequence[str]) -> None:
        self.conversation.show(names)
        self.prepare()

    def _image(self, argument: str) -> None:
        if argument:
            self._show(picture_names(argument))
        elif self.conversation.images:
            waiting = len(self._shown())
            for i, image in enumerate(self.conversation.images):
                is_waiting = i >= len(self.conversation.images) - waiting
                self._view.note(image.name + (" (goes with the next question)" if is_waiting else ""))
        else:
            self._view.note("No picture was shown yet: /image PATH")

    def _system(self, argument: str) -> None:
        if argument:
            self.conversation.system = None if argument == "default" else argument
            self.prepare()
        self._view.note(f"System line: {self.conversation.system or DEFAULT_SYSTEM}")

    def _retry(self, argument: str) -> None:
        if self._settings["temp"] == 0:
            self._view.note("At temp 0 the answer is always the same; /set temp 0.7 makes it vary.")
        elif self._settings["seed"] is not None:
            self._view.note("With a seed the answer is always the same; /set seed none makes it vary.")
        self._answer(self.conversation.retry(**self._settings))

    def _undo(self, argument: str) -> None:
        turns = self.conversation.turns
        if shown := self._shown():
            self.conversation = self.conversation.branch(len(turns))
            self._view.note(f"Took back {_listed(shown)}.")
        elif turns:
            self._go_back(len(turns) - 1)
        else:
            raise OptionError("There is nothing to take back.")

    def _branch(self, argument: str) -> None:
        count = len(self.conversation.turns)
        if not count:
            raise OptionError("Nothing was said yet, so there is nothing to go back to.")
        if not argument.isdecimal() or int(argument) >= count:
            raise OptionError(
                f"Expected a number below {count}, of the answers to keep, as in /branch 0; see /history."
            )
        self._go_back(int(argument))

    def _go_back(self, count: int) -> None:
        """Keep `count` turns; the pictures of the next one wait for another question."""
        gone = self.conversation.turns[count]
        self.conversation = self.conversation.branch(count)
        self._view.note(f"Went back to before: {_shortened(gone.question)}")
        if gone.images:
            self.conversation.show(gone.images)
            self.prepare()

    def _clear(self, argument: str) -> None:
        self.conversation = self.conversation.branch(0)
        self._file, self._images_noticed = None, 0
        self._view.note("Everything said and shown is forgotten.")

    def _history(self, argument: str) -> None:
        for i, turn in enumerate(self.conversation.turns, start=1):
            names = f"[{_listed(turn.images)}] " if turn.images else ""
            self._view.note(f"{i}. {names}{turn.question}\n   {turn.answer}")
        if self._shown():
            self._view.note(f"Shown for the next question: {_listed(self._shown())}")
        elif not self.conversation.turns:
            self._view.note("Nothing was said yet.")

    def _save(self, argument: str) -> None:
        path = Path(file_name(argument)).expanduser() if argument else self._file
        path = path or Path(time.strftime("chat-%Y%m%d-%H%M%S.json"))
        if path != self._file and path.exists():
            raise OptionError(f"{path} exists already; choose another name.")
        self.conversation.save(path)
        self._file = path
        self._view.note(f"Saved {_counted(len(self.conversation.turns), 'question')} to {path}.")

    def _load_file(self, argument: str) -> None:
        if not argument:
            raise OptionError("Expected the file of a saved chat, as in /load chat.json.")
        path = Path(file_name(argument)).expanduser()
        self.conversation = self._load(path)
        self._file, self._images_noticed = path, 0
        self._view.note(f"Loaded {_counted(len(self.conversation.turns), 'question')} from {path}.")
        self.prepare()

    def _set(self, argument: str) -> None:
        if argument:
            name, value = parse_setting(argument)
            changed = {**self._settings, name: value}
            chosen = GenerationOptions(**changed)
            self.conversation.processor.images_at(chosen.resolution, chosen.fit)
            self._settings = changed
            self._view.note(f"{name} is {_setting(value)} now.")
            if name in _SIZE_SETTINGS:
                self.prepare()
        else:
            self._view.note("\n".join(f"{name} {_setting(value)}" for name, value in self._settings.items()))

    def _stats(self, argument: str) -> None:
        if self._last is not None:
            self._view.note(statistics(self._last))
            if self._prepared_last:
                milliseconds = self._prepared_last * 1e3
                self._view.note(f"Before the question: {milliseconds:.1f} ms of reading, not part of these times")
        used, limit = self.conversation.count_tokens(**self._settings), self.conversation.context_limit
        full = "; the oldest turns are left out" if used > limit else ""
        self._view.note(f"Context: {used} of {limit} tokens used{full}")

    def _help(self, argument: str) -> None:
        names = [argument.lstrip("/")] if argument else list(COMMANDS)
        if argument and names[0] not in COMMANDS:
            raise OptionError(f"There is no command /{names[0]}; /help lists them.")
        usages = {name: f"/{name} {COMMANDS[name].argument}".rstrip() for name in names}
        width = max(map(len, usages.values()))
        self._view.note("\n".join(f"{usages[name]:<{width}}  {COMMANDS[name].explanation}" for name in names))
        if not argument:
            self._view.note(KEYS_HELP)


def _listed(images: Sequence[ImageContent]) -> str:
    """Pictures as a note mentions them: by their files' names."""
    return ", ".join(image.name.rstrip("/").rpartition("/")[2] or image.name for image in images)


def _shortened(question: str) -> str:
    line = " ".join(question.split())
    return line if len(line) <= _SHOWN_LETTERS else line[: _SHOWN_LETTERS - 1] + "…"


def _setting(value: float | int | str | None) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _counted(count: int, one: str) -> str:
    return f"{count} {one}{'' if count == 1 else 's'}"
