"""The chat's line editor: several lines, history across sessions, search, completion. The only user of prompt_toolkit."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import has_focus
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from mlx_fastvlm.cli.chat_completion import proposals

MAX_HISTORY_BYTES = 256 * 1024  # what a start leaves of an older, longer file

_PROMPT = [("bold", "> ")]
_CONTINUATION = "  "


class LineEditor:
    """Reads what a person enters.

    Args:
        history: the file to keep it in, across sessions; None keeps it for this one only.
    """

    def __init__(self, history: Path | None):
        self.history_error: str | None = None  # why the file cannot be used
        self._session: PromptSession[str] = PromptSession(
            message=_PROMPT,
            multiline=True,
            prompt_continuation=_CONTINUATION,
            history=self._open(history),
            completer=_Completer(),
            complete_while_typing=False,
            enable_suspend=True,
            key_bindings=_key_bindings(),
        )

    def read(self) -> str:
        """What is entered next.

        Raises:
            EOFError: Ctrl-D on an empty line.
            KeyboardInterrupt: Ctrl-C on an empty line; otherwise it clears the line.
        """
        return self._session.prompt()

    def _open(self, path: Path | None) -> History:
        if path is None:
            return InMemoryHistory()
        try:
            return open_history(path)
        except OSError as error:
            self.history_error = f"{path} cannot be used ({error.strerror or error}): history ends with this session."
            return InMemoryHistory()


def open_history(path: Path, max_bytes: int = MAX_HISTORY_BYTES) -> FileHistory:
    """History in a file that only its owner can read; of a longer one, the newest entries stay. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600))
    os.chmod(path, 0o600)
    content = path.read_bytes()
    if len(content) > max_bytes:
        _, mark, newest = content[-max_bytes:].partition(b"\n\n# ")  # a blank line and a time begin each entry
        _replace_private(path, mark + newest)
    return FileHistory(path)


def _replace_private(path: Path, content: bytes) -> None:
    """As `replace_file` does, but readable by the owner only."""
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(aside, path)
    except BaseException:
        os.unlink(aside)
        raise


class _Completer(Completer):
    """Tab."""

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        for proposal in proposals(document.text_before_cursor):
            yield Completion(
                proposal.text, -proposal.replaces, display=proposal.shown, display_meta=proposal.explanation
            )


def _key_bindings() -> KeyBindings:
    keys = KeyBindings()
    editing = has_focus(DEFAULT_BUFFER)  # not while searching

    @keys.add("enter", filter=editing)
    def _send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.complete_state and buffer.complete_state.current_completion:
            buffer.complete_state = None  # takes what the menu offers
        elif buffer.document.is_cursor_at_the_end and buffer.text.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter", filter=editing)
    @keys.add("c-j", filter=editing)
    def _begin_line(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    @keys.add("c-c", filter=editing)
    @keys.add("<sigint>", filter=editing)
    def _clear(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt)

    return keys
