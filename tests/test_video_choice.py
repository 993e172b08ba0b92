"""Which frames are looked at, and which are new."""

import numpy as np
import pytest

av = pytest.importorskip("av")

from mlx_fastvlm.errors import OptionError  # noqa: E402
from mlx_fastvlm.video.choice import REUSE_BELOW, SCENE_CHANGE, ChangeGate, Pace, change_between  # noqa: E402
from mlx_fastvlm.video.frame import Frame  # noqa: E402
from tests.video_clips import plain, scene  # noqa: E402


def admitted(pace, times):
    return [time for time in times if pace.admits(time)]


def frame(pixels, time=0.0):
    return Frame(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24"), time)


@pytest.mark.parametrize("rate", [10, 24, 25, 30, 30000 / 1001, 60])
def test_a_steady_rate_gives_steady_frames(rate):
    times = [round(number / rate, 3) for number in range(int(20 * rate))]  # as Matroska rounds them
    found = admitted(Pace(1.0), times)
    assert len(found) == 20
    assert found == pytest.approx(range(20), abs=1 / rate)


def test_one_frame_in_three_is_every_third_in_spite_of_rounding():
    times = [round(number / 30, 3) for number in range(90)]
    assert admitted(Pace(0.1), times) == times[::3]


def test_after_a_gap_the_next_frame_comes_and_the_grid_stays():
    assert admitted(Pace(1.0), [0.0, 0.9, 5.5, 5.9, 6.0, 6.5, 7.0]) == [0.0, 5.5, 6.0, 7.0]


def test_a_run_that_goes_on_takes_the_same_frames():
    times = [0.04 * number for number in range(500)]
    whole = admitted(Pace(0.7, origin=0.3), times)
    rest = Pace(0.7, origin=0.3)
    rest.admits(whole[10])
    assert admitted(rest, [time for time in times if time > whole[10]]) == whole[11:]


def test_an_interval_of_nothing_takes_every_frame_and_odd_ones_are_refused():
    assert admitted(Pace(0.0), [0.0, 0.001, 0.002]) == [0.0, 0.001, 0.002]
    for every in (-1.0, float("nan"), float("inf")):
        with pytest.raises(OptionError, match="time between frames"):
            Pace(every)
    for threshold in (-0.1, 1.1, float("nan")):
        with pytest.raises(OptionError, match="from 0 to 1"):
            ChangeGate(threshold)


def test_change_is_measured_where_it_is_largest():
    white, black = plain((255,) * 3, 256, 256), plain((0,) * 3, 256, 256)
    assert change_between(frame(white).thumbnail, frame(black).thumbnail) == pytest.approx(1)
    assert change_between(frame(white).thumbnail, frame(white).thumbnail) == 0
    corner = white.copy()
    corner[:16, :16] = 0
    assert change_between(frame(white).thumbnail, frame(corner).thumbnail) > 0.9
    red, equally_bright = plain((200, 0, 0), 256, 256), plain((0, 102, 0), 256, 256)
    assert change_between(frame(red).thumbnail, frame(equally_bright).thumbnail) > 0.3


def test_noise_is_no_change_and_a_small_thing_that_moves_is():
    picture, _ = scene(51)
    random = np.random.default_rng(1)
    noisy = np.clip(picture + random.normal(0, 6, picture.shape), 0, 255).astype(np.uint8)
    assert change_between(frame(picture).thumbnail, frame(noisy).thumbnail) < REUSE_BELOW
    moved = picture.copy()
    moved[100:116, 100:116] = 20
    assert change_between(frame(picture).thumbnail, frame(moved).thumbnail) > SCENE_CHANGE


def test_slow_changes_add_up_until_they_are_seen():
    gate = ChangeGate(0.1)
    news = [gate.look(frame(plain((level,) * 3), level)).is_new for level in range(100, 200, 5)]
    assert news[:12] == [True, *[False] * 5, True, *[False] * 5]
    assert (gate.looked, gate.new) == (20, 4)


def test_at_a_threshold_of_nothing_every_frame_is_new():
    gate = ChangeGate(0.0)
    looks = [gate.look(frame(plain((9, 9, 9)))) for _ in range(3)]
    assert [look.is_new for look in looks] == [True] * 3
    assert [look.change for look in looks] == [None, 0.0, 0.0]
