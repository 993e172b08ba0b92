"""Reading videos: times, the way a frame is seen, damage, and what is refused."""

import io
import sys
import threading
from fractions import Fraction
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

av = pytest.importorskip("av")

from mlx_fastvlm.errors import OptionError, VideoError  # noqa: E402
from mlx_fastvlm.image_decoding import open_image  # noqa: E402
from mlx_fastvlm.image_processing import ImageProcessor  # noqa: E402
from mlx_fastvlm.video.reader import open_video  # noqa: E402
from mlx_fastvlm.video.source import parse_source  # noqa: E402
from mlx_fastvlm.video.tone_map import WHITE_NITS, hlg_scene, pq_nits  # noqa: E402
from tests.video_clips import plain, scene, write_clip, write_sound  # noqa: E402

RED, GREEN, BLUE, WHITE = (220, 30, 30), (30, 150, 50), (30, 60, 220), (250, 250, 250)


def frames(path, start=0.0, end=None):
    with open_video(parse_source(str(path))) as video:
        return list(video.frames(start, end))


def first(path):
    return frames(path)[0].pixels()


def corners(pixels):
    """Colors near the top left, top right, bottom left and bottom right, as the nearest of the four."""
    names = {"red": RED, "green": GREEN, "blue": BLUE, "white": WHITE}
    places = (pixels[6, 6], pixels[6, -6], pixels[-6, 6], pixels[-6, -6])
    return [min(names, key=lambda name: np.abs(place[:3] - np.array(names[name])).sum()) for place in places]


