"""Subtitles as others read them: by parsers of their own where these are installed, and by a strict one here."""

import html
import random
import re

import pytest

from mlx_fastvlm.video.cues import SUBTITLES, Cue, CueTrack, clock

_TIMES = re.compile(r"(\d{2,}):([0-5]\d):([0-5]\d)([.,])(\d{3}) --> (\d{2,}):([0-5]\d):([0-5]\d)([.,])(\d{3})")


def track(rows, end):
    cues, made = [], CueTrack()
    for time, text in rows:
        cues.append(made.add(time, text))
    return [cue for cue in [*cues, made.finish(end)] if cue]


def write(name, cues):
    style = SUBTITLES[name]()
    return style.header + "".join(style.encode(cue) for cue in cues)


def parse(name, text):
    """Cues of a file, read strictly. AssertionError where it is not what the format says."""
    if name == "vtt":
        assert text.startswith("WEBVTT\n\n")
        text = text.removeprefix("WEBVTT\n\n")
    assert not text or text.endswith("\n\n")
    cues = []
    for number, block in enumerate(text[:-2].split("\n\n") if text else [], start=1):
        lines = block.split("\n")
        if name == "srt":
            assert lines.pop(0) == str(number)
        numbers = _TIMES.fullmatch(lines.pop(0)).groups()
        assert numbers[3] == numbers[8] == ("," if name == "srt" else ".")
        start, end = (
            ((int(h) * 60 + int(m)) * 60 + int(s)) * 1000 + int(ms) for h, m, s, _, ms in (numbers[:5], numbers[5:])
        )
        assert lines and all(line.strip() and "-->" not in line for line in lines)
        words = "\n".join(lines)
        if name == "vtt":
            assert not re.search(r"[<>]|&(?!amp;|lt;|gt;)", words)
            words = html.unescape(words)
        cues.append(Cue(start, end, words.replace("\u2060", "")))
    assert all(cue.start < cue.end for cue in cues)
    assert all(a.end <= b.start for a, b in zip(cues, cues[1:], strict=False))
    return cues


def test_equal_words_are_one_cue_and_each_ends_where_the_next_begins():
    rows = [(0, "a"), (1, "a"), (2, "b"), (3.5, None), (5, "b"), (6, "a")]
    assert track(rows, 7.25) == [
        Cue(0, 2000, "a"),
        Cue(2000, 3500, "b"),
        Cue(5000, 6000, "b"),
        Cue(6000, 7250, "a"),
    ]


def test_no_words_make_no_cue_and_no_cue_lasts_no_time():
    assert track([(0, ""), (1, " \n "), (2, None)], 3) == []
    assert track([(0, "a"), (0.0004, "b"), (1, "c")], 1) == [Cue(0, 1000, "b")]
    assert track([], 5) == []


@pytest.mark.parametrize("name", ["srt", "vtt"])
def test_whatever_the_words_are_the_file_is_read_back(name):
    awkward = [
        "a --> b", "<b>bold</b> & <i>", "1 < 2 > 1 &amp; &lt;", "two\n\n\nlines\r\n\r\nthree", "\x1b[31mred\t\x00",
        "{\\an8}top", "  spaced  ", "-->", "日本語 🙂", "WEBVTT", "7", "NOTE this", "00:00:01.000 --> 00:00:02.000",
    ]  # fmt: skip
    random.Random(3).shuffle(awkward)
    cues = track([(number * 1.5, text) for number, text in enumerate(awkward)], 100)
    found = parse(name, write(name, cues))
    assert [(cue.start, cue.end) for cue in found] == [(cue.start, cue.end) for cue in cues]
    assert len(found) == len(awkward)
    for cue, expected in zip(found, cues, strict=True):
        assert cue.text == (expected.text.replace("-->", "->") if name == "srt" else expected.text)


def test_srt_shows_what_would_be_taken_for_a_tag():
    written = write("srt", [Cue(0, 1, "<b>x</b> 1 < 2 {\\an8}")])
    assert not re.search(r"</?\w|\{\\", written) and "1 < 2" in written


def test_clocks():
    assert clock(0) == "00:00:00.000"
    assert clock(3_723_004, ",") == "01:02:03,004"
    assert clock(360_000_000) == "100:00:00.000"


def test_webvtt_py_reads_it(tmp_path):
    webvtt = pytest.importorskip("webvtt")
    cues = track([(0, "one & <two>"), (3599.9996, "two\n\nlines"), (3601, "end")], 3602.5)
    (tmp_path / "a.vtt").write_text(write("vtt", cues), encoding="utf-8")
    found = webvtt.read(str(tmp_path / "a.vtt"))
    assert [(cue.start, cue.end) for cue in found] == [
        ("00:00:00.000", "01:00:00.000"),
        ("01:00:00.000", "01:00:01.000"),
        ("01:00:01.000", "01:00:02.500"),
    ]
    assert [html.unescape(cue.raw_text) for cue in found] == ["one & <two>", "two\nlines", "end"]


def test_pysrt_reads_it(tmp_path):
    pysrt = pytest.importorskip("pysrt")
    cues = track([(0, "one & two"), (3599.9996, "two\n\nlines"), (3601, "end")], 3602.5)
    (tmp_path / "a.srt").write_text(write("srt", cues), encoding="utf-8")
    found = pysrt.open(str(tmp_path / "a.srt"), error_handling=pysrt.ERROR_RAISE)
    assert [(cue.index, cue.start.ordinal, cue.end.ordinal, cue.text) for cue in found] == [
        (1, 0, 3_600_000, "one & two"),
        (2, 3_600_000, 3_601_000, "two\nlines"),
        (3, 3_601_000, 3_602_500, "end"),
    ]
