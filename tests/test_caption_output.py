"""Files of captions: whatever moment a run is killed at, the next one loses nothing, repeats nothing, keeps the order."""

import csv
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mlx_fastvlm.captions import output as caption_output
from mlx_fastvlm.captions.output import CaptionFile, Sidecars
from mlx_fastvlm.captions.picture_files import Picture
from mlx_fastvlm.captions.rows import COLUMNS, CaptionRow, Recipe, row_format
from mlx_fastvlm.errors import FastVLMError, OptionError

RECIPE = Recipe("demo", 'Say "what", please,\nin one line.', {"max_tokens": 9, "stop": ["\n"]})
PICTURES = [Picture("a.jpg"), Picture("b,ü.jpg"), Picture("d.pdf", 1), Picture("d.pdf", 2), Picture("\udcff\r.png")]
CAPTIONS = ["one, two", 'A "quoted"\nsecond line\r\n', "", "ünï ❤", "plain"]
SUFFIXES = ["jsonl", "csv"]


def rows(pictures=PICTURES, recipe=RECIPE):
    made = zip(pictures, CAPTIONS, strict=False)
    return [
        CaptionRow(p.path, p.page, recipe, text, finish_reason="stop", tokens=i) for i, (p, text) in enumerate(made)
    ]


def error_row(picture):
    return CaptionRow(picture.path, picture.page, RECIPE, error="It is damaged.")


def write(path, new_rows, pictures=PICTURES, finish=True, **options):
    output = CaptionFile(path, RECIPE, pictures, **options)
    for row in new_rows:
        output.add(row)
    if finish:
        output.finish()
    output.close()


def read(path):
    """What a reader that knows nothing of us finds."""
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_bytes().decode().splitlines()]
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


@pytest.fixture(params=SUFFIXES)
def path(request, tmp_path):
    return tmp_path / f"captions.{request.param}"


def test_rows_as_others_read_them(path):
    write(path, [*rows()[:4], error_row(PICTURES[4])])
    found = read(path)
    assert [row["path"] for row in found] == [picture.path for picture in PICTURES]
    assert [row.get("caption") or "" for row in found] == [*CAPTIONS[:4], ""]
    assert [str(row.get("page") or "") for row in found] == ["", "", "1", "2", ""]
    assert found[4]["error"] == "It is damaged." and not found[0].get("error")
    assert {(row["model"], row["prompt"]) for row in found} == {("demo", RECIPE.prompt)}
    options = found[0]["options"]
    assert (json.loads(options) if path.suffix == ".csv" else options) == {"max_tokens": 9, "stop": ["\n"]}
    if path.suffix == ".csv":
        assert path.read_bytes().startswith(",".join(COLUMNS).encode() + b"\r\n")
    else:
        assert "page" not in found[0] and "tokens" not in found[4] and found[3]["caption"] == "ünï ❤"
        assert "ünï ❤".encode() in path.read_bytes()


@pytest.mark.parametrize("row", [*rows(), error_row(PICTURES[2]), replace(rows()[0], recipe=Recipe("m", ""))])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_records_give_their_rows_back(row, suffix):
    form = row_format(Path(f"x.{suffix}"))
    assert form.decode(form.encode(row)) == row


