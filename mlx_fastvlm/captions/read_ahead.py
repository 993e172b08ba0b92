"""Work on items in threads, some ahead of whoever needs the results: bounded, and stopped at once.

Not concurrent.futures: its threads are waited for when the interpreter ends, up to a minute for a download that hangs.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Any

_PATIENCE = 1.0  # seconds that closing waits for reads under way; those that take longer end by themselves


class ReadAhead:
    """Threads that call `read` on what they are given; results come in the order in which they are ready.

    Args:
        read: called in a thread with each item.
        threads: how many.
    """

    def __init__(self, read: Callable[[Any], Any], threads: int):
        self._read = read
        self._items: queue.SimpleQueue = queue.SimpleQueue()
        self._results: queue.SimpleQueue = queue.SimpleQueue()
        self._closed = threading.Event()
        self._threads = [
            threading.Thread(target=self._work, name="mlx_fastvlm_read", daemon=True) for _ in range(threads)
        ]
        self.pending = 0  # items given whose results were not taken
        for thread in self._threads:
            thread.start()

    def give(self, key: Any, item: Any) -> None:
        """Queue an item; `take` returns its result with `key`."""
        self.pending += 1
        self._items.put((key, item))

    def take(self, wait: bool) -> tuple[Any, Any] | None:
        """A key and what `read` returned, or the exception that it raised; None where nothing is ready or pending.

        Args:
            wait: for a result, if one is pending.
        """
        if not self.pending:
            return None
        try:
            result = self._results.get(block=wait)
        except queue.Empty:
            return None
        self.pending -= 1
        return result

    def close(self) -> None:
        """Begin nothing more and end the threads."""
        self._closed.set()
        for _ in self._threads:
            self._items.put(None)
        until = time.monotonic() + _PATIENCE
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    def __enter__(self) -> ReadAhead:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _work(self) -> None:
        while (given := self._items.get()) is not None and not self._closed.is_set():
            key, item = given
            try:
                result = self._read(item)
            except BaseException as error:  # whatever it is, it is the taker's to judge
                result = error
            self._results.put((key, result))
