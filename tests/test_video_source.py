"""What names of video sources stand for."""

import pytest

from mlx_fastvlm.errors import OptionError
from mlx_fastvlm.video.source import parse_source
from mlx_fastvlm.video_file import is_video


@pytest.mark.parametrize(
    ("name", "platform", "kind", "location", "form"),
    [
        ("0", "linux", "camera", "/dev/video0", "v4l2"),
        ("/dev/video3", "linux", "camera", "/dev/video3", "v4l2"),
        ("1", "darwin", "camera", "1:none", "avfoundation"),
        ("screen", "darwin", "screen", "Capture screen 0:none", "avfoundation"),
        ("screen:1", "darwin", "screen", "Capture screen 1:none", "avfoundation"),
        ("screen", "linux", "screen", ":7.0", "x11grab"),
        ("screen:1", "linux", "screen", ":7.1", "x11grab"),
        ("x11grab::0.0+10,20", "linux", "device", ":0.0+10,20", "x11grab"),
        ("lavfi:testsrc=rate=5,realtime", "linux", "device", "testsrc=rate=5,realtime", "lavfi"),
        ("clip.mp4", "linux", "file", "file:clip.mp4", None),
        ("a:b.mp4", "linux", "file", "file:a:b.mp4", None),
        ("./0", "linux", "file", "file:./0", None),
        ("rtsp://camera/1", "linux", "address", "rtsp://camera/1", None),
    ],
)
def test_names_of_sources(monkeypatch, name, platform, kind, location, form):
    monkeypatch.setenv("DISPLAY", ":7.5")
    source = parse_source(name, platform=platform)
    assert (source.kind, source.location, source.format) == (kind, location, form)


def test_a_file_named_like_a_device_is_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lavfi:clip").touch()
    assert parse_source("lavfi:clip").kind == "file"


def test_what_is_live_is_known_from_the_name_except_on_the_web():
    assert [parse_source(name).is_live for name in ("clip.mp4", "0", "rtsp://a/b", "https://a/b.mp4")] == [
        False,
        True,
        True,
        None,
    ]


def test_passwords_stay_out_of_names():
    source = parse_source("rtsp://me:secret@camera:554/live?channel=1")
    assert source.location == "rtsp://me:secret@camera:554/live?channel=1"
    assert source.name == "rtsp://camera:554/live?channel=1"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("-", "standard input"),
        ("screen:main", 'screen "main" is not known'),
        ("screen", "DISPLAY is not set"),
        ("ftp://me:secret@host/clip.mp4", "ftp://host/clip.mp4 cannot be watched: its scheme is none of http"),
        ("http://[::1/clip.mp4", "cannot be understood"),
    ],
)
def test_what_cannot_be_watched(monkeypatch, name, words):
    monkeypatch.delenv("DISPLAY", raising=False)
    with pytest.raises(OptionError) as error:
        parse_source(name, platform="linux")
    assert words in str(error.value) and "secret" not in str(error.value)


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (b"\0\0\0\x20ftypisom", True),
        (b"\0\0\0\x14ftypqt  ", True),
        (b"\0\0\0\x08wide\0\0\0\0mdat", True),
        (b"\x1aE\xdf\xa3", True),
        (b"RIFF\0\0\0\0AVI LIST", True),
        (b"FLV\x01", True),
        (b"\0\0\x01\xba", True),
        (b"\0\0\x01\xb3", True),
        (b"OggS\0\x02", True),
        (b"\x06\x0e\x2b\x34\x02\x05", True),
        ((b"G" + bytes(187)) * 3, True),
        ((bytes(4) + b"G" + bytes(187)) * 3, True),
        ((bytes(4) + b"G" + bytes(187)) * 2, False),
        (b"\0\0\0\x18ftypheic", False),
        (b"\0\0\0\x1cftypavif", False),
        (b"RIFF\0\0\0\0WEBPVP8 ", False),
        (b"GIF89a", False),
        (b"\x89PNG\r\n\x1a\n", False),
        (b"G" * 600, False),
        (b"", False),
    ],
)
def test_videos_are_known_by_their_first_bytes(tmp_path, head, expected):
    (tmp_path / "file").write_bytes(head)
    assert is_video(str(tmp_path / "file")) is expected


def test_addresses_are_known_by_their_suffix_and_the_rest_is_no_video(tmp_path):
    assert is_video("https://host/a/clip.MP4?x=1") and not is_video("https://host/photo.jpg")
    assert not any(is_video(name) for name in ("-", "missing.mp4", str(tmp_path), "a\0b", "http://[::1/clip.mp4"))
