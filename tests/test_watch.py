"""`mlx-fastvlm watch`, and `describe` of a video: options, output and ends, with the demo model."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

av = pytest.importorskip("av")

from mlx_fastvlm import load  # noqa: E402
from mlx_fastvlm.cli.watch import parse_time  # noqa: E402
from mlx_fastvlm.errors import OptionError  # noqa: E402
from tests.test_video_cues import parse  # noqa: E402
from tests.video_clips import SCENE_SEEDS, scene, write_clip  # noqa: E402

PICTURES, CAPTIONS = zip(*map(scene, SCENE_SEEDS), strict=True)


@pytest.fixture(scope="module")
def demo():
    return load("demo")


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """clip.mp4: each of four scenes for two seconds, ten frames a second."""
    folder = tmp_path_factory.mktemp("clips")
    write_clip(folder / "clip.mp4", [picture for picture in PICTURES for _ in range(20)])
    return folder


@pytest.fixture
def run(command_line, monkeypatch, demo, clips, tmp_path):
    """Run a command beside clip.mp4, with a demo model that is loaded once: arguments → (exit code, stdout, stderr)."""
    (tmp_path / "clip.mp4").write_bytes((clips / "clip.mp4").read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mlx_fastvlm.cli.watch_run.load_model", lambda *args: demo)
    return lambda *arguments, command="watch": command_line(command, *arguments, "--model", "demo")


def rows(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


LINES = [f"00:00:0{2 * number}.000  {caption}" for number, caption in enumerate(CAPTIONS)]


def test_a_frame_a_second_is_looked_at_and_those_that_changed_are_printed(run):
    code, out, err = run("clip.mp4")
    assert code == 0 and out.splitlines() == LINES
    assert re.fullmatch(r"8 frames: 4 described, 4 had not changed; \d+\.\d s \(\d+\.\d/s\)\.\n", err)


def test_describe_does_the_same_with_a_video(run, monkeypatch, demo):
    monkeypatch.setattr("mlx_fastvlm.cli.describe.load_model", lambda *args: demo)
    assert run("clip.mp4", command="describe") == (0, "\n".join(LINES) + "\n", "")
    code, out, err = run("clip.mp4", "What is in the center?", "--json", "--stats", command="describe")
    found = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and err.startswith("8 frames: 4 described")
    assert [row["time"] for row in found] == [0, 1, 2, 3, 4, 5, 6, 7]
    assert {row["prompt"] for row in found} == {"What is in the center?"}


@pytest.mark.parametrize(
    ("arguments", "times"),
    [
        (["--every", "2.5s"], [0, 2.5, 5, 7.5]),
        (["--every", "3s", "--start", "1"], [1, 4, 7]),
        (["--every", "500ms", "--start", "0:03", "--end", "4.1s"], [3, 3.5, 4]),
        (["--max-fps", "0.25"], [0, 4]),
        (["--fps", "10", "--end", "0.35"], [0, 0.1, 0.2, 0.3]),
        (["--every", "0", "--start", "7.8"], [7.8, 7.9]),
        (["--on-change"], [0, 2, 4, 6]),
        (["--on-change", "--every", "3s"], [0, 3, 6]),
        (["--on-change", "--threshold", "1"], [0]),
    ],
)
def test_which_frames_get_a_row(run, arguments, times):
    code, out, _ = run("clip.mp4", "--format", "jsonl", "--max-tokens", 1, *arguments)
    assert code == 0
    assert [json.loads(line)["time"] for line in out.splitlines()] == pytest.approx(times, abs=0.001)


def test_a_threshold_of_nothing_describes_every_frame(run):
    _, out, err = run("clip.mp4", "--format", "jsonl", "--threshold", 0, "--max-tokens", 1)
    assert err.startswith("8 frames: 8 described, 0 had not changed")
    assert not any("reused" in json.loads(line) for line in out.splitlines())


@pytest.mark.parametrize("name", ["srt", "vtt"])
def test_subtitles_tell_each_scene_while_it_is_shown(run, name):
    for arguments in (["--every", "0.5s"], ["--on-change"]):
        assert run("clip.mp4", "--out", f"a.{name}", "--overwrite", *arguments)[0] == 0
        cues = parse(name, Path(f"a.{name}").read_text(encoding="utf-8"))
        assert [(cue.start, cue.end, cue.text) for cue in cues] == [
            (2000 * number, 2000 * number + 2000, caption) for number, caption in enumerate(CAPTIONS)
        ]
    code, out, _ = run("clip.mp4", "--format", name, "--end", "3s")
    assert [cue.end for cue in parse(name, out)] == [2000, 3000]


def test_rows_of_a_file_are_the_same_in_every_run(run):
    for name in ("a.jsonl", "b.jsonl"):
        assert run("clip.mp4", "--out", name)[:2] == (0, "")
    assert Path("a.jsonl").read_bytes() == Path("b.jsonl").read_bytes()
    assert [row["caption"] for row in rows("a.jsonl")] == [caption for caption in CAPTIONS for _ in range(2)]


@pytest.mark.parametrize("choice", [["--every", "0.5s"], ["--on-change", "--max-fps", "5"], ["--threshold", "0"]])
def test_a_run_goes_on_as_if_it_had_not_been_stopped(run, choice):
    arguments = ["--max-tokens", 6, *choice]
    run("clip.mp4", "--out", "whole.jsonl", *arguments)
    whole = Path("whole.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    for kept in range(len(lines)):
        Path("cut.jsonl").write_bytes(b"".join(lines[:kept]) + lines[kept][:20])
        code, _, err = run("clip.mp4", "--out", "cut.jsonl", *arguments)
        assert code == 0 and Path("cut.jsonl").read_bytes() == whole
    assert run("clip.mp4", "--out", "cut.jsonl", *arguments)[0] == 0
    assert Path("cut.jsonl").read_bytes() == whole


def test_a_later_start_goes_on_there(run):
    run("clip.mp4", "--out", "a.jsonl", "--end", "3s")
    assert run("clip.mp4", "--out", "a.jsonl", "--start", "5s")[0] == 0
    found = rows("a.jsonl")
    assert [row["time"] for row in found] == [0, 1, 2, 5, 6, 7]
    assert [row["caption"] for row in found[3:]] == [CAPTIONS[2], CAPTIONS[3], CAPTIONS[3]]


@pytest.mark.parametrize("arguments", [[], ["--start", "4.85"]])
def test_an_earlier_start_than_that_of_the_rows_is_refused(run, arguments):
    run("clip.mp4", "--out", "a.jsonl", "--start", "5s", "--end", "6s")
    before = Path("a.jsonl").read_bytes()
    code, _, err = run("clip.mp4", "--out", "a.jsonl", *arguments)
    assert code == 1 and err.count("\n") == 1 and "a.jsonl begins at 5 s and cannot be gone on with" in err
    assert Path("a.jsonl").read_bytes() == before
    assert run("clip.mp4", "--out", "a.jsonl", "--start", "4.95", "--end", "7s")[0] == 0, "no frame is in between"
    assert [row["time"] for row in rows("a.jsonl")] == pytest.approx([5, 6], abs=0.06)


@pytest.mark.parametrize("batch", [[], ["--batch-size", 4]])
def test_a_live_source_is_described_as_it_comes(run, batch):
    source = "lavfi:testsrc=size=256x256:rate=20,realtime"
    code, out, err = run(source, "--end", "2s", "--out", "live.jsonl", "--max-tokens", 2, "--threshold", 0, *batch)
    assert (code, out) == (0, "")
    found = rows("live.jsonl")
    assert [row["time"] for row in found] == sorted(row["time"] for row in found)
    assert all(row["latency"] >= 0 and row["at"].startswith("20") for row in found)
    came, described, dropped = re.match(r"(\d+) frames came: (\d+) described, 0 .*?, (\d+) dropped", err).groups()
    assert int(described) == len(found)
    assert int(came) == int(dropped) + len(found)
    assert sum(row["dropped"] for row in found) <= int(dropped)
    assert re.search(r"From frame to description \d+ ms on average, \d+ ms at most\.\n", err)
    assert "--overwrite" in run(source, "--end", "1s", "--out", "live.jsonl")[2], "what was seen live is not replaced"
    assert rows("live.jsonl") == found


def test_a_bar_only_where_somebody_looks_at_it(run, monkeypatch):
    arguments = ["clip.mp4", "--max-tokens", 1, "--out"]
    assert "of video" not in run(*arguments, "a.jsonl")[2]
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes stderr for a terminal
    code, out, err = run(*arguments, "b.jsonl")
    assert (code, out) == (0, "") and "s of video/s" in err and "7/8" in err


def test_a_cut_file_is_described_as_far_as_it_goes(run):
    whole = write_clip("whole.mkv", [picture for picture in PICTURES for _ in range(20)])
    data = whole.read_bytes()
    Path("cut.mkv").write_bytes(data[: int(0.7 * len(data))])
    code, out, err = run("cut.mkv")
    assert code == 0 and out.splitlines() == LINES[: len(out.splitlines())] != []
    assert re.search(r"^Note: cut.mkv ends at \d\.\d s though it should have 8\.0 s: it may be cut off\.$", err, re.M)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["missing.mp4"], "missing.mp4 does not exist."),
        (["clip.mp4", "--every", "soon"], '--every is "soon"; expected a time as 90s, 500ms, 1m30s or 1:30.'),
        (["clip.mp4", "--every", "1s", "--max-fps", "2"], "Both --every and --max-fps are given"),
        (["clip.mp4", "--max-fps", "0"], "--max-fps is 0; expected a number above 0."),
        (["clip.mp4", "--max-fps", "nan"], "--max-fps is nan; expected a number above 0."),
        (["clip.mp4", "--threshold", "2"], "--threshold"),
        (["clip.mp4", "--start", "9"], "--start is 9 s, but clip.mp4 ends at 8.0 s."),
        (["clip.mp4", "--start", "5", "--end", "1:00:00"], None),
        (["clip.mp4", "--start", "5", "--end", "2"], "--end is 2 s and --start 5 s; --end must be later."),
        (["clip.mp4", "--start", "1.01", "--end", "1.05"], "No frame of clip.mp4 lies between --start and --end."),
        (["clip.mp4", "--out", "a.doc"], "unknown suffix: give .jsonl, .srt or .vtt"),
        (["clip.mp4", "--resolution", "100"], "100"),
        (["clip.mp4", "--prompt", "x", "--preset", "brief"], "Both --prompt and --preset are given"),
        (["lavfi:testsrc=rate=5,realtime", "--start", "3"], "is live and has no --start"),
        (["-"], "A video cannot be read from standard input"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(run, arguments, words):
    code, out, err = run(*arguments, "--max-tokens", 1)
    if words is None:
        assert code == 0
        return
    assert code == 1 and out == ""
    assert words in err and err.startswith("mlx-fastvlm: ") and err.count("\n") == 1


def test_without_the_extra_the_way_to_it_is_told(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    assert run("clip.mp4") == (
        1,
        "",
        "mlx-fastvlm: Videos need the av package: run `pip install 'mlx-fastvlm[video]'`.\n",
    )


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("1.5", 1.5), (".5", 0.5), ("90s", 90), ("500ms", 0.5), ("1m30s", 90), ("2h", 7200), ("1h1m1s1ms", 3661.001),
     ("1:30", 90), ("90:00", 5400), ("1:02:03.5", 3723.5), (" 2s ", 2)],
)  # fmt: skip
def test_times_as_people_write_them(text, seconds):
    assert parse_time(text, "--start") == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "s", "-1", "1:60", "1:2:3:4", "5x", "1s2", "1e3", "inf", "١"])
def test_odd_times_are_refused(text):
    with pytest.raises(OptionError, match="--end is"):
        parse_time(text, "--end")


def start(folder, *arguments):
    """The command in a process of its own, in a session that Ctrl-C can be sent to."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    script = "import sys; from mlx_fastvlm import cli; sys.argv[0] = 'mlx-fastvlm'; cli.main()"
    command = [sys.executable, "-c", script, "watch", *map(str, arguments), "--model", "demo"]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for(happens, process):
    until = time.monotonic() + 120
    while not happens():
        if process.poll() is not None or time.monotonic() > until:
            process.kill()
            pytest.fail(f"It did not happen: {process.communicate()}")
        time.sleep(0.02)


