"""Captions inside pictures' files: the text is there, and pixels and all other metadata are what they were."""

import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from mlx_fastvlm.captions import metadata as picture_metadata
from mlx_fastvlm.captions.metadata import NoPlaceForCaption, read_alt_text, write_caption
from mlx_fastvlm.errors import ImageError, OptionError

exiv2 = pytest.importorskip("exiv2")

CAPTION = "A “red” square, größer – and\na second line."
# Suffix, Pillow's format, how it is saved, whether there are several frames.
FILES = [
    ("jpg", "JPEG", {}, False),
    ("mpo", "MPO", {}, True),
    ("png", "PNG", {}, False),
    ("apng", "PNG", {}, True),
    ("webp", "WEBP", {"quality": 80}, False),
    ("webp", "WEBP", {"lossless": True}, True),
    ("tif", "TIFF", {}, False),
    ("tif", "TIFF", {"compression": "tiff_lzw"}, True),
    ("jp2", "JPEG2000", {}, False),
]


def noise(seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 60, 3), dtype=np.uint8))


def picture(folder, suffix="jpg", file_format="JPEG", several=False, **options):
    path = folder / f"picture.{suffix}"
    if several:
        options |= {"save_all": True, "append_images": [noise(1), noise(2)]}
    noise().save(path, file_format, **options)
    return path


def frames(path):
    image = Image.open(path)
    for number in range(getattr(image, "n_frames", 1)):
        image.seek(number)
        yield np.asarray(image.convert("RGB"))


def tags(path):
    """All Exif, IPTC and XMP values, as text by name."""
    image = exiv2.ImageFactory.open(str(path))
    image.readMetadata()
    return {
        datum.key(): datum.toString()
        for data in (image.exifData(), image.iptcData(), image.xmpData())
        for datum in data
    }


def tag(path, **values):
    """Write metadata as another program would: names with _ for dots."""
    image = exiv2.ImageFactory.open(str(path))
    image.readMetadata()
    for name, value in values.items():
        key = name.replace("_", ".")
        data = {"Exif": image.exifData(), "Iptc": image.iptcData(), "Xmp": image.xmpData()}[key.partition(".")[0]]
        data[key] = value
    image.writeMetadata()


@pytest.mark.parametrize(("suffix", "file_format", "options", "several"), FILES)
def test_pixels_and_other_metadata_stay(suffix, file_format, options, several, tmp_path):
    exif = Image.Exif()
    exif[0x010F] = "A camera maker"
    exif[0x0112] = 6
    exif.get_ifd(0x8825)[1] = "N"
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    if file_format not in ("MPO", "JPEG2000"):  # what that does to MPO has a test of its own
        options = {**options, "icc_profile": profile}
    path = picture(tmp_path, suffix, file_format, several, exif=exif, **options)
    tag(path, Xmp_xmp_Rating="4", Xmp_dc_creator="Somebody")
    pixels, before = list(frames(path)), tags(path)
    assert len(pixels) == (3 if several else 1)
    assert write_caption(path, CAPTION)
    for old, new in zip(pixels, frames(path), strict=True):
        np.testing.assert_array_equal(new, old)
    after = tags(path)
    assert read_alt_text(path) == CAPTION
    assert {"Xmp.iptc.AltTextAccessibility", "Xmp.dc.description"} <= after.keys() - before.keys()
    layout = {name for name in before if "Offsets" in name or name == "Exif.Image.XMLPacket"}  # where things lie
    assert {name: after[name] for name in before.keys() - layout} == {
        name: before[name] for name in before.keys() - layout
    }
    assert Image.open(path).info.get("icc_profile") == options.get("icc_profile")


