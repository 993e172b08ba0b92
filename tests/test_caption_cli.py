"""`mlx-fastvlm caption`: pictures in, captions out, and nothing lost or repeated whatever ends a run."""

import csv
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlx_fastvlm import generate, load
from mlx_fastvlm.kernels import cpu
from tests.demo_pictures import draw

QUESTION = "Describe this image."


@pytest.fixture(scope="module")
def demo():
    return load("demo")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Three pictures in ./photos, 1.png, 2.png and 10.png, and bad.png, which is none."""
    monkeypatch.chdir(tmp_path)
    photos = Path("photos")
    photos.mkdir()
    for number in (10, 2, 1):
        draw(photos / f"{number}.png", number)
    (photos / "bad.png").write_text("no picture")
    return photos


@pytest.fixture
def run(command_line, monkeypatch, demo):
    """Run the command in this process with a demo model that is loaded once: arguments → (exit code, stdout, stderr)."""
    monkeypatch.setattr("mlx_fastvlm.cli.caption.load_model", lambda *args: demo)
    return lambda *arguments, stdin=b"": command_line("caption", *arguments, "--model", "demo", stdin=stdin)


def rows(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def test_captions_are_those_of_generate_in_natural_order(run, folder, demo):
    code, out, err = run("photos")
    expected = [f"photos/{n}.png\t{generate(*demo, QUESTION, image=f'photos/{n}.png')}" for n in (1, 2, 10)]
    assert code == 0 and out.splitlines() == expected
    bad, summary = err.splitlines()
    assert bad.startswith("Bad: photos/bad.png is text: give an image file")
    assert summary.startswith("3 captioned (") and summary.endswith("/s), 1 bad.")


def test_a_name_cannot_break_a_line_or_command_the_terminal(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw(Path("a\n\tb\x1b[31m日.png"), 1)
    Path("bad\x1b[31m.png").touch()
    code, out, err = run(".", "--max-tokens", 1)
    assert code == 0
    assert out.startswith(r"a\n\tb\x1b[31m日.png" + "\t") and out.count("\n") == 1
    assert "[31m.png is empty" in err and "\x1b" not in err


def test_json_lines_on_standard_output(run, folder):
    code, out, _ = run("photos", "--json", "--max-tokens", 3, "--stop", "zzz", "--prompt", "What?")
    found = [json.loads(line) for line in out.splitlines()]
    assert [row["path"] for row in found] == [f"photos/{name}.png" for name in ("1", "2", "10", "bad")]
    assert found[0]["finish_reason"] == "length" and found[0]["tokens"] == 3
    assert found[0]["options"] == {"max_tokens": 3, "stop": ["zzz"]} and found[0]["prompt"] == "What?"
    assert "is text" in found[3]["error"] and "caption" not in found[3]


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_a_file_of_captions_is_gone_on_with(suffix, run, folder, monkeypatch):
    out = f"captions.{suffix}"
    assert run("photos/2.png", "--out", out)[0] == 0
    code, printed, err = run("photos", "--out", out)
    assert (code, printed) == (0, "")
    assert "2 captioned" in err and "1 finished before, 1 bad" in err
    content = Path(out).read_bytes()
    assert run("photos", "--out", "whole." + suffix)[0] == 0
    assert content == Path("whole." + suffix).read_bytes()
    if suffix == "csv":
        with open(out, newline="") as file:
            assert [row["path"] for row in csv.DictReader(file)][:2] == ["photos/1.png", "photos/2.png"]
    draw("photos/bad.png", 7)  # somebody mends it
    assert "1 captioned" in run("photos", "--out", out)[2]
    monkeypatch.setattr("mlx_fastvlm.cli.caption.load_model", None)  # not needed where nothing is to do
    code, _, err = run("photos", "--out", out)
    assert (code, err) == (0, "0 captioned, 4 finished before, 0 bad.\n")


def test_another_question_does_not_mix_with_a_files(run, folder):
    run("photos", "--out", "c.jsonl", "--max-tokens", 3)
    before = Path("c.jsonl").read_bytes()
    for other, made_with in (
        (["--prompt", "Why?", "--max-tokens", 3], 'the prompt "Describe this image."'),
        ([], "--max-tokens 3"),
        (["--max-tokens", 3, "--fit", "crop"], "--max-tokens 3"),
    ):
        code, _, err = run("photos", "--out", "c.jsonl", *other)
        assert code == 1 and f"c.jsonl holds captions made with {made_with}: use the same" in err
        assert Path("c.jsonl").read_bytes() == before
    assert run("photos", "--out", "c.jsonl", "--prompt", "Why?", "--max-tokens", 2, "--overwrite")[0] == 0
    assert [row["prompt"] for row in rows("c.jsonl")] == ["Why?"] * 4


def test_pictures_of_any_shape_are_captioned_at_another_resolution(run, folder, demo):
    shapes = {"1": (96, 40), "2": (40, 96), "10": (80, 80)}
    for name, size in shapes.items():
        Image.open(f"photos/{name}.png").resize(size).save(f"photos/{name}.png")
    code, _, err = run("photos", "--out", "c.jsonl", "--resolution", 192, "--fit", "native", "--max-tokens", 8)
    assert code == 0 and err.count("trained") == 2 and err.count("Note:") == 1
    found = rows("c.jsonl")
    assert [row["options"] for row in found] == [{"max_tokens": 8, "resolution": 192, "fit": "native"}] * 4
    for row in found:
        if "caption" in row:
            options = {"max_tokens": 8, "resolution": 192, "fit": "native"}
            assert row["caption"] == generate(*demo, QUESTION, row["path"], **options)
    code, _, err = run("photos", "--out", "c.jsonl", "--resolution", 128, "--max-tokens", 8)
    assert code == 1 and "resolution" in err


def test_overwriting_keeps_the_old_file_until_there_is_something_new(run, folder, monkeypatch):
    run("photos", "--out", "c.jsonl", "--max-tokens", 3)
    before = Path("c.jsonl").read_bytes()

    def fail(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("mlx_fastvlm.cli.caption.load_model", fail)
    code, _, err = run("photos", "--out", "c.jsonl", "--overwrite")
    assert code == 130 and "0 captioned, 4 not. The same command without --overwrite goes on from there." in err
    assert Path("c.jsonl").read_bytes() == before


def test_text_files_beside_the_pictures(run, folder, demo):
    Path("photos/2.txt").write_text("my own words")
    code, _, err = run("photos", "--out", "txt")
    assert code == 0 and "2 captioned" in err and "1 finished before, 1 bad" in err
    assert Path("photos/10.txt").read_text() == generate(*demo, QUESTION, image="photos/10.png") + "\n"
    assert Path("photos/2.txt").read_text() == "my own words"
    assert not Path("photos/bad.txt").exists()
    assert "0 captioned, 3 finished before, 1 bad" in run("photos", "--out", "txt")[2]
    run("photos/2.png", "--out", "txt", "--overwrite")
    assert Path("photos/2.txt").read_text() != "my own words"


def test_bad_pictures_change_the_exit_code_only_if_asked(run, folder):
    assert run("photos", "--out", "c.jsonl", "--max-tokens", 2)[0] == 0
    assert run("photos", "--out", "c.jsonl", "--max-tokens", 2, "--fail-on-bad")[0] == 1
    assert run("photos/1.png", "--out", "c.jsonl", "--max-tokens", 2, "--fail-on-bad")[0] == 0


def test_subfolders_and_lists(run, folder):
    os.mkdir("photos/more")
    draw("photos/more/1.png", 1)
    assert len(run("photos", "-r", "--max-tokens", 2)[1].splitlines()) == 4
    listed = b"photos/10.png\0photos/gone.png\0./photos/more\0photos/10.png"
    code, out, err = run("photos/2.png", "--files-from", "-", "--max-tokens", 2, stdin=listed)
    paths = [line.partition("\t")[0] for line in out.splitlines()]
    assert code == 0 and paths == ["photos/2.png", "photos/10.png", "photos/more/1.png"]
    assert "Bad: There is no file photos/gone.png" in err and "3 captioned" in err
    Path("list").write_bytes(listed.replace(b"\0", b"\n"))
    assert run("photos/2.png", "--files-from", "list", "--max-tokens", 2)[1] == out


def test_pages_of_a_document(run, folder):
    pytest.importorskip("pypdfium2")
    pages = [Image.open(f"photos/{n}.png").convert("RGB") for n in (1, 2)]
    pages[0].save("d.pdf", save_all=True, append_images=pages[1:])
    run("d.pdf", "--out", "c.jsonl")
    assert [(row["path"], row["page"]) for row in rows("c.jsonl")] == [("d.pdf", 1), ("d.pdf", 2)]
    assert run("d.pdf#page=2")[1].startswith("d.pdf#page=2\t")
    assert "0 captioned, 2 finished before" in run("d.pdf", "--out", "c.jsonl")[2]


def test_choices_and_schemas(run, folder):
    pytest.importorskip("llguidance")
    _, out, _ = run("photos", "--choices", "day,night")
    assert {line.partition("\t")[2] for line in out.splitlines()} <= {"day", "night"}
    Path("schema.json").write_text('{"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]}')
    run("photos/1.png", "--json-schema", "schema.json", "--out", "c.jsonl")
    (row,) = rows("c.jsonl")
    assert json.loads(row["caption"])["n"] in (1, 2)
    assert row["options"]["json_schema"].startswith("sha256:")


def test_metadata_goes_into_the_pictures_and_counts_as_finished(run, folder, demo):
    metadata = pytest.importorskip("mlx_fastvlm.captions.metadata")
    pytest.importorskip("exiv2")
    draw("photos/4.gif", 4)
    metadata.write_caption(Path("photos/2.png"), "my own words")
    pixels = [np.asarray(Image.open(f"photos/{n}.png")) for n in (1, 10)]
    code, out, err = run("photos", "--metadata")
    assert code == 0 and len(out.splitlines()) == 3
    assert "3 captioned" in err and "1 finished before" in err
    assert "Alternative text: 2 written, no place for it in 1 .gif." in err
    for n, before in zip((1, 10), pixels, strict=True):
        path = Path(f"photos/{n}.png")
        assert metadata.read_alt_text(path) == generate(*demo, QUESTION, image=path)
        np.testing.assert_array_equal(np.asarray(Image.open(path)), before)
    assert metadata.read_alt_text(Path("photos/2.png")) == "my own words"
    assert "3 finished before" in run("photos", "--metadata")[2]
    assert "1 kept as it was (--overwrite replaces it)" in run("photos/2.png", "--metadata", "--out", "c.jsonl")[2]
    assert "Alternative text: 1 written." in run("photos/2.png", "--metadata", "--overwrite")[2]


def test_metadata_without_the_extra(run, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "exiv2", None)
    code, out, err = run("photos", "--metadata")
    assert (code, out) == (1, "") and "pip install 'mlx-fastvlm[metadata]'" in err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "No picture is given: name pictures or folders"),
        (["photos", "gone"], "There is no file or folder gone: check the path."),
        (["-"], '"-" is no picture here'),
        (["empty"], "No picture was found in empty: --recursive also looks"),
        (["photos", "--out", "captions.txt"], "captions.txt has an unknown suffix: give a file that ends with .jsonl or .csv"),
        (["photos", "--out", "gone/c.csv"], "gone/c.csv cannot be written (No such file or directory)"),
        (["photos", "--out", "c.jsonl", "--json"], "--json is about what is printed"),
        (["photos", "--prompt", "a", "--preset", "brief"], "Both --prompt and --preset are given"),
        (["photos", "--temp", "1", "--top-p", "7"], "top_p"),
        (["--files-from", "gone.list"], "The list gone.list cannot be read (No such file or directory)"),
        (["https://example.org/a.png", "--out", "txt"], "https://example.org/a.png has no folder for a text file"),
        (["photos", "--prompt", "<image> <image>"], "marks in the prompt, 2"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_before_anything_is_done(arguments, expected, run, folder):
    os.mkdir("empty")
    code, out, err = run(*arguments)
    assert (code, out, err.count("\n")) == (1, "", 1) and expected in err


def test_help_teaches_with_examples(run):
    code, out, _ = run("--help")
    assert code == 0 and "mlx-fastvlm caption photos/ --recursive --out captions.jsonl" in out


def test_a_bar_only_where_somebody_looks_at_it(run, folder, monkeypatch):
    arguments = ["photos", "--max-tokens", 2, "--out"]
    assert "pictures/s" not in run(*arguments, "a.jsonl")[2]
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes stderr for a terminal
    code, out, err = run(*arguments, "b.jsonl")
    assert (code, out) == (0, "")
    assert "pictures/s, 1 bad" in err and "4/4" in err and "Bad: photos/bad.png is text" in err


def test_a_full_disk_is_one_line_and_tears_nothing(run, folder, monkeypatch):
    from mlx_fastvlm import locked_file

    write, written = locked_file.write_all, []

    def fill(file, data):
        written.append(data)
        if len(written) == 2:
            file.write(data[:7])
            raise OSError(28, "No space left on device")
        write(file, data)

    monkeypatch.setattr(locked_file, "write_all", fill)
    code, _, err = run("photos", "--out", "c.jsonl", "--max-tokens", 3)
    assert code == 1 and err.count("\n") == 1
    assert "c.jsonl cannot be written (No space left on device). The captions in it are kept" in err
    (row,) = rows("c.jsonl")
    monkeypatch.setattr(locked_file, "write_all", write)
    assert run("photos", "--out", "c.jsonl", "--max-tokens", 3)[0] == 0
    assert len(rows("c.jsonl")) == 4 and rows("c.jsonl")[0] == row


# Runs that are stopped


def start(*arguments):
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from mlx_fastvlm.cli import main; main()",
            "caption",
            *map(str, arguments),
            "--model",
            "demo",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for_rows(path, number, process):
    """Until the file has so many rows, or the process has ended."""
    while process.poll() is None and (not path.exists() or path.read_bytes().count(b"\n") < number):
        time.sleep(0.005)


@pytest.fixture
def many(tmp_path, monkeypatch):
    """Make the folder ./many with so many pictures, of which 7.png is none."""
    monkeypatch.chdir(tmp_path)

    def make(number_of_pictures):
        os.mkdir("many")
        for number in range(number_of_pictures):
            draw(f"many/{number}.png", number)
        (tmp_path / "many" / "7.png").write_text("no picture")

    return make


def test_a_run_that_is_killed_again_and_again_equals_one_that_is_not(many, run):
    rng = random.Random(0)
    pictures = 60 if cpu.missing() is None else 20  # without the fast path on a CPU each takes 0.15 s
    many(pictures)
    killed, whole = Path("killed.jsonl"), Path("whole.jsonl")
    options = ["many", "--max-tokens", 8]
    for kills in range(4):
        process = start(*options, "--out", killed)
        if kills < 3:
            wait_for_rows(killed, (kills + rng.random() / 2) * pictures // 4, process)
            time.sleep(rng.random() / 50)
            process.kill()
        _, err = process.communicate()
        assert process.returncode == (-signal.SIGKILL if kills < 3 else 0), err
    assert run(*options, "--out", whole)[0] == 0
    assert [row["path"] for row in rows(killed)] == [f"many/{number}.png" for number in range(pictures)]
    assert killed.read_bytes() == whole.read_bytes()
    assert sorted(os.listdir(".")) == ["killed.jsonl", "many", "whole.jsonl"]


def test_ctrl_c_stops_at_once_and_says_how_to_go_on(many):
    many(60)
    process = start("many", "--out", "c.jsonl")
    wait_for_rows(Path("c.jsonl"), 8, process)
    process.send_signal(signal.SIGINT)
    asked = time.monotonic()
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130 and time.monotonic() - asked < 5
    assert "captioned, " in err and "The same command goes on from there." in err and "Traceback" not in err
    done = rows("c.jsonl")
    assert 8 <= len(done) < 60
    captioned = sum("caption" in row for row in done)
    said = int(re.search(r"(\d+) captioned, \d+ not", err)[1])
    assert captioned - 1 <= said <= captioned  # it may fall between writing a row and counting it
