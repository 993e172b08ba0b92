"""Pixels: equal to LLaVA's and CLIP's own steps bit for bit; any file opens upright as RGB or fails in one line."""

import io
import struct
import sys
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlx_fastvlm import image_processing
from mlx_fastvlm.errors import ConfigError, ImageError, OptionError
from mlx_fastvlm.image_decoding import open_image
from mlx_fastvlm.image_processing import ImageProcessor

SIZES = [
    (64, 64),
    (97, 64),
    (64, 97),
    (65, 64),
    (64, 65),
    (300, 41),
    (41, 300),
    (20, 13),
    (13, 20),
    (1, 1),
    (1, 9),
    (9, 1),
]
SIZES += [(640, 479), (479, 640), (2100, 3), (3, 2100)]


def noise(width, height, channels=3):
    return np.random.default_rng(width * 10007 + height).integers(0, 256, (height, width, channels), dtype=np.uint8)


def encode(image, file_format, **options):
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def pixel(source, **options):
    return open_image(source, **options).getpixel((0, 0))


def expand2square_then_resize(image, size, color=(0, 0, 0)):
    side = max(image.size)
    square = Image.new("RGB", (side, side), color)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square.resize((size, size), Image.Resampling.BICUBIC)


def shortest_edge_then_crop(image, size):
    short, long = min(image.size), max(image.size)
    longer = int(size * long / short)
    resized = image.resize((size, longer) if image.width <= image.height else (longer, size), Image.Resampling.BICUBIC)
    top, left = (resized.height - size) // 2, (resized.width - size) // 2
    return np.asarray(resized)[top : top + size, left : left + size]


# Fitting and resizing


@pytest.mark.parametrize("strip_pixels", [1, 700, 2**22])
@pytest.mark.parametrize("size", SIZES)
def test_pad_equals_one_resize_of_the_whole_square(size, strip_pixels, monkeypatch):
    monkeypatch.setattr(image_processing, "_STRIP_PIXELS", strip_pixels)
    image = Image.fromarray(noise(*size))
    expected = np.asarray(expand2square_then_resize(image, 64)) / 255
    np.testing.assert_allclose(ImageProcessor(64).to_array(image), expected, rtol=0, atol=6e-8)


@pytest.mark.parametrize("size", SIZES)
def test_crop_equals_resize_then_crop(size):
    image = Image.fromarray(noise(*size))
    expected = shortest_edge_then_crop(image, 64) / 255
    np.testing.assert_allclose(ImageProcessor(64, fit="crop").to_array(image), expected, rtol=0, atol=6e-8)