def quarters(width=64, height=48):
    picture = plain(WHITE, width, height).copy()
    picture[: height // 2, : width // 2] = RED
    picture[: height // 2, width // 2 :] = GREEN
    picture[height // 2 :, : width // 2] = BLUE
    return picture


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov", ".ts"])
def test_frames_come_with_their_own_times(tmp_path, suffix):
    times = [0.0, 0.1, 0.5, 2.0, 2.04]
    colors = [RED, GREEN, BLUE, WHITE, RED]
    path = write_clip(tmp_path / f"clip{suffix}", [plain(color) for color in colors], times=times)
    found = frames(path)
    assert [frame.time for frame in found] == pytest.approx(times, abs=0.002)
    for frame, color in zip(found, colors, strict=True):
        assert np.abs(frame.pixels() - np.array(color)).max() < 12


@pytest.mark.parametrize(("suffix", "gop"), [(".mp4", 5), (".mp4", 100), (".mkv", 5), (".ts", 100), (".h264", 5)])
def test_start_and_end_give_exactly_the_frames_between(tmp_path, suffix, gop):
    pictures = [plain((10 * number, 0, 250 - 10 * number)) for number in range(25)]
    path = write_clip(tmp_path / f"clip{suffix}", pictures, rate=25, options={"crf": "5", "g": str(gop)})
    everything = frames(path)
    assert len(everything) == 25
    for start, end in ((0.0, 0.2), (0.4, 0.72), (0.8, None)):
        expected = [frame for frame in everything if start <= frame.time and (end is None or frame.time < end)]
        found = frames(path, start, end)
        assert [frame.time for frame in found] == [frame.time for frame in expected] != []
        assert np.array_equal(found[0].pixels(), expected[0].pixels())


@pytest.mark.skipif(not hasattr(av.VideoStream, "set_display_rotation"), reason="this PyAV cannot write rotations")
@pytest.mark.parametrize(
    ("rotation", "shape", "expected"),
    [
        (0, (48, 64), ["red", "green", "blue", "white"]),
        (90, (64, 48), ["green", "white", "red", "blue"]),
        (-90, (64, 48), ["blue", "red", "white", "green"]),
        (180, (48, 64), ["white", "blue", "green", "red"]),
    ],
)
def test_frames_are_upright(tmp_path, rotation, shape, expected):
    pixels = first(write_clip(tmp_path / "clip.mp4", [quarters()], rotation=rotation))
    assert pixels.shape[:2] == shape
    assert corners(pixels) == expected


def test_pixels_that_are_not_square_are_stretched(tmp_path):
    pixels = first(write_clip(tmp_path / "clip.mp4", [quarters()], pixel_aspect=Fraction(16, 11)))
    assert pixels.shape[:2] == (48, 93)
    assert corners(pixels) == ["red", "green", "blue", "white"]


def test_an_interlaced_frame_has_no_combs(tmp_path):
    combs = plain((0, 0, 0)).copy()
    combs[::2] = 255
    options = {"crf": "1", "x264-params": "interlaced=1"}
    interlaced, whole = (
        first(write_clip(tmp_path / f"{name}.mp4", [combs], options=options | how))
        for name, how in (("interlaced", {}), ("whole", {"x264-params": "interlaced=0"}))
    )
    assert np.ptp(whole) > 200
    assert np.ptp(interlaced) < 10 and interlaced.min() > 240


@pytest.mark.parametrize(
    ("suffix", "codec", "pix_fmt"), [(".mov", "prores_ks", "yuva444p10le"), (".mov", "qtrle", "argb")]
)
def test_transparent_parts_show_the_background(tmp_path, suffix, codec, pix_fmt):
    picture = np.dstack([quarters(), np.full((48, 64), 255, np.uint8)])
    picture[24:, :, 3] = 0
    pixels = first(write_clip(tmp_path / f"clip{suffix}", [picture], codec=codec, pix_fmt=pix_fmt))
    assert pixels.shape == (48, 64, 4)
    assert corners(pixels)[:2] == ["red", "green"]
    assert corners(np.asarray(open_image(pixels)))[2:] == ["white", "white"]
    black = np.asarray(open_image(pixels, background="black"))
    assert black[-6, 6].max() < 5


def test_ten_bits_become_eight(tmp_path):
    eight, ten = (
        first(write_clip(tmp_path / f"{name}.mp4", [quarters()], pix_fmt=name)) for name in ("yuv420p", "yuv420p10le")
    )
    assert ten.dtype == np.uint8
    inside = np.s_[12::24, 16::32]
    assert np.abs(eight[inside].astype(int) - ten[inside]).max() <= 4
    assert corners(ten) == ["red", "green", "blue", "white"]


def to_code(nits, is_hlg):
    """Codes in [0, 1] for light in nits, by search in the function from codes to light."""
    codes = np.linspace(0, 1, 20001)
    return np.interp(nits / 1000 if is_hlg else nits, hlg_scene(codes) if is_hlg else pq_nits(codes), codes)


def test_transfer_functions_are_those_of_the_standards():
    # ITU-R BT.2408, table 1: 58 % PQ and 75 % HLG are the reference white; BT.2100: 50 % HLG is 1/12 of scene light.
    assert pq_nits(np.array([0.0, 0.58, 1.0])) == pytest.approx([0, 203, 10_000], rel=0.01)
    assert hlg_scene(np.array([0.0, 0.5, 1.0])) == pytest.approx([0, 1 / 12, 1], abs=1e-6)
    assert 1000 * hlg_scene(np.array(0.75)) ** 1.2 == pytest.approx(203, rel=0.01)


@pytest.mark.parametrize(("transfer", "is_hlg"), [(16, False), (18, True)], ids=["pq", "hlg"])
def test_hdr_looks_like_the_same_scene_without(tmp_path, transfer, is_hlg):
    # Linear light of sRGB's white, mid gray and red in BT.2020's primaries, in nits at a white of 203.
    light = np.array([[1.0] * 3, [0.214] * 3, [0.6274, 0.0691, 0.0164]]) * WHITE_NITS
    if is_hlg:  # scene light of that display light, system gamma 1.2
        luminance = light @ np.array([0.2627, 0.6780, 0.0593]) / 1000
        light = light * luminance[:, None] ** (1 / 1.2 - 1)
    codes = np.round(65535 * to_code(light, is_hlg)).astype(np.uint16)
    picture = np.repeat(np.repeat(codes[None], 48, axis=0), 32, axis=1)
    color = {"color_trc": transfer, "color_primaries": 9, "colorspace": 9}
    path = write_clip(tmp_path / "clip.mkv", [picture], pix_fmt="yuv420p10le", options={"crf": "5"}, **color)
    white, gray, red = (first(path)[24, x].astype(int) for x in (16, 48, 80))
    assert white.min() > 235 and np.ptp(white) < 8
    assert np.abs(gray - 127).max() < 8
    assert red[0] > 235 and red[1:].max() < 60


def test_hd_without_named_colors_is_taken_as_players_do(tmp_path):
    picture = plain(RED, 1280, 720)
    stored = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv444p", dst_colorspace="ITU709")
    path = tmp_path / "clip.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 1280, 720, "yuv444p"
        stored.colorspace = 2
        container.mux(stream.encode(stored))
        container.mux(stream.encode(None))
    assert np.abs(first(path)[360, 640] - np.array(RED)).max() < 6


def test_a_frame_gives_the_model_the_pixels_of_the_same_picture(tmp_path):
    picture, _ = scene(5)
    path = write_clip(tmp_path / "clip.mkv", [picture], codec="ffv1", pix_fmt="bgr0")
    processor = ImageProcessor(256)
    assert np.array_equal(processor.to_array(first(path)), processor.to_array(picture))


def test_a_file_that_is_cut_off_gives_what_is_left(tmp_path):
    whole = write_clip(tmp_path / "clip.mkv", [scene(seed)[0] for seed in range(60)], rate=10)
    data = whole.read_bytes()
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(data[: len(data) // 2])
    with open_video(parse_source(str(cut))) as video:
        found = list(video.frames())
        assert 10 < len(found) < 50
        assert any("it may be cut off" in warning and "6.0 s" in warning for warning in video.warnings)
    with open_video(parse_source(str(whole))) as video:
        assert len(list(video.frames())) == 60 and not video.warnings


def test_damage_in_the_middle_is_left_out_and_said(tmp_path):
    path = write_clip(tmp_path / "clip.mp4", [scene(seed)[0] for seed in range(30)], options={"g": "5"})
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 4000] = bytes(4000)
    path.write_bytes(data)
    with open_video(parse_source(str(path))) as video:
        times = [frame.time for frame in video.frames()]
        assert times[0] == 0 and times[-1] == pytest.approx(2.9)
        assert len(video.warnings) == 1 and "left out of" in video.warnings[0]


def test_a_stream_without_times_gets_steady_ones(tmp_path):
    times = [frame.time for frame in frames(write_clip(tmp_path / "clip.h264", [plain(RED)] * 5))]
    assert times[0] == 0 and np.ptp(np.diff(times)) < 1e-5 and times[1] > 0


def test_tags_that_are_not_utf_8_do_not_matter(tmp_path):
    path = tmp_path / "clip.mkv"
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "Cafe"
        stream = container.add_stream("libx264", rate=10)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(quarters(), format="rgb24")))
        container.mux(stream.encode(None))
    path.write_bytes(path.read_bytes().replace(b"Cafe", b"Caf\xe9"))
    assert len(frames(path)) == 1


def test_times_that_start_over_are_counted_on(tmp_path):
    part = write_clip(tmp_path / "part.ts", [scene(seed)[0] for seed in range(20)], rate=10, options={"g": "5"})
    whole = tmp_path / "whole.ts"
    whole.write_bytes(3 * part.read_bytes())
    with open_video(parse_source(str(whole))) as video:
        assert [frame.time for frame in video.frames()] == pytest.approx([number / 10 for number in range(60)])
        assert video.warnings == [f"The times of {whole} start over after 1.9 s: later ones are counted on from there."]
    times = [frame.time for frame in frames(whole, 2.5, 4.5)]
    assert times == pytest.approx([2.5 + number / 10 for number in range(20)])


def test_pictures_that_begin_after_the_sound_end_as_late(tmp_path):
    path = tmp_path / "late.mp4"
    with av.open(str(path), "w") as container:
        pictures, sounds = container.add_stream("libx264", rate=10), container.add_stream("aac", rate=8000)
        pictures.width, pictures.height, pictures.pix_fmt = 64, 48, "yuv420p"
        for number in range(20):
            picture = av.VideoFrame.from_ndarray(quarters(), format="rgb24")
            picture.pts, picture.time_base = 20 + number, Fraction(1, 10)
            container.mux(pictures.encode(picture))
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 32_000), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 8000
        container.mux(sounds.encode(silence))
        for stream in (pictures, sounds):
            container.mux(stream.encode(None))
    with open_video(parse_source(str(path))) as video:
        begin = next(video.frames()).time
        assert 1.9 < begin < 2.4 and video.duration == pytest.approx(begin + 2)
    assert len(frames(path, begin + 1)) == 10


def test_a_file_may_be_named_by_the_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_clip(tmp_path / "clip.mp4", [quarters()] * 3).rename("2024-05-01T10:30:00.mp4")
    assert len(frames("2024-05-01T10:30:00.mp4")) == 3


def not_a_video(path: Path) -> Path:
    path.write_bytes(b"\0\1\2\3 this is no video" * 50)
    return path


def without_index(path: Path) -> Path:
    write_clip(path, [plain(RED)] * 20)
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"moov")])
    return path


