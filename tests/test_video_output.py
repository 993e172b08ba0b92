"""Files of descriptions: whole at any moment, gone on with where that can be done, and never lost by mistake."""

import fcntl
import json

import pytest

from mlx_fastvlm.captions.rows import Recipe
from mlx_fastvlm.errors import FastVLMError, OptionError
from mlx_fastvlm.video.describing import FrameCaption
from mlx_fastvlm.video.output import JsonLines, OutputFile, Printed, Subtitles, TextLines, make_format
from mlx_fastvlm.video.rows import FrameRow

RECIPE = Recipe("demo", "Describe this image.", {"every": 1.0})
FRAMES = [
    FrameCaption(0.0, "One shape.", finish_reason="stop", tokens=4),
    FrameCaption(1.0, "One shape.", finish_reason="stop", tokens=4, change=0.0, reused=True),
    FrameCaption(2.0, "Two shapes.", finish_reason="length", tokens=5, change=0.25),
    FrameCaption(3.0, None, error="It is too narrow.", change=1.0),
    FrameCaption(4.0, None, error="It is too narrow.", change=0.0, reused=True),
]


def row(frame, source="clip.mp4", recipe=RECIPE):
    return FrameRow(source, frame, recipe)


def write(path, frames, *, form=None, recipe=RECIPE, source="clip.mp4", end=None, can_resume=True, overwrite=False):
    output = OutputFile(
        path, form or make_format(None, path), source, recipe, can_resume=can_resume, overwrite=overwrite
    )
    try:
        for frame in frames:
            output.add(row(frame, source, recipe))
        if end is not None:
            output.finish(end)
        return output
    finally:
        output.close()


def test_rows_are_read_back_as_they_were():
    live = FrameRow(
        "camera 0", FrameCaption(1.5, "x", latency=0.25, dropped=3, change=0.5), RECIPE, at="2026-01-01T00:00"
    )
    for one in (*map(row, FRAMES), live):
        assert FrameRow.from_json(one.to_json()) == one
    assert json.loads(row(FRAMES[0]).to_json()) == {
        "source": "clip.mp4",
        "time": 0.0,
        "caption": "One shape.",
        "finish_reason": "stop",
        "tokens": 4,
        "model": "demo",
        "prompt": "Describe this image.",
        "options": {"every": 1.0},
    }


def test_a_name_that_is_no_text_is_kept():
    one = row(FRAMES[0], source="clip\udcff.mp4")
    assert FrameRow.from_json(one.to_json().encode()) == one


@pytest.mark.parametrize("stop", range(len(FRAMES) + 1))
def test_a_run_that_was_killed_goes_on_where_it_was(tmp_path, stop):
    write(tmp_path / "whole.jsonl", FRAMES, end=5.0)
    whole = (tmp_path / "whole.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    path = tmp_path / "cut.jsonl"
    path.write_bytes(b"".join(lines[:stop]) + (lines[stop][:-9] if stop < len(lines) else b""))
    state = write(path, FRAMES[stop:], end=5.0)
    assert path.read_bytes() == whole
    assert state.last == (FRAMES[stop - 1] if stop else None)
    assert state.last_new == ([frame for frame in FRAMES[:stop] if not frame.reused] or [None])[-1]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a text of mine", "it is no JSON Lines file"),
        ('{"path": "a.png", "caption": "x"}\n', "its line 1 cannot be read (it has other fields)"),
        (row(FRAMES[0], source="other.mp4").to_json() + "\n", "it is about other.mp4"),
        (row(FRAMES[0], recipe=Recipe("demo", "What?")).to_json() + "\n", "made with another model, prompt or options"),
        (row(FRAMES[0]).to_json() + "\n[]\n", "its line 2 cannot be read"),
        (row(FRAMES[0]).to_json() + '\n{"source": "clip.mp4", "time": "now"}\n', "its fields have other values"),
        (row(FRAMES[0]).to_json() + '\n{"source": "clip.mp4", "time": 1}\n', "a field is missing"),
    ],
)
def test_what_is_not_of_this_run_is_left_alone_until_told(tmp_path, content, words):
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(OptionError) as error:
        write(path, FRAMES)
    assert words in str(error.value) and "--overwrite" in str(error.value)
    assert path.read_text() == content
    write(path, FRAMES[:1], overwrite=True, end=1.0)
    assert path.read_text() == row(FRAMES[0]).to_json() + "\n"