@pytest.mark.parametrize("fit", ["pad", "crop"])
@pytest.mark.parametrize("normalization", [((0, 0, 0), (1, 1, 1)), ((0.48, 0.46, 0.41), (0.27, 0.26, 0.28))])
def test_equals_transformers_given_our_own_config(fit, normalization):
    pytest.importorskip("transformers")
    clip = pytest.importorskip("transformers.models.clip.image_processing_pil_clip").CLIPImageProcessorPil
    llava = pytest.importorskip("transformers.models.llava.image_processing_pil_llava").LlavaImageProcessorPil
    ours = ImageProcessor(64, fit=fit, image_mean=normalization[0], image_std=normalization[1])
    theirs = (llava if fit == "pad" else clip)(**ours.to_dict())
    for size in SIZES:
        if size == (1, 1) or min(size) == 3:
            continue  # transformers cannot tell channels from rows
        image = Image.fromarray(noise(*size))
        expected = theirs(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
        np.testing.assert_array_equal(ours.to_array(image), expected, err_msg=str(size))


def test_padding_is_centered_black_and_odd_remainders_go_below():
    pixels = ImageProcessor(8).to_array(np.full((3, 8, 3), 255, np.uint8))
    assert pixels[:2].max() == 0 and pixels[2:5].min() == 1 and pixels[5:].max() == 0


def test_padding_has_the_color_of_the_mean():
    processor = ImageProcessor(8, image_mean=(0.5, 0.25, 1.0))
    expected = np.array([127, 63, 255], np.float32) / 255 - np.float32((0.5, 0.25, 1.0))
    np.testing.assert_allclose(processor.to_array(np.zeros((4, 8, 3), np.uint8))[0, 0], expected, atol=1e-7)


def test_an_image_of_the_right_size_is_not_resampled():
    array = noise(32, 32)
    for fit in ("pad", "crop"):
        np.testing.assert_array_equal(ImageProcessor(32, fit=fit).to_array(array), array / np.float32(255))


def test_preprocess_is_to_array_as_a_batch_of_one():
    processor, source = ImageProcessor(64), encode(Image.fromarray(noise(90, 50)), "PNG")
    pixel_values = processor.preprocess(source)
    assert pixel_values.shape == (1, 64, 64, 3)
    assert str(pixel_values.dtype) == "mlx.core.float32"
    np.testing.assert_array_equal(np.array(pixel_values)[0], processor.to_array(open_image(source)))


def test_a_very_long_image_needs_little_memory():
    image = Image.new("RGB", (2, 8000), "white")  # its square would take 256 MB
    new, largest = Image.new, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Image, "new", lambda mode, size, *rest: largest.append(size[0] * size[1]) or new(mode, size, *rest)
        )
        ImageProcessor(64).to_array(image)
    assert max(largest) <= image_processing._STRIP_PIXELS
    with pytest.raises(ImageError, match="too narrow to crop"):
        ImageProcessor(1024, fit="crop").to_array(image)


# Color


@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [
        ("1", 1, (255, 255, 255)),
        ("L", 90, (90, 90, 90)),
        ("LA", (90, 255), (90, 90, 90)),
        ("La", (90, 255), (90, 90, 90)),
        ("RGB", (1, 2, 3), (1, 2, 3)),
        ("RGBX", (1, 2, 3, 0), (1, 2, 3)),
        ("RGBa", (1, 2, 3, 255), (1, 2, 3)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("YCbCr", (76, 85, 255), (254, 0, 0)),
        ("HSV", (0, 255, 255), (255, 0, 0)),
        ("LAB", (255, 128, 128), (255, 255, 255)),
        ("I;16", 0, (0, 0, 0)),
        ("I;16", 257 * 77, (77, 77, 77)),
        ("I;16", 65535, (255, 255, 255)),
        ("I;16B", 257 * 77, (77, 77, 77)),
        ("I", 77, (77, 77, 77)),
        ("I", 257 * 77, (77, 77, 77)),
        ("F", 0.4, (102, 102, 102)),
        ("F", 77.0, (77, 77, 77)),
        ("F", 257.0 * 77, (77, 77, 77)),
        ("F", float("nan"), (0, 0, 0)),
    ],
)
def test_modes_become_rgb(mode, value, expected):
    np.testing.assert_allclose(pixel(Image.new(mode, (2, 2), value)), expected, atol=1)


def test_wide_ranges_are_stretched():
    image = open_image(Image.fromarray(np.array([[-1000, 0, 1000]], np.int32)))
    assert [image.getpixel((x, 0))[0] for x in range(3)] == [0, 128, 255]
    assert pixel(Image.new("F", (2, 2), -5.0)) == (0, 0, 0)  # one value: nothing to stretch


def test_16_bit_gray_files_are_scaled_not_clipped():
    ramp = np.arange(0, 65536, 257, dtype=np.uint16)[None]
    for file_format in ("PNG", "TIFF", "PPM"):
        rgb = np.asarray(open_image(encode(Image.fromarray(ramp), file_format)))
        np.testing.assert_array_equal(rgb[0, :, 1], np.arange(256), err_msg=file_format)