def with_cover(path: Path) -> Path:
    png = io.BytesIO()
    Image.fromarray(scene(5)[0]).save(png, "PNG")
    return write_sound(path, png.getvalue())


def a_picture(path: Path) -> Path:
    Image.fromarray(scene(5)[0]).save(path)
    return path


def text(path: Path) -> Path:
    path.write_text("Dear diary,\n" * 100)
    return path


def no_frames(path: Path) -> Path:
    write_clip(path, [plain(RED)] * 3)
    data = path.read_bytes()
    start = data.index(b"mdat") + 4
    path.write_bytes(data[:start] + bytes(data.index(b"moov") - 4 - start) + data[data.index(b"moov") - 4 :])
    return path


@pytest.mark.parametrize(
    ("name", "make", "words"),
    [
        ("clip.mp4", not_a_video, "is not a video, or its beginning or index is missing"),
        ("clip.mp4", without_index, "is not a video, or its beginning or index is missing"),
        ("clip.mp4", lambda path: path.touch(), "is not a video"),
        ("clip.mp4", lambda path: None, "does not exist"),
        ("clip.mp4", Path.mkdir, "cannot be read (Is a directory)"),
        ("sound.wav", write_sound, "has no video stream: it holds only sound"),
        ("sound.flac", with_cover, "has no video stream: it holds only sound"),
        ("clip.png", a_picture, "is a picture, not a video: ask `mlx-fastvlm describe`"),
        ("diary.txt", text, "diary.txt has no video stream: it is empty, text, or cut off"),
        ("clip.mp4", no_frames, "has a video stream but no frame that can be decoded"),
    ],
)
def test_what_is_no_video_is_refused_in_one_line(tmp_path, name, make, words):
    make(tmp_path / name)
    with pytest.raises(VideoError) as error:
        frames(tmp_path / name)
    assert str(error.value).startswith(str(tmp_path / name))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("97", VideoError, "There is no camera 97 (/dev/video97): connect it, or give another number."),
        ("x11grab::97", VideoError, "x11grab::97 cannot be opened"),
        ("avfoundation:0", OptionError, "the installed PyAV has no avfoundation device"),
        ("http://127.0.0.1:9/clip.mp4", VideoError, "cannot be opened (Connection refused)"),
    ],
)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="names of Linux devices")
def test_live_sources_that_are_not_there_are_refused_in_one_line(name, error, words):
    with pytest.raises(error) as raised:
        open_video(parse_source(name))
    assert words in str(raised.value) and "\n" not in str(raised.value)


