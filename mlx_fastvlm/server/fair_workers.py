"""Threads for work that takes a while: clients take turns at them, so that one with much of it delays itself only."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

from mlx_fastvlm.server.fair_queue import FairQueue

T = TypeVar("T")


class FairWorkers:
    """So many threads. Used from one event loop. How much may wait is for the caller to bound.

    Args:
        count: of threads.
        name: of the threads, for whoever looks at a stuck server.
    """

    def __init__(self, count: int, name: str):
        self._free = count
        self._threads = ThreadPoolExecutor(count, thread_name_prefix=name)
        self._waiting: FairQueue[asyncio.Future[None]] = FairQueue(sys.maxsize)

    async def run(self, client: str, work: Callable[..., T], *args: Any) -> T:
        """`work(*args)` in a thread, once it is the client's turn. What is cancelled before is not begun."""
        await self._turn(client)
        loop = asyncio.get_running_loop()
        try:
            future = self._threads.submit(work, *args)
        except BaseException:  # the threads are closed
            self._pass_on()
            raise

        def done(_: Future[T]) -> None:  # later than the caller's cancellation: the thread is busy until then
            with suppress(RuntimeError):  # the loop is closed: nobody waits
                loop.call_soon_threadsafe(self._pass_on)

        future.add_done_callback(done)
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Take no more work; what is begun goes on."""
        self._threads.shutdown(wait=False)

    async def _turn(self, client: str) -> None:
        if self._free:
            self._free -= 1
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.put(client, turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._waiting.remove_if(lambda each: each is turn)
            else:  # it came at the same moment
                self._pass_on()
            raise

    def _pass_on(self) -> None:
        while self._waiting:
            turn = self._waiting.take()
            if not turn.done():  # or cancelled just now
                turn.set_result(None)
                return
        self._free += 1