@pytest.mark.parametrize(("background", "shade"), [("white", 255), ("black", 0)])
def test_transparency_shows_the_background(background, shade):
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    halves = [
        (Image.new("RGBA", (2, 2), (10, 20, 30, 0)), (shade,) * 3),
        (Image.new("RGBA", (2, 2), (100, 100, 100, 51)), (round(100 * 0.2 + shade * 0.8),) * 3),
        (Image.new("LA", (2, 2), (10, 0)), (shade,) * 3),
        (Image.new("La", (2, 2), (0, 0)), (shade,) * 3),
        (encode(palette, "PNG", transparency=1), (shade,) * 3),
        (encode(palette, "PNG", transparency=bytes([255, 0])), (shade,) * 3),
        (encode(palette, "GIF", transparency=1), (shade,) * 3),
        (encode(palette, "PNG", transparency=0), (10, 20, 30)),
        (encode(Image.new("RGB", (2, 2), (1, 2, 3)), "PNG", transparency=(1, 2, 3)), (shade,) * 3),
        (encode(Image.new("L", (2, 2), 9), "PNG", transparency=9), (shade,) * 3),
        (np.zeros((2, 2, 4), np.uint8), (shade,) * 3),
    ]
    for source, expected in halves:
        np.testing.assert_allclose(pixel(source, background=background), expected, atol=1)
        processed = ImageProcessor(2, background=background).to_array(source)[0, 0]
        np.testing.assert_allclose(processed * 255, expected, atol=1)


def test_arrays_of_one_three_and_four_channels():
    gray = noise(5, 3, 1)
    np.testing.assert_array_equal(np.asarray(open_image(gray)), np.repeat(gray, 3, axis=2))
    np.testing.assert_array_equal(np.asarray(open_image(gray[:, :, 0])), np.repeat(gray, 3, axis=2))
    color = noise(5, 3)
    np.testing.assert_array_equal(np.asarray(open_image(color[::-1, ::-1])), color[::-1, ::-1])


def test_cmyk_jpeg_is_not_inverted():
    red = encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)
    np.testing.assert_allclose(pixel(red), (255, 0, 0), atol=6)


# Files


@pytest.mark.parametrize("file_format", ["PNG", "GIF", "WEBP", "TIFF", "MPO"])
def test_the_first_frame_counts(file_format):
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "blue")]
    data = encode(frames[0], file_format, save_all=True, append_images=frames[1:])
    np.testing.assert_allclose(pixel(data), (255, 0, 0), atol=8)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientation_is_applied_once(orientation, file_format):
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :16] = 255  # white in the upper left
    flip = np.flip
    stored = {  # what the EXIF specification says that rows and columns of the file stand for
        1: upright,
        2: flip(upright, 1),
        3: flip(upright, (0, 1)),
        4: flip(upright, 0),
        5: upright.swapaxes(0, 1),
        6: flip(upright.swapaxes(0, 1), 0),
        7: flip(upright.swapaxes(0, 1), (0, 1)),
        8: flip(upright.swapaxes(0, 1), 1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = open_image(encode(Image.fromarray(stored), file_format, exif=exif))
    for result in (image, open_image(image)):
        np.testing.assert_allclose(np.asarray(result), upright, atol=12)


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"]
)
def test_damaged_exif_is_ignored_in_silence(exif, recwarn):
    image = open_image(encode(Image.new("RGB", (8, 4), "red"), "JPEG", exif=exif))
    assert image.size == (8, 4)
    assert not recwarn


def test_a_given_pil_image_is_not_modified_and_not_copied_in_vain():
    exif = Image.Exif()
    exif[0x0112] = 6
    rotated = Image.open(io.BytesIO(encode(Image.new("RGB", (8, 4), "red"), "JPEG", exif=exif)))
    assert open_image(rotated).size == (4, 8)
    assert rotated.size == (8, 4) and rotated.getexif()[0x0112] == 6
    plain = Image.new("RGB", (8, 4))
    assert open_image(plain) is plain


def test_decoded_images_do_not_depend_on_the_file(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (8, 4), "red").save(path)
    image = open_image(path)
    path.unlink()
    assert image.getpixel((7, 3)) == (255, 0, 0)


# Errors


def png_header(width, height):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (b"", "is empty"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "a PostScript file"),
        (b"\n<!DOCTYPE html><html>", "a web page"),
        (b"<?xml version='1.0'?>\n<svg xmlns='...'/>", "an SVG drawing"),
        (b"\0\0\0\x18ftypisom\0\0\0\0", "a video"),
        (b"PK\x03\x04" + bytes(50), "a zip archive"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "run `git lfs pull`"),
        (b"Dear reader,\n", "is text: give an image file"),
        (bytes(range(1, 200)), "not an image that Pillow can read"),
        (b"\x89PNG\r\n\x1a\n\0\0", "begins like a PNG image, but is damaged or cut off"),
        (b"\xff\xd8\xff", "JPEG image"),
        (png_header(100_000, 100_000), "is 100000x100000 pixels; the limits are 200 megapixels"),
        (png_header(20_000, 20_000), "is 20000x20000 pixels"),
        (png_header(33_000, 1), "32768 pixels on a side"),
        (png_header(0, 5), "PNG image"),
        (png_header(14_000, 14_000), "is cut off"),  # 196 megapixels: above Pillow's own limit, below ours
        (Image.new("RGB", (0, 5)), "is 0x5 pixels"),
        (np.zeros((0, 5, 3), np.uint8), "has no pixels"),
        (np.zeros((5, 5, 2), np.uint8), "(5, 5, 2)"),
        (np.zeros((5, 5, 3), np.float32), "float32"),
        (np.zeros(5, np.uint8), "(5,)"),
    ],
)
def test_errors(source, expected, recwarn):
    start = time.monotonic()
    with pytest.raises(ImageError) as caught:
        open_image(source)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - start < 5
    assert not recwarn