class Web(SimpleHTTPRequestHandler):
    """Files of the current folder, and /camera: twelve pictures as network cameras send them, then silence."""

    def do_GET(self):
        if self.path != "/camera":
            return super().do_GET()
        picture = io.BytesIO()
        Image.fromarray(quarters()).save(picture, "JPEG")
        head = f"--cut\r\nContent-Type: image/jpeg\r\nContent-Length: {len(picture.getvalue())}\r\n\r\n".encode()
        self.send_response(200)
        self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=cut")
        self.end_headers()
        for _ in range(12):
            self.wfile.write(head + picture.getvalue() + b"\r\n")

    def log_message(self, *_):
        """Nothing."""


@pytest.fixture
def web(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), Web) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_video_on_the_web_is_a_file_and_a_network_camera_is_live(web, tmp_path):
    write_clip(tmp_path / "clip.mp4", [quarters()] * 10)
    with open_video(parse_source(f"{web}/clip.mp4")) as video:
        assert not video.is_live and video.duration == pytest.approx(1.0)
        assert [frame.time for frame in video.frames(0.75)] == pytest.approx([0.8, 0.9])
    with open_video(parse_source(f"{web}/camera")) as video:
        assert video.is_live and video.duration is None
        assert video._stream.thread_type.name == "SLICE", "a thread a frame holds frames back"
        found = list(video.frames())
        assert len(found) == 12 and corners(found[-1].pixels()) == ["red", "green", "blue", "white"]
    with pytest.raises(VideoError, match="cannot be opened .*404"):
        open_video(parse_source(f"{web}/missing.mp4"))


def test_without_the_extra_the_way_to_it_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(OptionError, match=r"pip install 'mlx-fastvlm\[video\]'"):
        open_video(parse_source("clip.mp4"))
