"""Captions of many images: those that `generate` gives, in order, whatever fails; reading bounded, and stopped at once."""

import io
import itertools
import threading
import time

import numpy as np
import pytest
from PIL import Image

from mlx_fastvlm import batch_generate, generate, load
from mlx_fastvlm.captions import captioning
from mlx_fastvlm.captions.captioning import Caption, caption_images
from mlx_fastvlm.captions.read_ahead import ReadAhead
from mlx_fastvlm.errors import ImageError, OptionError
from tests.conftest import GOLDEN
from training import scenes
from training.evaluate_embedded import TEST_SEEDS

LANDSCAPE, PORTRAIT = (GOLDEN / "images" / f"{name}.png" for name in ("landscape", "portrait"))


@pytest.fixture(scope="module")
def demo():
    return load("demo")


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert not reading_threads()


def reading_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("mlx_fastvlm_read")]


@pytest.fixture(scope="module")
def described(demo):
    """Pictures, and what `generate` says of each."""
    images = [scenes.render(scenes.make_scene(TEST_SEEDS + 30_000 + index)) for index in range(10)]
    return images, [generate(*demo, "Describe this image.", image=image) for image in images]


@pytest.mark.parametrize("batch_size, threads", [(1, 1), (3, 2), (16, None)])
def test_captions_are_what_generate_says_of_each_image(batch_size, threads, demo, described):
    images, texts = described
    captions = list(caption_images(*demo, images, batch_size=batch_size, threads=threads))
    assert [caption.index for caption in captions] == list(range(len(images)))
    assert all(caption.image is image for caption, image in zip(captions, images, strict=True))
    assert [caption.text for caption in captions] == texts
    assert len({caption.text for caption in captions}) > 5
    assert {(caption.error, caption.finish_reason) for caption in captions} == {(None, "stop")}


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": 4},
        {"temp": 1.2, "seed": 5, "max_tokens": 9},
        {"stop": [" "], "system": "Be brief.", "repetition_penalty": 1.3, "max_tokens": 8},
    ],
)
def test_options_are_those_of_generate(options, tiny):
    images = [LANDSCAPE, PORTRAIT, str(LANDSCAPE), PORTRAIT.read_bytes()]
    captions = list(caption_images(*tiny, images, "What is <image> here?", **options))
    assert [c.text for c in captions] == [
        generate(*tiny, "What is <image> here?", image, **options) for image in images
    ]
    assert all(caption.generation_tokens <= options["max_tokens"] for caption in captions)
    assert all(caption.prompt_tokens > tiny[0].config.vision_config.num_image_tokens for caption in captions)


def test_whatever_names_or_makes_an_image_is_taken_and_read_in_a_thread(tiny):
    readers = set()

    def make():
        readers.add(threading.current_thread())
        return Image.open(PORTRAIT)

    images = [str(PORTRAIT), PORTRAIT, PORTRAIT.read_bytes(), io.BytesIO(PORTRAIT.read_bytes()), make, make]
    images.append(np.asarray(Image.open(PORTRAIT).convert("RGB")))
    captions = list(caption_images(*tiny, iter(images), max_tokens=5))
    assert len(captions) == 7 and len({caption.text for caption in captions}) == 1
    assert captions[4].image is make
    assert readers and threading.main_thread() not in readers


def test_an_image_that_cannot_be_read_has_an_error_in_its_place(tiny):
    def fails():
        raise ImageError("page 3 of it is\ndamaged")

    images = [LANDSCAPE, "missing.png", LANDSCAPE, b"nothing", fails]
    captions = list(caption_images(*tiny, images, max_tokens=4))
    assert [caption.index for caption in captions] == [0, 1, 2, 3, 4]
    assert captions[0].text == captions[2].text != ""
    assert "There is no file missing.png" in captions[1].error and captions[3].error
    assert captions[4] == Caption(4, fails, None, error="page 3 of it is damaged")
    assert list(caption_images(*tiny, ["missing.png"] * 50))[49].error
    assert list(caption_images(*tiny, [])) == []


def test_a_mistake_of_the_program_is_not_taken_for_a_bad_image(tiny):
    def broken():
        return undefined  # noqa: F821

    with pytest.raises(NameError, match="undefined"):
        list(caption_images(*tiny, [LANDSCAPE, broken, LANDSCAPE], max_tokens=3))

    def ends_badly():
        yield LANDSCAPE
        raise RuntimeError("the list is broken")

    with pytest.raises(RuntimeError, match="the list is broken"):
        list(caption_images(*tiny, ends_badly(), max_tokens=3))


class Counted:
    """An endless supply that knows how many were taken."""

    def __init__(self, image):
        self.taken, self._image = 0, image

    def __iter__(self):
        return self

    def __next__(self):
        self.taken += 1
        return self._image


