"""Descriptions follow the picture: at the right times, once per change, and of the newest frame where it is live."""

import gc
import itertools
import threading
import time
import weakref

import numpy as np
import pytest

av = pytest.importorskip("av")

from mlx_fastvlm import generate, load  # noqa: E402
from mlx_fastvlm.errors import OptionError, VideoError  # noqa: E402
from mlx_fastvlm.video import (  # noqa: E402
    ChangeGate,
    NewestFrame,
    Pace,
    describe_frames,
    describe_newest,
    open_video,
)
from mlx_fastvlm.video.choice import REUSE_BELOW  # noqa: E402
from mlx_fastvlm.video.frame import Frame  # noqa: E402
from mlx_fastvlm.video.source import parse_source  # noqa: E402
from tests.video_clips import SCENE_SEEDS, plain, scene, write_clip  # noqa: E402

PICTURES, CAPTIONS = zip(*map(scene, SCENE_SEEDS), strict=True)
QUICK = {"max_tokens": 2}


@pytest.fixture(scope="module")
def demo():
    return load("demo")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Each scene for a second, five frames a second."""
    pictures = [picture for picture in PICTURES for _ in range(5)]
    return write_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", pictures, rate=5)


def frame(picture, time=0.0):
    return Frame(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24"), time)


def describe(demo, frames, threshold=REUSE_BELOW, **options):
    return list(describe_frames(*demo, frames, gate=ChangeGate(threshold), **options))


def test_captions_follow_the_picture_and_still_frames_reuse_them(demo, clip):
    with open_video(parse_source(str(clip))) as video:
        found = describe(demo, video.frames())
    assert [row.time for row in found] == pytest.approx([number / 5 for number in range(20)])
    assert [row.text for row in found] == [caption for caption in CAPTIONS for _ in range(5)]
    assert [row.reused for row in found] == [False, True, True, True, True] * 4
    assert all(row.change < REUSE_BELOW for row in found if row.reused)
    assert [row.change > 0.1 for row in found if not row.reused and row.change is not None] == [True] * 3
    assert all(row.latency is None and row.dropped is None for row in found)


def test_frames_that_did_not_change_can_be_left_out(demo, clip):
    with open_video(parse_source(str(clip))) as video:
        found = describe(demo, video.frames(), threshold=0.1, skip_unchanged=True)
    assert [(row.time, row.text) for row in found] == list(zip([0.0, 1.0, 2.0, 3.0], CAPTIONS, strict=True))


@pytest.mark.filterwarnings("ignore:Tiles")
@pytest.mark.filterwarnings("ignore:This model was trained")
@pytest.mark.parametrize("shown", [{"resolution": 256, "fit": "crop"}, {"resolution": 128, "fit": "tiles"}])
def test_a_description_is_what_generate_says_of_the_frame(demo, shown):
    options = {"max_tokens": 12, **shown}
    wide = np.concatenate([PICTURES[0], PICTURES[1]], axis=1)
    (row,) = describe(demo, [frame(wide)], prompt="What is in the center?", **options)
    assert row.text == generate(*demo, "What is in the center?", image=wide, **options)


def test_a_run_that_goes_on_knows_the_last_description(demo):
    gate = ChangeGate(REUSE_BELOW)
    gate.compare_with(frame(PICTURES[0]))
    (last,) = describe(demo, [frame(PICTURES[0])])
    frames = [frame(PICTURES[0], 1.0), frame(PICTURES[1], 2.0), frame(PICTURES[1], 3.0)]
    found = list(describe_frames(*demo, frames, gate=gate, last=last))
    assert [(row.text, row.reused) for row in found] == [
        (CAPTIONS[0], True),
        (CAPTIONS[1], False),
        (CAPTIONS[1], True),
    ]
    still = list(describe_frames(*demo, frames[1:], gate=gate, last=found[-1]))
    assert [(row.text, row.reused) for row in still] == [(CAPTIONS[1], True)] * 2


def test_a_frame_that_cannot_be_shown_has_an_error_and_the_others_go_on(demo):
    sliver = plain((9, 9, 9), width=30_000, height=2)
    frames = [frame(PICTURES[0]), frame(sliver, 1.0), frame(sliver, 2.0), frame(PICTURES[1], 3.0)]
    batched = describe(demo, frames, fit="crop", **QUICK)
    live, together = (
        list(describe_newest(*demo, Given(frames, at_once), gate=ChangeGate(REUSE_BELOW), fit="crop", **QUICK))
        for at_once in (1, 4)
    )
    for found in (batched, live, together):
        assert [row.error is None for row in found] == [True, False, False, True]
        assert "too narrow" in found[1].error and found[2].reused and found[2].error == found[1].error
        assert found[1].text is None and found[3].text


def test_wrong_options_are_refused_before_any_frame_is_taken(demo):
    taken = []
    frames = (taken.append(number) for number in range(3))
    with pytest.raises(OptionError):
        describe_frames(*demo, frames, gate=ChangeGate(0.0), max_tokens=0)
    assert not taken


def test_frames_are_let_go_once_they_are_read(demo):
    alive, most = weakref.WeakSet(), 0

    def many():
        nonlocal most
        for number in range(60):
            made = frame(plain((number, 255 - number, 9)), number / 10)
            alive.add(made)
            yield made
            del made
            if number % 10 == 9:
                gc.collect()
                most = max(most, len(alive))

    assert len(describe(demo, many(), threshold=0.0, batch_size=4, **QUICK)) == 60
    assert most <= 16


@pytest.mark.parametrize("skip_unchanged", [False, True])
def test_a_scene_that_stands_still_is_described_before_the_next_one_comes(demo, skip_unchanged):
    still = [650, 200, 3]
    taken = 0

    def frames():
        nonlocal taken
        for picture, count in zip(PICTURES, still, strict=False):
            shown = frame(picture)
            for _ in range(count):
                taken += 1
                yield Frame(shown._picture, taken / 10)

    rows = describe_frames(*demo, frames(), gate=ChangeGate(REUSE_BELOW), skip_unchanged=skip_unchanged)
    found = [next(rows)]
    assert taken < 250
    found += rows
    repeats = [1] * 3 if skip_unchanged else still
    assert [row.text for row in found] == [
        text for text, count in zip(CAPTIONS, repeats, strict=False) for _ in range(count)
    ]
    assert [row.time for row in found if not row.reused] == [0.1, 65.1, 85.1]
    if not skip_unchanged:
        assert [row.time for row in found] == [number / 10 for number in range(1, 854)]


class Given:
    """As NewestFrame, but every frame waits to be taken, so many at once."""

    dropped = 0
    now = 10.0

    def __init__(self, frames, at_once=1):
        self._frames, self._at_once = iter(frames), at_once

    def take(self):
        return list(itertools.islice(self._frames, self._at_once))


def test_live_descriptions_say_how_old_they_are(demo):
    frames = [frame(PICTURES[0], 1.0), frame(PICTURES[0], 2.0), frame(PICTURES[1], 3.0)]
    for at_once in (1, 2, 3):
        found = list(describe_newest(*demo, Given(frames, at_once), gate=ChangeGate(REUSE_BELOW)))
        assert [(row.text, row.reused, row.latency) for row in found] == [
            (CAPTIONS[0], False, 9.0),
            (CAPTIONS[0], True, 8.0),
            (CAPTIONS[1], False, 7.0),
        ]
    skipped = describe_newest(*demo, Given(frames), gate=ChangeGate(0.1), skip_unchanged=True)
    assert [row.time for row in skipped] == [1.0, 3.0]


def paced(pictures, seconds):
    """As a camera gives frames, in its own time."""
    for picture in pictures:
        time.sleep(seconds)
        yield frame(picture)


@pytest.mark.parametrize("keep", [1, 3])
def test_who_is_slow_gets_the_newest_frames_and_the_others_are_dropped(keep):
    pictures = [plain((number, 0, 0)) for number in range(60)]
    newest = NewestFrame(paced(pictures, 0.01), Pace(0.0), "camera 0", keep=keep)
    taken = []
    while got := newest.take():
        taken.append([int(one.pixels()[0, 0, 0]) for one in got])
        time.sleep(0.1)
    assert newest.close()
    everything = [number for numbers in taken for number in numbers]
    assert everything == sorted(set(everything)) and everything[-1] == 59
    assert all(len(numbers) <= keep for numbers in taken) and len(taken) < 20
    assert all(numbers[-1] - numbers[0] == len(numbers) - 1 for numbers in taken), "the newest, without gaps"
    assert newest.arrived == 60 and newest.dropped == 60 - len(everything)


def test_who_is_quick_waits_and_gets_every_frame():
    newest = NewestFrame(paced([plain((number, 0, 0)) for number in range(5)], 0.05), Pace(0.0), "camera 0")
    times = []
    while got := newest.take():
        times += [one.time for one in got]
    assert len(times) == 5 and newest.dropped == 0
    assert times == sorted(times) and times[0] >= 0.05


def test_frames_that_are_not_due_are_not_dropped_ones():
    newest = NewestFrame(paced([plain((9, 9, 9))] * 40, 0.01), Pace(0.1), "camera 0")
    count = 0
    while newest.take():
        count += 1
    assert newest.arrived == 40 and newest.dropped == 0
    assert 2 <= count <= 15


def test_a_live_source_ends_when_it_was_asked_to():
    newest = NewestFrame(paced([plain((9, 9, 9))] * 10_000, 0.01), Pace(0.0), "camera 0", end=0.2)
    while newest.take():
        pass
    assert 0.2 <= newest.now < 5


def test_what_reading_raises_reaches_the_taker_after_the_frames_before_it():
    def breaks():
        yield frame(PICTURES[0])
        raise VideoError("The cable was pulled.")

    newest = NewestFrame(breaks(), Pace(0.0), "camera 0")
    time.sleep(0.05)
    assert len(newest.take()) == 1
    with pytest.raises(VideoError, match="cable"):
        newest.take()


def test_a_source_that_says_nothing_is_given_up():
    stuck = threading.Event()

    def silent():
        yield frame(PICTURES[0])
        stuck.wait()

    newest = NewestFrame(silent(), Pace(0.0), "camera 0", silence=0.2)
    assert len(newest.take()) == 1
    with pytest.raises(VideoError, match="No frame came from camera 0 for 0 s"):
        newest.take()
    stuck.set()
    assert newest.close()


@pytest.mark.parametrize("comes", [True, False])
def test_a_source_that_says_nothing_more_ends_when_it_was_asked_to(comes):
    stuck = threading.Event()

    def silent():
        if comes:
            yield frame(PICTURES[0])
        stuck.wait()

    newest = NewestFrame(silent(), Pace(0.0), "camera 0", end=0.3)
    if comes:
        assert len(newest.take()) == 1
        assert newest.take() == []
    else:
        with pytest.raises(VideoError, match="No frame came from camera 0 for 0 s"):
            newest.take()
    assert 0.3 <= newest.now < 10
    stuck.set()
    assert newest.close()


def test_a_live_video_is_described_to_its_end(demo):
    pictures = [picture for picture in PICTURES[:2] for _ in range(4)]
    newest = NewestFrame(paced(pictures, 0.02), Pace(0.0), "camera 0")
    found = list(describe_newest(*demo, newest, gate=ChangeGate(REUSE_BELOW), **QUICK))
    assert found[0].text and found[-1].time == max(row.time for row in found)
    assert all(row.latency >= 0 for row in found)
    assert len(found) + sum(row.dropped for row in found) == newest.arrived == 8