def test_a_run_goes_on_whatever_byte_it_was_killed_at(path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # takes most of the time
    write(path, rows())
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        output = CaptionFile(path, RECIPE, PICTURES)
        kept = path.read_bytes()
        assert whole.startswith(kept) and len(kept) <= max(length, len(output._format.header))
        todo = [row for row in rows() if not output.is_finished(Picture(row.path, row.page))]
        for row in todo:
            output.add(row)
        output.finish()
        output.close()
        assert path.read_bytes() == whole
        assert len(todo) == len(rows()) - len(kept and list(_records(kept, path)))


def _records(content, path):
    """The complete records in a file of rows."""
    scratch = path.with_name("scratch")
    scratch.write_bytes(content)
    with open(scratch, "rb") as file:
        yield from [record for record, is_complete in row_format(path).records(file) if is_complete]


def test_a_power_failure_may_leave_null_bytes(path):
    write(path, rows()[:2])
    kept = path.read_bytes()
    path.write_bytes(kept + bytes(100))
    write(path, [])
    assert path.read_bytes() == kept


def test_bad_pictures_are_tried_again_and_end_up_in_their_place(path):
    write(path, rows())
    whole = path.read_bytes()
    path.unlink()
    first = rows()
    first[1], first[3] = error_row(PICTURES[1]), error_row(PICTURES[3])
    write(path, first)
    assert len(read(path)) == 5
    output = CaptionFile(path, RECIPE, PICTURES)
    assert [output.is_finished(picture) for picture in PICTURES] == [True, False, True, False, True]
    assert len(read(path)) == 3  # no row of a picture that will get another one
    output.add(rows()[1])
    output.close()  # killed
    write(path, [rows()[3]])
    assert path.read_bytes() == whole
    write(path, [])
    assert path.read_bytes() == whole


def test_pictures_added_later_are_sorted_in(path):
    write(path, [rows()[0], rows()[4]], [PICTURES[0], PICTURES[4]])
    write(path, rows()[1:4])
    assert [row["path"] for row in read(path)] == [picture.path for picture in PICTURES]


def test_other_pictures_in_the_file_stay(path):
    other = Recipe("demo", "Another prompt")
    output = CaptionFile(path, other, PICTURES[:2])
    output.add(rows(recipe=other)[0])
    output.add(error_row(PICTURES[1]))
    output.close()
    write(path, rows()[2:], PICTURES[2:])
    assert [row["path"] for row in read(path)] == [picture.path for picture in PICTURES]
    write(path, [], PICTURES[2:])
    assert len(read(path)) == 5 and read(path)[1]["error"]


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (replace(RECIPE, model="other"), "captions made with --model demo: use the same"),
        (replace(RECIPE, prompt="Why?"), 'the prompt "Say'),
        (replace(RECIPE, options={}), "--max-tokens 9 --stop ['\\n']"),
    ],
)
def test_captions_of_another_recipe_are_not_mixed_in(path, recipe, expected):
    write(path, rows()[:3])
    before = path.read_bytes()
    with pytest.raises(OptionError) as caught:
        CaptionFile(path, recipe, PICTURES)
    assert expected in str(caught.value)
    assert path.read_bytes() == before
    output = CaptionFile(path, recipe, PICTURES, overwrite=True)
    assert not any(output.is_finished(picture) for picture in PICTURES)
    assert path.read_bytes() == before  # until there is something new
    output.add(rows(recipe=recipe)[0])
    output.close()
    assert len(read(path)) == 1


@pytest.mark.parametrize(
    "content",
    [
        b"hello",
        b'{"url": "x", "text": "y"}\n',
        b'{"path": "x"}\n',
        b'{"path": "x", "caption": 3, "model": "m", "prompt": "p"}\n',
        b"[1]\n",
        b"path,text\r\na,b\r\n",
        ",".join(COLUMNS).encode() + b"\r\na,b\r\n",
        ",".join(COLUMNS).encode() + b'\r\n"a"x,,,,,,,,\r\n',
    ],
)
def test_a_file_of_something_else_is_left_alone(path, content):
    path.write_bytes(content)
    with pytest.raises(OptionError, match="holds something other than captions: .* Give another --out"):
        CaptionFile(path, RECIPE, PICTURES)
    assert path.read_bytes() == content


def test_damage_within_a_file_is_not_passed_over(path):
    write(path, rows())
    content = path.read_bytes()
    place = content.index(b"d.pdf")
    path.write_bytes(content[:place] + b'"\n' + content[place:])
    with pytest.raises(OptionError, match="row 3 cannot be read"):
        CaptionFile(path, RECIPE, PICTURES)


def test_two_runs_do_not_write_one_file(path):
    write(path, [rows()[0], error_row(PICTURES[1])])
    output = CaptionFile(path, RECIPE, PICTURES)  # replaces the file, to take the error out
    program = (
        "import sys; from pathlib import Path; from mlx_fastvlm.captions.output import CaptionFile;"
        "from mlx_fastvlm.captions.rows import Recipe; CaptionFile(Path(sys.argv[1]), Recipe('', ''), [])"
    )
    command = [sys.executable, "-c", program, path]
    result = subprocess.run(command, capture_output=True, text=True)
    assert "is being written by another run: wait for it, or give another --out" in result.stderr
    output.close()
    assert subprocess.run(command, capture_output=True, text=True).returncode == 0