@pytest.mark.parametrize("batch_size", [1, 4])
def test_images_are_taken_a_few_batches_ahead_and_no_further(batch_size, tiny):
    images = Counted(LANDSCAPE)
    captions = caption_images(*tiny, images, batch_size=batch_size, max_tokens=3)
    assert images.taken == 0
    for index, caption in enumerate(itertools.islice(captions, 10 * batch_size)):
        assert caption.index == index
        assert images.taken - index <= 6 * batch_size
    captions.close()
    time.sleep(0.05)
    taken = images.taken
    time.sleep(0.1)
    assert images.taken == taken


def test_no_more_pixels_are_held_than_are_soon_encoded(tiny, monkeypatch):
    """Of large images that is one a thread and one or two that wait, whatever the batch."""
    monkeypatch.setattr(batch_generate, "ENCODE_PIXELS", 256**2)
    model, (read, encoded, most) = tiny[0], ([], [], [0])
    encode = type(model).encode_images

    def counted_encode(self, pixels):
        most[0] = max(most[0], len(read) - len(encoded))
        encoded.append(len(pixels))
        return encode(self, pixels)

    monkeypatch.setattr(type(model), "encode_images", counted_encode)
    images = [lambda: read.append(1) or LANDSCAPE] * 20
    assert len(list(caption_images(*tiny, images, batch_size=4, threads=2, max_tokens=3))) == 20
    assert encoded == [1] * 20
    assert 1 < most[0] <= 2 + 2


def test_images_that_fail_at_once_are_not_taken_further_ahead(tiny):
    images = Counted("missing.png")
    captions = caption_images(*tiny, images, batch_size=2)
    for index, _ in enumerate(itertools.islice(captions, 100)):
        assert images.taken - index <= 12
    captions.close()


def test_one_very_long_answer_does_not_let_memory_grow(tiny, monkeypatch):
    """The first image's answer takes longest; others wait for it, but no more than the window's worth."""
    images, waiting = Counted(LANDSCAPE), []

    class Watched(captioning._Work):
        def begin(self, index, image, pixels):
            self._options = options(60 if index == 0 else 2)
            super().begin(index, image, pixels)

        def step(self, hurry):
            super().step(hurry)
            waiting.append((images.taken, len(self.captions)))

    def options(max_tokens):
        return captioning.GenerationOptions(max_tokens=max_tokens, repetition_penalty=1e6)

    monkeypatch.setattr(captioning, "_Work", Watched)
    first = next(caption_images(*tiny, images, batch_size=2))
    assert first.generation_tokens == 60
    assert max(taken for taken, _ in waiting) == 12
    assert 10 <= max(held for _, held in waiting) <= 12


@pytest.mark.parametrize("yielded", [0, 1, 5])
def test_closing_early_stops_the_threads_at_once(yielded, tiny):
    captions = caption_images(*tiny, Counted(LANDSCAPE), batch_size=2, threads=3, max_tokens=3)
    for _ in range(yielded):
        next(captions)
    assert len(reading_threads()) == (3 if yielded else 0)
    start = time.perf_counter()
    captions.close()
    assert time.perf_counter() - start < 1
    assert not reading_threads()


def test_an_interrupt_stops_the_threads(tiny, monkeypatch):
    captions = caption_images(*tiny, Counted(LANDSCAPE), batch_size=2, max_tokens=30)

    def interrupted(self, hurry):
        raise KeyboardInterrupt

    monkeypatch.setattr(captioning._Work, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(captions)
    assert not reading_threads()


def test_a_read_that_hangs_does_not_keep_closing_from_ending():
    release = threading.Event()
    reader = ReadAhead(lambda item: release.wait(10), threads=1)
    reader.give("key", "item")
    time.sleep(0.05)
    start = time.perf_counter()
    reader.close()
    assert time.perf_counter() - start < 3
    assert all(thread.daemon for thread in reading_threads())  # nor the program
    release.set()
    for thread in reading_threads():
        thread.join(5)


def test_what_was_given_and_not_begun_is_not_read_after_closing():
    read = []
    reader = ReadAhead(lambda item: (read.append(item), time.sleep(0.05)), threads=1)
    for item in range(100):
        reader.give(item, item)
    reader.close()
    assert len(read) <= 2 and not reading_threads()


def test_reading_takes_place_while_others_are_read():
    barrier = threading.Barrier(3, timeout=5)
    with ReadAhead(lambda item: (barrier.wait(), 2 * item)[1], threads=3) as reader:
        assert reader.take(wait=True) is None
        for item in (1, 2, 3):
            reader.give(item, item)
        assert {reader.take(wait=True) for _ in range(3)} == {(1, 2), (2, 4), (3, 6)}
        assert reader.pending == 0


@pytest.mark.parametrize(
    "options, text",
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"threads": 0}, "threads is 0"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**6}, "context"),
        ({"kv_bits": 4}, "kv_bits cannot be had in a batch"),
        ({"prompt": "<image> and <image>"}, "marks"),
        ({"choices": []}, "choices"),
    ],
)
def test_wrong_options_are_refused_before_an_image_is_taken(options, text, tiny):
    images = Counted(LANDSCAPE)
    with pytest.raises(OptionError, match=text):
        caption_images(*tiny, images, **options)
    assert images.taken == 0
