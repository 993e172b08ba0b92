"""What the engine does when clients leave, crowd or wait too long, when the model fails, and when it is told to stop."""

import asyncio
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from mlx_fastvlm import generate, load
from mlx_fastvlm.answer import StageClock
from mlx_fastvlm.batch_generate import BatchGenerator
from mlx_fastvlm.model import FastVLM
from mlx_fastvlm.options import GenerationOptions
from mlx_fastvlm.reuse import Reuse
from mlx_fastvlm.server.limits import Limits
from mlx_fastvlm.token_draw import make_draw
from tests.live_server import SlowSteps, example, long_answer, openai_or_skip, serving, user, wait_until

openai = openai_or_skip()

from mlx_fastvlm.server.engine import Engine  # noqa: E402
from mlx_fastvlm.server.fair_lock import FairLock  # noqa: E402
from mlx_fastvlm.server.job import Question  # noqa: E402
from mlx_fastvlm.server.metrics import Metrics  # noqa: E402


@pytest.fixture(scope="module")
def demo():
    return load("demo")


@pytest.fixture
def slow(monkeypatch):
    """Steps that wait until they are let go."""
    steps = SlowSteps()
    steps.install(monkeypatch)
    return steps


def stream_of(http, items):
    body = {"model": "demo", "messages": [user("Hello")], "stream": True, **long_answer(items)}
    return http.stream("POST", "/v1/chat/completions", json=body)


def test_a_client_that_leaves_frees_its_place(demo, slow):
    slow.seconds = 0.02
    slow.may_go.set()
    with serving(*demo, limits=Limits(max_batch=1)) as live:
        with live.http() as http, stream_of(http, items=100) as response:
            lines = response.iter_lines()
            next(lines)
            live.wait_for("requests_running", 1)
        live.wait_for('requests_total{outcome="cancelled"}', 1)
        live.wait_for("requests_running", 0)
        assert live.ask("Hello", max_tokens=2).usage.completion_tokens <= 2


def test_a_client_that_does_not_stream_or_still_waits_may_leave_too(demo, slow):
    with serving(*demo, limits=Limits(max_batch=1)) as live:
        impatient = live.openai().with_options(timeout=0.3)
        with ThreadPoolExecutor(2) as pool:
            asked = [
                pool.submit(
                    impatient.chat.completions.create, model="demo", messages=[user("Hello")], **long_answer(100)
                )
                for _ in range(2)
            ]
        assert all(isinstance(one.exception(), openai.APITimeoutError) for one in asked)
        slow.may_go.set()
        live.wait_for('requests_total{outcome="cancelled"}', 2)
        live.wait_for("requests_running", 0)


def test_a_full_queue_says_when_to_come_back(demo, slow):
    with serving(*demo, limits=Limits(max_batch=1, max_queue=1)) as live, ThreadPoolExecutor(2) as pool:
        try:
            running = pool.submit(live.ask, "Hello", max_tokens=2)
            wait_until(lambda: live.engine._running, "the first request does not run")
            waiting = pool.submit(live.ask, "Hello", max_tokens=2)
            wait_until(lambda: live.engine._queue, "the second request does not wait")
            with pytest.raises(openai.RateLimitError) as caught:
                live.ask("Hello", max_tokens=2)
            assert caught.value.code == "queue_full"
            assert int(caught.value.response.headers["Retry-After"]) >= 1
        finally:
            slow.may_go.set()
        assert running.result().usage.completion_tokens <= 2
        assert waiting.result().usage.completion_tokens <= 2


def test_one_clients_many_requests_do_not_keep_another_waiting(demo, slow):
    finished = []

    def ask(live, name):
        live.ask("Hello", max_tokens=2, user=name)
        finished.append(name)

    with serving(*demo, limits=Limits(max_batch=1)) as live, ThreadPoolExecutor(8) as pool:
        try:
            for count in range(6):
                pool.submit(ask, live, "greedy")
                wait_until(lambda c=count: len(live.engine._queue) + bool(live.engine._running) > c, "it is not there")
            pool.submit(ask, live, "modest")
            wait_until(lambda: len(live.engine._queue) == 6, "the last one does not wait")
        finally:
            slow.may_go.set()
    # One of the greedy is decoded, one has its turn; the others come later.
    assert finished.index("modest") <= 2 + 1  # replies may overtake each other by one
    assert len(finished) == 7