def test_large_images_below_the_limit_open_without_warning():
    data = encode(Image.new("1", (10_000, 9_000)), "PNG")  # 90 megapixels: where Image.open begins to warn
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_image(data).size == (10_000, 9_000)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
def test_files_cut_anywhere_are_refused_or_decoded(file_format, tmp_path):
    data = encode(Image.fromarray(noise(40, 30)), file_format)
    path = tmp_path / "cut"
    for length in range(1, len(data) * 9 // 10, max(1, len(data) // 60)):
        path.write_bytes(data[:length])
        with pytest.raises(ImageError, match="cut (is|begins) "):
            open_image(path)
    path.write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(ImageError, match="is cut off|damaged or cut off|is damaged"):
        open_image(path)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "ICO", "TGA"])
def test_flipped_bytes_never_escape_as_another_exception(file_format, recwarn):
    rng = np.random.default_rng(0)
    data = np.frombuffer(encode(Image.fromarray(noise(20, 20)), file_format), np.uint8)
    for _ in range(60):
        damaged = data.copy()
        damaged[rng.integers(0, min(200, len(data)), 4)] = rng.integers(0, 256, 4)
        try:
            assert open_image(damaged.tobytes()).mode == "RGB"
        except ImageError as error:
            assert "\n" not in str(error)
    assert not recwarn


def test_threads_leave_the_warning_filters_as_they_were():
    before = list(warnings.filters)
    sources = [encode(Image.fromarray(noise(50, 50)), file_format) for file_format in ("TIFF", "PNG", "JPEG")] * 20
    with ThreadPoolExecutor(8) as pool:
        assert all(image.size == (50, 50) for image in pool.map(open_image, sources))
    assert warnings.filters == before


# HEIC, AVIF and PDF


def heic(image, **options):
    file = io.BytesIO()
    pytest.importorskip("pillow_heif").from_pillow(image).save(file, **options)
    return file.getvalue()


def pdf(*images, **options):
    pytest.importorskip("pypdfium2")
    return encode(images[0], "PDF", save_all=True, append_images=images[1:], **options)


