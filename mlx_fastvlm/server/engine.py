"""The thread that answers: it alone runs the model, for many requests at once, and hands their tokens to asyncio.

Requests wait in a fair queue. Between two steps of the running answers one new prompt is run through the decoder, less
what earlier requests left of it. Knows nothing of HTTP but the errors that clients are told.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import mlx.core as mx

from mlx_fastvlm.answer import GenerationResponse, StageClock
from mlx_fastvlm.batch_generate import ENCODE_PIXELS, BatchGenerator
from mlx_fastvlm.errors import FastVLMError
from mlx_fastvlm.image_content import ImageContent
from mlx_fastvlm.image_processing import ImageProcessor
from mlx_fastvlm.kernels import cpu
from mlx_fastvlm.model import FastVLM
from mlx_fastvlm.processor import Processor
from mlx_fastvlm.reuse import Reuse
from mlx_fastvlm.server.api_errors import ApiError, from_library, internal, stopping
from mlx_fastvlm.server.fair_queue import FairQueue
from mlx_fastvlm.server.job import Job, Question
from mlx_fastvlm.server.limits import Limits
from mlx_fastvlm.server.metrics import ModelMetrics

_FAILED_STEPS = 3  # in a row: then the model itself is at fault, not a request

_log = logging.getLogger(__name__)


class Engine:
    """Answers questions in a thread of its own, from `start` to `stop`.

    Args:
        model, processor: from `load`; nobody else runs them meanwhile.
        limits: how many at once, how many wait, how long.
        metrics: is told what happens.
        turn: engines that share one run their models one at a time, step by step.

    Attributes:
        failure: why no answers can be had any more; None as long as they can.
    """

    def __init__(
        self,
        model: FastVLM,
        processor: Processor,
        limits: Limits,
        metrics: ModelMetrics,
        *,
        turn: AbstractContextManager | None = None,
    ):
        self.failure: str | None = None
        self._model, self._processor, self._limits, self._metrics = model, processor, limits, metrics
        self._turn = nullcontext() if turn is None else turn
        self._changed = threading.Condition()  # guards the queue and the two below
        self._queue: FairQueue[Job] = FairQueue(limits.max_queue)
        self._closed = False  # takes no more
        self._stop_at: float | None = None  # on the monotonic clock
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        # The thread's own:
        self._running: dict[int, Job] = {}  # by ticket
        self._failed_steps = 0

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def submit(self, client: str, question: Question, clock: StageClock) -> Job:
        """Let a question wait for its answer. From asyncio's thread.

        Args:
            client: who asks; clients take turns.
            question: what is asked.
            clock: has run since the request came.

        Raises:
            ApiError: there is no room (429), or the engine stops (503) or has failed (500).
        """
        job = Job(question, clock, time.monotonic() + self._limits.max_seconds)
        with self._changed:
            self._check_open()
            turned_away = self._queue.put(client, job)
            self._changed.notify()
        if turned_away is job:
            raise _no_room(self._limits)
        if turned_away is not None:
            self._fail(turned_away, _no_room(self._limits))
        return job

    def close(self) -> None:
        """Take no more questions, and send those away that wait; running answers go on."""
        with self._changed:
            self._closed = True
            waiting = self._queue.remove_if(lambda job: True)
        for job in waiting:
            self._fail(job, stopping())

    def stop(self, grace_seconds: float) -> None:
        """`close`, let running answers go on for so many seconds, break off the rest, and end the thread."""
        self.close()
        with self._changed:
            self._stop_at = time.monotonic() + grace_seconds
            self._changed.notify()
        self._thread.join()

    def _check_open(self) -> None:
        if self.failure is not None:
            raise internal(self.failure)
        if self._closed:
            raise stopping()

    def _run(self) -> None:
        last_words = stopping
        try:
            with self._turn:
                self._load_loops()
                self._reuse = Reuse(self._model, self._processor)
                self._generator = self._new_generator()
            while self._wait_for_work():
                with self._turn:
                    self._drop_unwanted()
                    if self._begin_next():
                        self._report_load()
                        self._step()  # its first token is out before the others go on
                    self._step()
                self._report_load()
        except BaseException:
            _log.exception("The engine has failed.")
            self.failure = "The model has failed; the server's log says why. Restart the server."
            last_words = self._failed
        finally:
            self.close()
            self._fail_running(last_words)

    def _report_load(self) -> None:
        self._metrics.load(len(self._queue), len(self._running))

    def _load_loops(self) -> None:
        """What a small model on a CPU does without in a short process; for many answers it is well worth half a second."""
        if mx.default_device().type == mx.DeviceType.cpu:
            cpu.warm_up(quantized=self._model.config.quantization is not None)

    def _new_generator(self) -> BatchGenerator:
        return BatchGenerator(self._model, self._processor, max_rows=self._limits.max_batch)

    def _wait_for_work(self) -> bool:
        """Sleep while there is nothing to do. False when it is time to end."""
        with self._changed:
            while not self._queue and not self._running and self._stop_at is None:
                self._changed.wait()
            if self._stop_at is None:
                return True
            return bool(self._running) and time.monotonic() < self._stop_at

    def _drop_unwanted(self) -> None:
        """Make room where nobody waits any more, or for too long."""
        with self._changed:
            unwanted = self._queue.remove_if(lambda job: job.cancelled or job.is_late)
        for job in unwanted:
            self._fail(job, _too_late(self._limits))
        for ticket, job in list(self._running.items()):
            if not (job.cancelled or job.is_late):
                continue
            self._generator.remove(ticket)
            del self._running[ticket]
            if job.cancelled:
                self._metrics.unanswered("cancelled")
            else:
                self._end_early(job)

    def _end_early(self, job: Job) -> None:
        """An answer whose time is over ends as one that is as long as it may be."""
        if job.last is None:
            self._fail(job, _too_late(self._limits))
        else:
            self._deliver(job, dataclasses.replace(job.last, text="", logprobs=None, finish_reason="length"))

    def _begin_next(self) -> bool:
        """Run one waiting prompt through the decoder, if there is a place for its answer. Whether one will be answered."""
        if len(self._running) >= self._limits.max_batch:
            return False
        with self._changed:
            if not self._queue:
                return False
            job = self._queue.take()
            others = self._queue.upcoming(self._limits.max_batch - len(self._running) - 1)
        job.clock.lap("wait")
        try:
            self._encode_together(job, others)
            self._running[self._prefill(job)] = job
            return True
        except FastVLMError as error:
            self._fail(job, from_library(error))
        except Exception:  # one request's trouble is not the others'
            _log.exception("A prompt could not be prefilled.")
            self._fail(job, internal())
        return False

    def _encode_together(self, job: Job, others: Sequence[Job]) -> None:
        """Encode a job's image along with those of the jobs that come next, where several small ones take less time so.

        What is left out here, or fails, is encoded with its own prompt.
        """
        group = [(job, *image) for job in (job, *others) for image in self._new_images(job)]
        if not group or group[0][0] is not job:
            return
        width, height = size = group[0][1].size
        group = [each for each in group if each[1].size == size][: ENCODE_PIXELS // (width * height)]
        images = list(dict.fromkeys((image, processor) for _, image, processor in group))  # one may be shown twice
        if len(images) < 2:
            return
        jobs = {id(each): each for each, *_ in group}.values()
        for each in jobs:
            each.clock.lap("wait")
        try:
            self._reuse.features.encode_together(images)
        except FastVLMError:
            return  # the prompt it belongs to will fail alone
        for each in jobs:
            each.clock.lap("encode")

    def _new_images(self, job: Job) -> list[tuple[ImageContent, ImageProcessor]]:
        """A question's images that are to be encoded, with how they are prepared."""
        options, features = job.question.options, self._reuse.features
        processor = self._processor.images_at(options.resolution, options.fit)
        return [(image, processor) for image in job.question.images if not features.has(image, processor)]

    def _prefill(self, job: Job) -> int:
        """The ticket of an answer that begins with the next step."""
        question = job.question
        with self._reuse.prefilled(question.input_ids, question.images, question.options, job.clock) as prompt:
            pass  # what was computed is kept at once, for requests that come while this one is answered
        job.positions = prompt.positions
        self._metrics.kept(self._reuse.features.nbytes, self._reuse.prefixes.nbytes)
        return self._generator.add_prefilled(prompt, options=question.options, clock=job.clock, draw=question.draw)

    def _step(self) -> None:
        """The first token of an answer that begins, or one for every answer; with none left, what they took is freed."""
        try:
            events = self._generator.step()
            self._failed_steps = 0
        except Exception:
            self._failed_steps += 1
            if self._failed_steps == _FAILED_STEPS:
                raise
            _log.exception("A step has failed; its answers are broken off.")
            self._fail_running(internal)
            self._generator = self._new_generator()
            return
        for ticket, event in events:
            self._take(ticket, event)
        if events and not self._running:
            self._generator.step()

    def _take(self, ticket: int, event: GenerationResponse | Exception) -> None:
        """One answer's token, or why it has none."""
        job = self._running[ticket]
        if isinstance(event, Exception):
            del self._running[ticket]
            is_known = isinstance(event, FastVLMError)
            self._fail(job, from_library(event) if is_known else internal())
            return
        job.positions.append(event.token)
        self._deliver(job, event)
        if event.finish_reason is not None:
            del self._running[ticket]
            self._keep(ticket, job)

    def _keep(self, ticket: int, job: Job) -> None:
        """What the decoder saw of an answer, for a later question in the same conversation."""
        try:
            cache = self._generator.caches(ticket)
            seen = min(len(job.positions), cache[0].offset)  # not the last token drawn
            self._reuse.prefixes.keep(job.positions[:seen], cache)
        except Exception:  # the answer is out, and later ones can do without
            _log.exception("What an answer left could not be kept.")

    def _deliver(self, job: Job, response: GenerationResponse) -> None:
        job.last = response
        job.put(response)
        if response.finish_reason is not None:
            self._metrics.answered(response, job.clock.total(), bool(job.question.images))

    def _fail(self, job: Job, error: ApiError) -> None:
        outcome = "cancelled" if job.cancelled else "failed" if error.status >= 500 else "refused"
        self._metrics.unanswered(outcome)
        job.put(error)

    def _fail_running(self, make_error: Callable[[], ApiError]) -> None:
        for job in self._running.values():
            self._fail(job, make_error())
        self._running.clear()

    def _failed(self) -> ApiError:
        return internal(self.failure)


def _no_room(limits: Limits) -> ApiError:
    return ApiError(
        429, f"{limits.max_queue} requests are waiting and there is no room for this one; try later.", code="queue_full"
    )


def _too_late(limits: Limits) -> ApiError:
    return ApiError(
        503, f"The request waited for more than {limits.max_seconds:g} s without an answer; try later.", code="timeout"
    )