@pytest.mark.parametrize(("name", "can_resume"), [("a.srt", True), ("a.vtt", True), ("a.jsonl", False)])
def test_what_cannot_be_gone_on_with_is_left_alone_until_told(tmp_path, name, can_resume):
    path = tmp_path / name
    write(path, FRAMES, end=5.0, can_resume=can_resume)
    content = path.read_bytes()
    with pytest.raises(OptionError, match="is there already: give another --out, or replace it with --overwrite"):
        write(path, FRAMES, can_resume=can_resume)
    output = write(path, [], overwrite=True, end=5.0, can_resume=can_resume)
    assert path.read_bytes() == content, "nothing came, so nothing was replaced"
    assert not output.can_resume
    write(path, FRAMES[:1], overwrite=True, end=1.0, can_resume=can_resume)
    assert 0 < path.stat().st_size < len(content)


@pytest.mark.parametrize("name", ["srt", "vtt"])
def test_subtitles_are_whole_after_every_frame(tmp_path, name):
    path = tmp_path / f"a.{name}"
    output = OutputFile(path, Subtitles(name), "clip.mp4", RECIPE, can_resume=True)
    seen = []
    for frame in FRAMES:
        output.add(row(frame))
        seen.append(path.read_text())
    output.finish(5.0)
    output.close()
    assert [text.count(" --> ") for text in seen] == [0, 0, 1, 2, 2]
    assert all(text.endswith("\n\n") or text == "" for text in seen)
    assert path.read_text() == seen[-1] and "Two shapes." in seen[-1]


def test_the_last_cue_ends_with_the_video(tmp_path):
    write(tmp_path / "a.vtt", FRAMES[:3], end=2.75)
    assert (tmp_path / "a.vtt").read_text().endswith("00:00:02.000 --> 00:00:02.750\nTwo shapes.\n\n")


def test_for_people_there_is_a_line_for_every_frame_that_was_described():
    printed = []
    output = Printed(TextLines(), printed.append)
    for frame in (*FRAMES, FrameCaption(3661.5, "a\n\tb\x1b[31m")):
        output.add(row(frame))
    output.finish(9.0)
    assert "".join(printed).splitlines() == [
        "00:00:00.000  One shape.",
        "00:00:02.000  Two shapes.",
        "01:01:01.500  a b [31m",
    ]


def test_subtitles_can_be_printed():
    printed = []
    output = Printed(Subtitles("vtt"), printed.append)
    output.add(row(FRAMES[0]))
    output.finish(1.5)
    assert "".join(printed) == "WEBVTT\n\n00:00:00.000 --> 00:00:01.500\nOne shape.\n\n"


def test_formats_are_named_or_follow_the_suffix(tmp_path):
    kinds = [
        type(make_format(*given)) for given in ((None, None), (None, tmp_path / "a.JSONL"), ("srt", tmp_path / "a"))
    ]
    assert kinds == [TextLines, JsonLines, Subtitles]
    with pytest.raises(OptionError, match="unknown suffix: give .jsonl, .srt or .vtt"):
        make_format(None, tmp_path / "a.doc")
    with pytest.raises(OptionError, match="The format doc is unknown"):
        make_format("doc", None)


def test_one_run_at_a_time(tmp_path):
    path = tmp_path / "a.jsonl"
    with path.open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(OptionError, match="is being written by another run"):
            write(path, FRAMES)


def test_a_place_that_takes_no_file_is_said(tmp_path):
    with pytest.raises(OptionError, match="cannot be written .*give another --out"):
        write(tmp_path / "missing" / "a.srt", FRAMES)


def test_a_full_disk_is_one_line_and_tears_nothing(tmp_path, monkeypatch):
    from mlx_fastvlm import locked_file

    path = tmp_path / "a.jsonl"
    write_all = locked_file.write_all

    def fill(file, data):
        file.write(data[:7])
        raise OSError(28, "No space left on device")

    output = OutputFile(path, JsonLines(), "clip.mp4", RECIPE, can_resume=True)
    output.add(row(FRAMES[0]))
    monkeypatch.setattr(locked_file, "write_all", fill)
    with pytest.raises(FastVLMError, match="cannot be written .No space left on device.. What is in it is kept."):
        output.add(row(FRAMES[1]))
    monkeypatch.setattr(locked_file, "write_all", write_all)
    output.close()
    assert path.read_text() == row(FRAMES[0]).to_json() + "\n"
