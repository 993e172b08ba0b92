"""How requests are read: clients take turns at decoding too, and what is too large is not decoded at all."""

import asyncio
import io
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import PIL.ExifTags
import PIL.Image
import pytest

from mlx_fastvlm import load
from mlx_fastvlm.server.fair_lock import FairLock
from mlx_fastvlm.server.fair_workers import FairWorkers
from mlx_fastvlm.server.limits import Limits
from tests.live_server import data_url, example, openai_or_skip, serving, user, wait_until

openai = openai_or_skip()

EXIF = PIL.Image.Exif()
EXIF[PIL.ExifTags.Base.Orientation] = 6


@pytest.fixture(scope="module")
def demo():
    return load("demo")


@pytest.fixture
def workers():
    made = FairWorkers(1, "test")
    yield made
    made.close()


def picture(width: int, height: int, kind: str = "PNG", **settings) -> bytes:
    file = io.BytesIO()
    PIL.Image.new("RGB", (width, height), "red").save(file, kind, **settings)
    return file.getvalue()


def test_a_client_with_much_work_delays_itself_only(workers):
    done, may_end = [], threading.Event()

    async def crowd():
        first = asyncio.create_task(workers.run("greedy", may_end.wait, 10))
        greedy = [asyncio.create_task(workers.run("greedy", done.append, f"greedy {i}")) for i in range(4)]
        await asyncio.sleep(0)  # all of them wait
        modest = [asyncio.create_task(workers.run("modest", done.append, f"modest {i}")) for i in range(2)]
        await asyncio.sleep(0)
        may_end.set()
        await asyncio.gather(first, *greedy, *modest)

    asyncio.run(crowd())
    assert done == ["greedy 0", "modest 0", "greedy 1", "modest 1", "greedy 2", "greedy 3"]


def test_no_more_work_at_once_than_there_are_threads():
    workers, at_once, most, lock = FairWorkers(2, "test"), 0, 0, threading.Lock()

    def work():
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
        time.sleep(0.02)
        with lock:
            at_once -= 1

    async def crowd():
        await asyncio.gather(*(workers.run(str(i % 3), work) for i in range(9)))

    asyncio.run(crowd())
    workers.close()
    assert most == 2


def test_work_that_fails_or_is_not_wanted_any_more_makes_room(workers):
    may_end, done = threading.Event(), []

    async def crowd():
        running = asyncio.create_task(workers.run("a", may_end.wait, 10))
        await asyncio.sleep(0)
        unwanted = asyncio.create_task(workers.run("b", done.append, "unwanted"))
        failing = asyncio.create_task(workers.run("b", lambda: 1 / 0))
        last = asyncio.create_task(workers.run("b", done.append, "last"))
        await asyncio.sleep(0)
        unwanted.cancel()
        running.cancel()  # the thread goes on, and its place is not free before it ends
        await asyncio.sleep(0.05)
        assert done == [] and not last.done()
        assert len(workers._waiting) == 2  # what is not wanted does not wait any more
        may_end.set()
        with pytest.raises(ZeroDivisionError):
            await failing
        await last
        assert await workers.run("c", sum, [1, 2]) == 3

    asyncio.run(crowd())
    assert done == ["last"]


def test_a_lock_goes_to_whoever_waited_longest():
    lock, order, ready = FairLock(), [], threading.Barrier(2)

    def work(name):
        ready.wait(10)
        for _ in range(20):
            with lock:
                order.append(name)
                time.sleep(0.002)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, "ab"))
    assert sorted(order) == sorted("ab" * 20)
    assert not any(len(set(order[i : i + 2])) == 1 for i in range(4, 34))  # but for the beginning and the end


def waiting(live) -> int:
    """Pictures that wait for their turn."""
    pictures, *_ = live.server.config.app.state.workers
    return len(pictures._decoders._waiting)


def test_others_are_read_while_one_client_sends_many_pictures(demo, monkeypatch):
    may_go, begun = threading.Event(), []
    from mlx_fastvlm.server import pictures

    def slow_open(source, **settings):
        opened = open_image(source, **settings)
        begun.append(opened.size)
        may_go.wait(30)
        time.sleep(0.1)  # else one thread may do two before the other has begun with its own
        return opened

    open_image = pictures.open_image
    monkeypatch.setattr(pictures, "open_image", slow_open)
    answered = []

    def ask(live, name, *images):
        live.ask("Hello", *images, max_tokens=1, user=name)
        answered.append(name)

    with serving(*demo) as live, ThreadPoolExecutor(12) as pool:
        try:
            for count in range(8):
                pool.submit(ask, live, "greedy", picture(100 + count, 100))
                wait_until(lambda c=count: len(begun) + waiting(live) > c, "it is not there")
            ask(live, "writes")  # words need no turn at decoding
            pool.submit(ask, live, "modest", picture(300, 300))
            wait_until(lambda: waiting(live) == 7, "the last one does not wait")
        finally:
            may_go.set()
    assert answered[0] == "writes"
    assert len(answered) == 10
    assert begun.index((300, 300)) <= 3  # two were being decoded; of those that wait it is one of the next two


def test_a_client_that_leaves_while_its_pictures_wait_is_not_read(demo, monkeypatch):
    from mlx_fastvlm.server import pictures

    may_go, begun = threading.Event(), []

    def slow_open(source, **settings):
        begun.append(source)
        may_go.wait(30)
        return open_image(source, **settings)

    open_image = pictures.open_image
    monkeypatch.setattr(pictures, "open_image", slow_open)
    with serving(*demo) as live:
        impatient = live.openai().with_options(timeout=0.5)
        try:
            with pytest.raises(openai.APITimeoutError):
                impatient.chat.completions.create(
                    model="demo", messages=[user("Hello", *(picture(50, 50 + i) for i in range(8)))]
                )
        finally:
            may_go.set()
        assert live.ask("Hello", example("word.png"), max_tokens=1).choices
        assert len(begun) == 2  # the first of eight, and the other client's


def test_too_large_a_picture_is_refused_by_its_header(demo, monkeypatch):
    monkeypatch.setattr("mlx_fastvlm.server.pictures.open_image", lambda *args, **settings: pytest.fail("decoded"))
    with serving(*demo, limits=Limits(max_image_mp=0.01)) as live:
        with pytest.raises(openai.BadRequestError, match="101x100 pixels; this server takes 0.01 megapixels") as caught:
            live.ask("Hello", picture(101, 100))
        assert caught.value.param == "messages[0].content[1].image_url.url"
        for file in (
            picture(5000, 5000, exif=EXIF),
            picture(5000, 5000, kind="JPEG"),
            picture(5000, 5000, kind="BMP")[:2000],
        ):
            with monkeypatch.context() as patch:
                patch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
                with pytest.raises(openai.BadRequestError, match="5000x5000"):
                    live.ask("Hello", file)


def test_a_picture_as_large_as_may_be_is_taken(demo):
    with serving(*demo, limits=Limits(max_image_mp=0.01)) as live:
        assert live.ask("Hello", data_url(picture(100, 100)), max_tokens=1).choices