@pytest.mark.parametrize(
    ("start", "what"), [(b"%PDF-1.7 ...", "a PDF document"), (b"\0\0\0\x18ftypheic\0\0\0\0", "a HEIC image")]
)
def test_the_missing_extra_is_named(start, what, monkeypatch):
    for package in ("pillow_heif", "pypdfium2"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImageError, match=what) as caught:
        open_image(start)
    assert "run `pip install 'mlx-fastvlm[formats]'`" in str(caught.value)


def test_heic_opens_upright_as_rgb():
    colors = Image.new("RGB", (64, 32), "red")
    colors.paste("blue", (32, 0, 64, 32))
    image = open_image(heic(colors, quality=100))
    assert (image.size, image.mode) == ((64, 32), "RGB")
    np.testing.assert_allclose(image.getpixel((5, 5)), (255, 0, 0), atol=12)
    np.testing.assert_allclose(image.getpixel((60, 5)), (0, 0, 255), atol=12)
    exif = Image.Exif()
    exif[0x0112] = 6  # what a phone held upright writes
    turned = heic(colors.rotate(90, expand=True), quality=100, exif=exif.tobytes())
    np.testing.assert_allclose(np.asarray(open_image(turned)), np.asarray(image), atol=12)


def test_heic_brand_of_any_heif_image():
    data = heic(Image.new("RGB", (64, 32), "red"))
    assert open_image(data[:8] + b"mif1" + data[12:]).size == (64, 32)


def test_heic_with_transparency_shows_the_background():
    data = heic(Image.new("RGBA", (64, 64), (10, 20, 30, 0)))
    np.testing.assert_allclose(pixel(data), (255, 255, 255), atol=8)


def test_avif_opens_with_pillow_alone():
    if "AVIF" not in Image.SAVE:
        Image.init()
    if "AVIF" not in Image.SAVE:
        pytest.skip("this Pillow is built without AVIF")
    image = open_image(encode(Image.new("RGB", (64, 32), "red"), "AVIF"))
    assert image.size == (64, 32)
    np.testing.assert_allclose(image.getpixel((5, 5)), (255, 0, 0), atol=12)


def test_pdf_pages_are_drawn_on_white_with_bounded_sides():
    wide, tall = Image.new("RGB", (600, 300), "red"), Image.new("RGB", (30, 90), "blue")
    image = open_image(pdf(wide, tall))
    assert (image.size, image.mode) == ((2048, 1024), "RGB")
    np.testing.assert_allclose(image.getpixel((9, 9)), (255, 0, 0), atol=4)
    empty = b"".join(
        (
            b"%PDF-1.4\n1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj\n2 0 obj<</Type/Pages/Kids[3 0 R]/Count 1>>endobj\n",
            b"3 0 obj<</Type/Page/Parent 2 0 R/MediaBox[0 0 10 90000]>>endobj\ntrailer<</Root 1 0 R>>\n%%EOF",
        )
    )
    image = open_image(b"\n junk " + empty)  # as mail programs leave it
    assert image.size == (1, 2048) and image.getpixel((0, 9)) == (255, 255, 255)


def test_a_pdf_page_is_named_by_the_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = Path("two.pdf")
    path.write_bytes(pdf(Image.new("RGB", (60, 30), "red"), Image.new("RGB", (30, 60), "blue")))
    assert open_image(path).size == open_image(f"{path}#page=1").size == (2048, 1024)
    assert open_image(f"{path}#page=2").size == (1024, 2048)
    named = io.BytesIO(path.read_bytes())
    named.name = "two.pdf#page=2"
    assert open_image(named).size == (1024, 2048)
    for page in (0, 3):
        with pytest.raises(ImageError, match=rf"two.pdf#page={page} has 2 pages; page {page} does not exist"):
            open_image(f"{path}#page={page}")
    Path("two.pdf#page=2").write_bytes(encode(Image.new("RGB", (5, 4)), "PNG"))
    assert open_image(f"{path}#page=2").size == (5, 4)  # a file of that very name
    Image.new("RGB", (5, 4)).save("picture.png")
    assert open_image("picture.png#page=1").size == (5, 4)
    with pytest.raises(ImageError, match="is no PDF document, so it has no page 2"):
        open_image("picture.png#page=2")


