"""Files and folders → pictures: natural order, nothing twice, nothing that was named lost without a word."""

import io
import os
import sys
from itertools import islice

import pytest
from PIL import Image

from mlx_fastvlm.captions import picture_files
from mlx_fastvlm.captions.picture_files import Picture, find_pictures, natural_key, read_list
from mlx_fastvlm.errors import ImageError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Make empty files in a folder, the current one: only names count here."""
    monkeypatch.chdir(tmp_path)

    def make(*names):
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()

    return make


def names(*paths, **options):
    return [picture.name for picture in find_pictures(paths, **options)]


def test_a_folder_in_natural_order_without_what_is_no_picture(folder):
    folder("p/10.jpg", "p/2.JPG", "p/b.png", "p/A.webp", "p/.hidden.jpg", "p/._2.jpg", "p/notes.txt", "p/film.mp4")
    folder("p/2.txt", "p/sub/3.jpg", "p/no-suffix")
    assert names("p") == ["p/2.JPG", "p/10.jpg", "p/A.webp", "p/b.png"]
    assert names("p/", "./p", ".") == names("p")


def test_subfolders_stand_where_their_names_sort(folder):
    folder("p/1.jpg", "p/2/9.jpg", "p/2/10.jpg", "p/3.jpg", "p/.git/4.jpg", "p/10/1.jpg")
    assert names("p", recursive=True) == ["p/1.jpg", "p/2/9.jpg", "p/2/10.jpg", "p/3.jpg", "p/10/1.jpg"]
    os.chdir("p")
    assert names(".", recursive=True) == ["1.jpg", "2/9.jpg", "2/10.jpg", "3.jpg", "10/1.jpg"]


def test_named_paths_keep_their_order_and_may_have_any_name(folder):
    folder("p/1.jpg", ".hidden.jpg", "raw")
    given = ["raw", "p", ".hidden.jpg", "missing.jpg", "https://example.org/a/../b.jpg", "p/1.jpg", "./raw"]
    assert names(*given) == ["raw", "p/1.jpg", ".hidden.jpg", "missing.jpg", "https://example.org/a/../b.jpg"]


def test_a_path_is_named_the_same_however_it_is_written(folder, tmp_path, monkeypatch):
    folder("p/1.jpg")
    assert names("p//1.jpg") == names("./p/./1.jpg") == ["p/1.jpg"]
    assert names("p/../p/1.jpg") == ["p/../p/1.jpg"]  # the part before .. may be a link: left alone
    monkeypatch.setenv("HOME", str(tmp_path))
    assert names("~/p") == [f"{tmp_path}/p/1.jpg"]


def test_links_are_followed_once_and_loops_end(folder):
    folder("p/1.jpg", "q/2.jpg")
    os.symlink("../p", "p/loop")
    os.symlink("../q", "p/other")
    os.symlink("self", "p/self")
    os.symlink("1.jpg", "p/same.jpg")
    os.symlink("nowhere.jpg", "p/gone.jpg")
    assert names("p", "q", recursive=True) == ["p/1.jpg", "p/gone.jpg", "p/other/2.jpg", "p/same.jpg"]


def test_pipes_are_not_pictures(folder):
    folder("p/1.jpg")
    os.mkfifo("p/2.jpg")
    assert names("p") == ["p/1.jpg"]


def test_a_subfolder_that_cannot_be_listed_is_reported_and_passed(folder, monkeypatch):
    folder("p/1.jpg", "p/a/2.jpg", "p/b/3.jpg")
    scandir = os.scandir

    def refusing(path):
        if path.endswith("/a"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    reports = []
    assert names("p", recursive=True, on_unreadable=reports.append) == ["p/1.jpg", "p/b/3.jpg"]
    assert reports == ["p/a cannot be listed (Permission denied): check its permissions."]
    with pytest.raises(ImageError, match="p/a cannot be listed"):
        names("p/a")


def test_nothing_is_listed_before_it_is_needed(folder):
    folder("p/1.jpg", "p/2.jpg")
    found = find_pictures(["p", "q"])
    assert [picture.path for picture in islice(found, 2)] == ["p/1.jpg", "p/2.jpg"]
    folder("q/1.jpg")  # made only now
    assert [picture.path for picture in found] == ["q/1.jpg"]


def test_a_document_stands_for_its_pages(folder, monkeypatch):
    pytest.importorskip("pypdfium2")
    pages = [Image.new("RGB", (9, 9)) for _ in range(3)]
    pages[0].save("d.PDF", save_all=True, append_images=pages[1:])
    folder("broken.pdf")
    assert names(".") == ["broken.pdf", "d.PDF#page=1", "d.PDF#page=2", "d.PDF#page=3"]
    assert list(find_pictures(["d.PDF#page=2", "d.PDF"]))[:2] == [Picture("d.PDF", 2), Picture("d.PDF", 1)]
    assert len(names("d.PDF#page=2", "d.PDF")) == 3
    monkeypatch.setattr(picture_files, "MAX_PDF_PAGES", 2)
    reports = []
    assert names(".", on_unreadable=reports.append) == ["broken.pdf"]
    assert reports == ["d.PDF has 3 pages; at most 2 are read: split it."]


def test_without_the_extra_a_document_is_one_picture(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "pypdfium2", None)
    folder("d.pdf")
    assert names(".") == ["d.pdf"]


def test_natural_order():
    ordered = ["1", "2", "02b", "10", "a1b2", "A1b10", "a2", "b", "ä"]
    assert sorted(reversed(ordered), key=natural_key) == ordered
    assert sorted(["a01", "a1"], key=natural_key) == ["a01", "a1"]  # of equal rank: by the name itself


def test_lists_have_a_path_a_line_or_between_null_bytes():
    assert read_list(io.BytesIO(b"a b.jpg\r\n\n./c.png\n"), "list") == ["a b.jpg", "./c.png"]
    assert read_list(io.BytesIO(b"a\nb.jpg\0c.jpg\0"), "list") == ["a\nb.jpg", "c.jpg"]
    assert os.fsencode(read_list(io.BytesIO(b"\xff.jpg\n"), "list")[0]) == b"\xff.jpg"