def test_pictures_behind_the_first_are_not_lost(tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    path = picture(tmp_path, "mpo", "MPO", several=True, icc_profile=profile)  # behind the index, where Exiv2 moves it
    content = path.read_bytes()
    with pytest.raises(ImageError, match="the further pictures inside it would be lost"):
        write_caption(path, CAPTION)
    assert path.read_bytes() == content and len(list(frames(path))) == 3


def test_a_library_other_than_ours_finds_the_text_where_the_standard_says(tmp_path):
    path = picture(tmp_path, quality=90)
    write_caption(path, "A cat.")
    xmp = path.read_bytes().partition(b"<x:xmpmeta")[2].decode(errors="replace")
    assert 'xmlns:Iptc4xmpCore="http://iptc.org/std/Iptc4xmpCore/1.0/xmlns/"' in xmp
    alt = xmp.partition("<Iptc4xmpCore:AltTextAccessibility>")[2].partition("</Iptc4xmpCore:")[0]
    assert '<rdf:li xml:lang="x-default">A cat.</rdf:li>' in alt
    assert '<rdf:li xml:lang="x-default">A cat.</rdf:li>' in xmp.partition("<dc:description>")[2]
    from PIL.IptcImagePlugin import getiptcinfo

    assert getiptcinfo(Image.open(path))[(2, 120)] == b"A cat."


def test_text_that_is_there_stays_unless_it_may_be_overwritten(tmp_path):
    path = picture(tmp_path)
    tag(path, Xmp_dc_description={"x-default": "Mine", "de-DE": "Meins"}, Iptc_Application2_Caption="Mine")
    assert write_caption(path, "First")
    found = tags(path)
    assert found["Iptc.Application2.Caption"] == "Mine" and 'lang="x-default" Mine' in found["Xmp.dc.description"]
    content = path.read_bytes()
    assert write_caption(path, "First")  # the same once more, as after a run that was killed
    assert not write_caption(path, "Second")
    assert path.read_bytes() == content
    assert write_caption(path, "Second", overwrite=True)
    found = tags(path)
    assert read_alt_text(path) == found["Iptc.Application2.Caption"] == "Second"
    assert 'lang="x-default" Second' in found["Xmp.dc.description"] and "Meins" in found["Xmp.dc.description"]


def test_an_alternative_text_in_one_language_counts(tmp_path):
    path = picture(tmp_path)
    tag(path, Xmp_iptc_AltTextAccessibility={"fr-FR": "Un chat."})
    assert read_alt_text(path) == "Un chat." and not write_caption(path, "A cat.")


def test_iptc_texts_of_another_encoding_are_left_alone(tmp_path):
    path = picture(tmp_path)
    image = exiv2.ImageFactory.open(str(path))
    image.readMetadata()
    image.iptcData()["Iptc.Application2.City"] = exiv2.DataValue(b"K\xf6ln")
    image.writeMetadata()
    assert write_caption(path, "Größe")
    assert "Iptc.Application2.Caption" not in tags(path) and read_alt_text(path) == "Größe"


def test_an_iptc_caption_is_cut_at_its_limit_between_characters(tmp_path):
    path = picture(tmp_path)
    long = "ü" * 1500
    write_caption(path, long)
    assert tags(path)["Iptc.Application2.Caption"] == "ü" * 1000
    assert read_alt_text(path) == long


def test_the_file_is_replaced_at_once_with_its_permissions(tmp_path):
    path = picture(tmp_path)
    path.chmod(0o640)
    os.utime(path, (1e9, 1e9))
    link = tmp_path / "link.jpg"
    link.symlink_to(path.name)
    write_caption(link, CAPTION)
    assert link.is_symlink() and read_alt_text(path) == CAPTION
    assert path.stat().st_mode & 0o777 == 0o640
    assert time.time() - path.stat().st_mtime < 60
    assert sorted(os.listdir(tmp_path)) == ["link.jpg", "picture.jpg"]


def test_a_disk_that_fills_up_costs_no_picture(tmp_path, monkeypatch):
    path = picture(tmp_path)
    content = path.read_bytes()

    def refuse(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(ImageError, match="cannot be replaced .No space left on device"):
        write_caption(path, CAPTION)
    assert path.read_bytes() == content and os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize(("suffix", "file_format"), [("gif", "GIF"), ("bmp", "BMP"), ("tga", "TGA"), ("pdf", "PDF")])
def test_formats_without_a_place_are_told_from_damage(suffix, file_format, tmp_path):
    path = picture(tmp_path, suffix, file_format)
    content = path.read_bytes()
    with pytest.raises(NoPlaceForCaption, match="cannot hold a caption"):
        write_caption(path, CAPTION)
    assert read_alt_text(path) is None and path.read_bytes() == content


def test_heic_has_no_place(tmp_path):
    heif = pytest.importorskip("pillow_heif")
    path = tmp_path / "a.heic"
    heif.from_pillow(noise()).save(path)
    with pytest.raises(NoPlaceForCaption):
        write_caption(path, CAPTION)


def test_damaged_files_and_captions_too_long_for_the_format(tmp_path):
    path = picture(tmp_path)
    content = path.read_bytes()
    with pytest.raises(ImageError, match="cannot take a caption .Size of XMP JPEG segment"):
        write_caption(path, "x" * 70_000)
    path.write_bytes(content[:100])
    with pytest.raises(ImageError, match="cannot take a caption"):
        write_caption(path, CAPTION)
    assert path.read_bytes() == content[:100]
    with pytest.raises(ImageError, match="cannot be replaced .No such file"):
        write_caption(tmp_path / "gone.jpg", CAPTION)
    assert read_alt_text(Path(tmp_path / "gone.jpg")) is None


def test_the_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "exiv2", None)
    with pytest.raises(OptionError, match=r"pip install 'mlx-fastvlm\[metadata\]'"):
        picture_metadata.check_available()