def test_an_answer_that_takes_too_long_ends_with_what_there_is(demo, slow):
    slow.seconds = 0.05
    slow.may_go.set()
    with serving(*demo, limits=Limits(max_seconds=0.5)) as live:
        answer = live.ask("Hello", **long_answer(100))
        assert answer.choices[0].finish_reason == "length"
        assert answer.choices[0].message.content.startswith("[")
        assert 0 < answer.usage.completion_tokens < 100


def test_a_request_that_waits_too_long_may_come_again(demo, slow):
    with serving(*demo, limits=Limits(max_batch=1, max_seconds=1)) as live, ThreadPoolExecutor(2) as pool:
        try:
            first = pool.submit(live.ask, "Hello", **long_answer(100))
            wait_until(lambda: live.engine._running, "the first request does not run")
            second = pool.submit(live.ask, "Hello")
            wait_until(lambda: live.engine._queue, "the second request does not wait")
            time.sleep(1)
        finally:
            slow.may_go.set()
        assert first.result().choices[0].finish_reason == "length"
        error = second.exception()
        assert error.status_code == 503
        assert error.code == "timeout"
        assert error.response.headers["Retry-After"]


def test_a_step_that_fails_costs_its_answers_only(demo, monkeypatch):
    class OnceBroken(BatchGenerator):
        fails = True

        def step(self, hurry=False):
            if OnceBroken.fails:
                OnceBroken.fails = False
                raise RuntimeError("out of memory")
            return super().step(hurry)

    monkeypatch.setattr("mlx_fastvlm.server.engine.BatchGenerator", OnceBroken)
    with serving(*demo) as live:
        with pytest.raises(openai.InternalServerError, match="log says why") as caught:
            live.ask("Hello")
        assert "memory" not in str(caught.value)
        assert live.ask("Hello", max_tokens=2).usage.completion_tokens <= 2
        assert live.http().get("/health").status_code == 200
        assert live.figures()['requests_total{outcome="failed"}'] == 1


def test_a_prompt_that_fails_costs_its_own_answer_only(demo, monkeypatch):
    with serving(*demo) as live:
        with monkeypatch.context() as patch:
            patch.setattr(Reuse, "_prefill", lambda *args: 1 / 0)
            for _ in range(5):
                with pytest.raises(openai.InternalServerError):
                    live.ask("Hello")
        assert live.ask("Hello", max_tokens=2).usage.completion_tokens <= 2


def test_a_model_that_keeps_failing_is_reported(demo, monkeypatch):
    monkeypatch.setattr(BatchGenerator, "step", lambda self, hurry=False: 1 / 0)
    with serving(*demo) as live:
        for _ in range(4):
            with pytest.raises(openai.InternalServerError) as caught:
                live.ask("Hello")
        assert "Restart the server" in str(caught.value)
        health = live.http().get("/health")
        assert health.status_code == 503
        assert health.json()["status"] == "failed"


def test_a_server_that_stops_lets_running_answers_end(demo, slow):
    slow.seconds = 0.01
    slow.may_go.set()
    with serving(*demo, grace_seconds=20) as live, live.http() as http:
        with stream_of(http, items=10) as response:
            lines = response.iter_lines()
            next(lines)
            live.server.should_exit = True
            assert list(filter(None, lines))[-1] == "data: [DONE]"
        wait_until(lambda: not live.engine._thread.is_alive(), "the engine has not ended")


def test_a_server_that_stops_tells_clients_whose_answers_break_off(demo, slow):
    slow.seconds = 0.1
    slow.may_go.set()
    with serving(*demo, limits=Limits(max_batch=1), grace_seconds=0.3) as live, ThreadPoolExecutor(1) as pool:
        stream = live.ask("Hello", stream=True, **long_answer(100))
        next(stream)
        waiting = pool.submit(live.ask, "Hello")
        wait_until(lambda: live.engine._queue, "the second request does not wait")
        start = time.monotonic()
        live.server.should_exit = True
        with pytest.raises(openai.APIError, match="stopping"):
            list(stream)
        assert time.monotonic() - start < 10
        with pytest.raises(openai.InternalServerError) as caught:  # the client's class for 503
            waiting.result()
        assert caught.value.status_code == 503


