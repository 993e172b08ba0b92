"""A lock that goes to whoever has waited longest: a plain one may go to the same thread again and again."""

from __future__ import annotations

import threading
from collections import deque


class FairLock:
    """For `with`, from any thread; not to be entered twice by one."""

    def __init__(self) -> None:
        self._guard = threading.Lock()  # of the two below
        self._waiting: deque[threading.Event] = deque()
        self._taken = False

    def __enter__(self) -> None:
        with self._guard:
            if not self._taken:
                self._taken = True
                return
            turn = threading.Event()
            self._waiting.append(turn)
        turn.wait()

    def __exit__(self, *_: object) -> None:
        with self._guard:
            if self._waiting:
                self._waiting.popleft().set()  # it stays taken
            else:
                self._taken = False