ENCRYPTED_PDF = (  # a user password that nobody knows
    b"%PDF-1.4\n1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj\n2 0 obj<</Type/Pages/Kids[3 0 R]/Count 1>>endobj\n"
    b"3 0 obj<</Type/Page/Parent 2 0 R/MediaBox[0 0 10 10]>>endobj\n"
    b"4 0 obj<</Filter/Standard/V 1/R 2/P -4/O<" + b"41" * 32 + b">/U<" + b"42" * 32 + b">>>endobj\n"
    b"trailer<</Root 1 0 R/Encrypt 4 0 R/ID[<00><00>]>>\n%%EOF"
)


def test_pdfs_that_cannot_be_read():
    whole = pdf(Image.fromarray(noise(90, 90)))
    for data, expected in (
        (ENCRYPTED_PDF, "is encrypted: save a copy of it without a password"),
        (b"%PDF-1.7 ...", "is damaged: the PDF document cannot be read"),
        (whole[:300], "is damaged"),
    ):
        with pytest.raises(ImageError) as caught:
            open_image(data)
        assert expected in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("make", [heic, pdf])
def test_damaged_heic_and_pdf_never_escape_as_another_exception(make):
    rng = np.random.default_rng(0)
    data = np.frombuffer(make(Image.fromarray(noise(20, 20))), np.uint8)
    for _ in range(40):
        damaged = data.copy()
        damaged[rng.integers(0, min(400, len(data)), 6)] = rng.integers(0, 256, 6)
        for attempt in (damaged.tobytes(), data[: rng.integers(12, len(data) * 9 // 10)].tobytes()):
            try:
                assert open_image(attempt).mode == "RGB"
            except ImageError as error:
                assert "\n" not in str(error)


def test_pdf_pages_from_many_threads():
    data = pdf(Image.new("RGB", (60, 30), "red"))
    with ThreadPoolExecutor(8) as pool:
        assert all(image.size == (2048, 1024) for image in pool.map(open_image, [data] * 24))


# Configuration


@pytest.mark.parametrize("fit", ["pad", "crop"])
def test_config_round_trip(fit):
    processor = ImageProcessor(256, fit=fit, image_mean=(0.1, 0.2, 0.3), image_std=(0.4, 0.5, 0.6))
    assert ImageProcessor.from_config(processor.to_dict()) == processor


def test_configs_in_the_wild():
    assert ImageProcessor.from_config({"crop_size": 512}) == ImageProcessor(512)
    assert ImageProcessor.from_config({"size": {"shortest_edge": 512}}, fit="crop") == ImageProcessor(512, fit="crop")
    unused = {"crop_size": {"height": 64, "width": 64}, "do_normalize": False, "image_mean": [0.5] * 3, "do_pad": None}
    assert ImageProcessor.from_config(unused) == ImageProcessor(64)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"crop_size": {"height": 64, "width": 32}},
        {"crop_size": "64"},
        {"crop_size": 64, "size": 32},
        {"crop_size": 64, "resample": 2},
        {"crop_size": 64, "do_resize": False},
        {"crop_size": 64, "rescale_factor": 1.0},
        {"crop_size": 64, "image_mean": 0.5},
    ],
)
def test_configs_that_mean_something_else_are_refused(config):
    with pytest.raises(ConfigError, match="preprocessor_config.json"):
        ImageProcessor.from_config(config)


@pytest.mark.parametrize("options", [{"image_size": 0}, {"fit": "stretch"}, {"background": "red"}])
def test_options_are_checked(options):
    with pytest.raises(OptionError):
        ImageProcessor(**{"image_size": 64, **options})