class FullDisk:
    """A file on a disk that takes a few more bytes."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        if self.room == 0:
            raise OSError(28, "No space left on device")
        taken = self.file.write(data[: self.room])
        self.room -= taken
        return taken

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_a_full_disk_tears_nothing(path):
    output = CaptionFile(path, RECIPE, PICTURES)
    output.add(rows()[0])
    before = path.read_bytes()
    output._file = FullDisk(output._file, room=10)
    with pytest.raises(FastVLMError, match="No space left on device.* The captions in it are kept"):
        output.add(rows()[1])
    output.close()
    assert path.read_bytes() == before
    write(path, rows()[1:])
    assert len(read(path)) == 5


def test_a_disk_that_fills_while_rows_are_put_in_order_costs_none(path, monkeypatch):
    write(path, [rows()[1]])
    output = CaptionFile(path, RECIPE, PICTURES)
    output.add(rows()[0])
    before = path.read_bytes()

    def refuse(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(FastVLMError, match="No space left on device"):
        output.finish()
    output.close()
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


def test_what_a_killed_rewrite_left_is_removed(path):
    aside = path.with_name(f".{path.name}.new")
    aside.write_bytes(b"half")
    write(path, rows())
    assert not aside.exists()


def test_a_link_and_permissions_stay(path):
    target = path.with_name(f"target{path.suffix}")
    write(target, [error_row(PICTURES[0])])
    target.chmod(0o640)
    path.symlink_to(target.name)
    write(path, rows())
    assert path.is_symlink() and target.stat().st_mode & 0o777 == 0o640
    assert len(read(target)) == 5


def test_places_that_cannot_be_written(tmp_path):
    for name, expected in (("a.txt", "ends with .jsonl or .csv"), ("no/a.csv", "No such file"), ("d.csv", "directory")):
        (tmp_path / "d.csv").mkdir(exist_ok=True)
        with pytest.raises(OptionError, match=expected):
            CaptionFile(tmp_path / name, RECIPE, PICTURES)


# Text files beside the pictures


def test_sidecars(tmp_path):
    pictures = [Picture(str(tmp_path / name), page) for name, page in [("a.jpg", None), ("b.jpg", None), ("d.pdf", 3)]]
    (tmp_path / "b.txt").write_text("mine")
    output = Sidecars(pictures)
    assert [output.is_finished(picture) for picture in pictures] == [False, True, False]
    output.add(CaptionRow(pictures[0].path, None, RECIPE, "A caption – ü."))
    output.add(CaptionRow(pictures[2].path, 3, RECIPE, "A page."))
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "A caption – ü.\n"
    assert (tmp_path / "d.page3.txt").read_text() == "A page.\n"
    assert all(Sidecars(pictures).is_finished(picture) for picture in pictures)
    again = Sidecars(pictures, overwrite=True)
    assert not any(again.is_finished(picture) for picture in pictures)
    again.add(CaptionRow(pictures[1].path, None, RECIPE, "New."))
    assert (tmp_path / "b.txt").read_text() == "New.\n"
    again.add(CaptionRow(pictures[0].path, None, RECIPE, error="It is damaged."))
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "A caption – ü.\n"
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "b.txt", "d.page3.txt"]


def test_pictures_that_differ_in_their_suffix_get_sidecars_of_their_own():
    output = Sidecars([Picture("a.jpg"), Picture("a.png"), Picture("b.jpg"), Picture("sub/a.jpg")])
    assert str(output.path(Picture("a.jpg"))) == "a.jpg.txt"
    assert str(output.path(Picture("a.png"))) == "a.png.txt"
    assert str(output.path(Picture("b.jpg"))) == "b.txt"
    assert str(output.path(Picture("sub/a.jpg"))) == "sub/a.txt"
    assert str(output.path(Picture("oddly-named.txt"))) == "oddly-named.txt.txt"


def test_sidecars_that_cannot_be_written(tmp_path, monkeypatch):
    with pytest.raises(OptionError, match="has no folder for a text file"):
        Sidecars([Picture("a.jpg"), Picture("https://example.org/a.jpg")])
    picture = Picture(str(tmp_path / "a.jpg"))

    def refuse(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(caption_output, "replace_file", refuse)
    with pytest.raises(FastVLMError, match=r"a.txt cannot be written \(No space left on device\)"):
        Sidecars([picture]).add(CaptionRow(picture.path, None, RECIPE, "A caption."))
