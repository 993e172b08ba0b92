"""The keyboard while the chat works and does not read it: Ctrl-C stops the work, other keys wait for the next prompt."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

_TERMINATED = 128 + signal.SIGTERM  # exit code of a program that SIGTERM ended


class StopRequest:
    """Whether Ctrl-C was pressed while an answer came.

    Attributes:
        pressed: it was, and the answer should end with the token that it is at.
        waits: whether Ctrl-C only sets `pressed`, because tokens come and soon ask for it. Until then it raises
            KeyboardInterrupt, which ends a long wait for the first token as soon as Python has control again.
    """

    def __init__(self) -> None:
        self.pressed = False
        self.waits = False

    def press(self, number: int, frame: object) -> None:
        """The signal handler."""
        if not self.waits:
            raise KeyboardInterrupt
        self.pressed = True


@contextmanager
def stop_on_ctrl_c() -> Iterator[StopRequest]:
    """Ctrl-C as a wish that is met between two tokens, so that nothing is left half done."""
    request = StopRequest()
    before = signal.signal(signal.SIGINT, request.press)
    try:
        yield request
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def leave_on_sigterm() -> Iterator[None]:
    """SIGTERM ends the chat, not only the answer: it raises SystemExit, which passes through an event loop too."""

    def leave(number: int, frame: object) -> NoReturn:
        sys.exit(_TERMINATED)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def keys_kept_for_later() -> Iterator[None]:
    """What is typed while nothing reads it is not echoed into the output, and is there for the next prompt."""
    import termios  # only where there is a terminal

    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    quiet = termios.tcgetattr(terminal)
    # The line editor, too, takes Enter as \r; Ctrl-C and Ctrl-Z stay signals.
    quiet[0] &= ~termios.ICRNL
    quiet[3] &= ~(termios.ECHO | termios.ICANON)
    termios.tcsetattr(terminal, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)