def test_a_form_that_takes_long_to_compile_keeps_no_other_answer_waiting(demo, monkeypatch):
    begun, compiled = threading.Event(), threading.Event()

    def make_slowly(processor, options):
        begun.set()
        compiled.wait(30)
        return make_draw(processor, options)

    monkeypatch.setattr("mlx_fastvlm.server.reader.make_draw", make_slowly)
    with serving(*demo) as live, ThreadPoolExecutor(1) as pool:
        slow = pool.submit(live.ask, "Hello", **long_answer(2))
        assert begun.wait(30)
        assert live.ask("Hello", max_tokens=2).usage.completion_tokens <= 2
        assert not slow.done()
        compiled.set()
        assert json.loads(slow.result().choices[0].message.content)


def test_a_form_that_cannot_be_followed_is_the_clients_mistake(demo):
    form = {"type": "json_schema", "json_schema": {"name": "none", "schema": {"type": "unheard of"}}}
    with serving(*demo) as live:
        with pytest.raises(openai.BadRequestError, match="schema"):
            live.ask("Hello", response_format=form)
        assert live.ask("Hello", max_tokens=2).usage.completion_tokens <= 2


def test_a_client_with_a_hundred_requests_delays_anothers_one_by_few_answers(demo, slow):
    asked, order = 100, []
    engine_take = Engine._deliver

    def deliver(self, job, response):
        if response.finish_reason is not None:
            order.append(job.question.options.max_tokens)
        engine_take(self, job, response)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "_deliver", deliver)
        limits = Limits(max_batch=4, max_queue=asked + 1)
        with serving(*demo, limits=limits) as live, ThreadPoolExecutor(asked + 1) as pool:
            try:
                sent = [pool.submit(live.ask, "Hello", max_tokens=3, user="greedy") for _ in range(asked)]
                wait_until(lambda: len(live.engine._queue) + len(live.engine._running) == asked, "not all wait", 60)
                sent.append(pool.submit(live.ask, "Hello", max_tokens=2, user="modest"))
                wait_until(lambda: "modest" in str(live.engine._queue._by_client), "the last one does not wait")
            finally:
                slow.may_go.set()
            assert all(one.result().usage.completion_tokens for one in sent)
    assert len(order) == asked + 1
    assert order.index(2) <= 2 * limits.max_batch  # those that were being answered, and one of the greedy's per turn


def test_two_models_behind_one_server_do_not_run_at_once(demo, monkeypatch):
    turn, running, overlaps = FairLock(), [], []

    class Watched(BatchGenerator):
        def step(self, hurry=False):
            running.append(self)
            overlaps.append(len(running))
            time.sleep(0.005)
            try:
                return super().step(hurry)
            finally:
                running.remove(self)

    monkeypatch.setattr("mlx_fastvlm.server.engine.BatchGenerator", Watched)

    async def ask_both():
        engines = [Engine(*demo, Limits(), Metrics().of("demo"), turn=turn) for _ in range(2)]
        for engine in engines:
            engine.start()
        question = Question(demo[1].tokenize("Hello", 0), [], GenerationOptions(max_tokens=20))
        jobs = [engine.submit("client", question, StageClock()) for engine in engines for _ in range(2)]
        answers = []
        for job in jobs:
            answers.append([response.token async for response in job.rest(await job.next())])
        for engine in engines:
            await asyncio.to_thread(engine.stop, 0)
        return answers

    answers = asyncio.run(ask_both())
    assert all(answer == answers[0] for answer in answers)
    assert len(overlaps) > 8 and set(overlaps) == {1}


def test_images_that_wait_together_are_encoded_together(demo, slow, monkeypatch):
    names = ["shapes-two.png", "shapes-three.png", "shapes-wide.png"]
    asked = [("Describe this image.", example(name)) for name in names] + [("What is it?", example(names[0]))]
    sizes = []
    encode = FastVLM.encode_images
    monkeypatch.setattr(FastVLM, "encode_images", lambda self, x: sizes.append(len(x)) or encode(self, x))
    expected = [generate(*demo, question, image, max_tokens=8) for question, image in asked]
    sizes.clear()
    with serving(*demo) as live, ThreadPoolExecutor(5) as pool:
        try:
            running = pool.submit(live.ask, "Hello", max_tokens=2)
            wait_until(lambda: live.engine._running, "the first request does not run")
            told = [pool.submit(live.ask, question, image, max_tokens=8) for question, image in asked]
            wait_until(lambda: len(live.engine._queue) == len(asked), "not all wait")
        finally:
            slow.may_go.set()
        assert running.result()
        answers = [one.result() for one in told]
        figures = live.figures()
    assert [answer.choices[0].message.content for answer in answers] == expected
    assert sizes == [3]  # one picture is shown twice
    assert figures["encoded_requests_total"] == len(asked)