@pytest.mark.parametrize("name", ["live.vtt", "live.jsonl"])
def test_ctrl_c_ends_a_live_run_with_a_whole_file(tmp_path, name):
    out = tmp_path / name
    changing = "lavfi:color=red:size=256x256:rate=20,hue=h=t*180,realtime"  # in half a turn red becomes cyan
    question = ("--prompt", "what color is the background?")  # a cue ends when the answer becomes another
    process = start(tmp_path, changing, *question, "--out", name, "--max-tokens", 4, "--threshold", 0)
    wait_for(lambda: out.exists() and out.stat().st_size > 8, process)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert re.search(r"\d+ frames came: \d+ described", err) and err.endswith("Stopped.\n")
    if name.endswith("vtt"):
        assert parse("vtt", out.read_text(encoding="utf-8"))
    else:
        assert out.read_text().endswith("}\n") and rows(out)


def test_ctrl_c_during_a_file_says_how_to_go_on_and_that_works(tmp_path):
    write_clip(tmp_path / "long.mp4", [scene(seed)[0] for seed in range(600)], rate=1)
    out = tmp_path / "a.jsonl"
    arguments = ["long.mp4", "--out", "a.jsonl", "--threshold", 0, "--max-tokens", 24, "--batch-size", 2]
    process = start(tmp_path, *arguments)
    wait_for(lambda: out.exists() and out.stat().st_size > 0, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "The same command goes on from there." in err
    before = rows(out)
    assert 0 < len(before) < 600
    assert f"{len(before)} frames: {len(before)} described, 0 had not changed" in err
    process = start(tmp_path, *arguments, "--end", f"{before[-1]['time'] + 5:g}s")
    assert process.wait(timeout=120) == 0
    after = rows(out)
    assert after[: len(before)] == before
    assert [row["time"] for row in after] == list(range(len(after))) and len(after) == len(before) + 4
