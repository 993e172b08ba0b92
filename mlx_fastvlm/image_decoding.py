"""From an image in any form to upright RGB pixels, and how large those are without decoding them.

HEIC images and PDF pages need the extra `formats`, loaded when one is met.
"""

from __future__ import annotations

import io
import struct
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Literal, get_args

import numpy as np
from PIL import ExifTags, Image, ImageOps

from mlx_fastvlm.errors import ImageError, OptionError
from mlx_fastvlm.image_source import FileSource, named_page, read_image_bytes, source_name
from mlx_fastvlm.pdf_pages import is_pdf, render_page

ImageSource = FileSource | Image.Image | np.ndarray
Background = Literal["white", "black"]

MAX_IMAGE_PIXELS = 200_000_000  # what the largest phone cameras make; 0.8 GB once decoded
MAX_IMAGE_SIDE = 32_768  # padding makes a square of it, and the resize then takes up to 15 s

_warnings_lock = threading.Lock()

_ON_A_SIDE = (5, 6, 7, 8)  # of EXIF's orientations: width and height change places
# Where a PNG says which side is up; all may stand behind its pixels.
_PNG_ORIENTATIONS = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")

# First bytes of files that people mistake for images: offset, bytes, what it is, what to do.
_NOT_IMAGES = (
    (0, b"%!PS", "a PostScript file", "export it as PNG"),
    (0, b"\xc5\xd0\xd3\xc6", "a PostScript file", "export it as PNG"),
    (4, b"ftypavif", "an AVIF image", "export it as JPEG, or update Pillow to 11.3 or later"),
    (4, b"ftyp", "a video", "save one frame as PNG"),
    (0, b"PK\x03\x04", "a zip archive or office document", "extract the image from it"),
    (0, b"\x1f\x8b", "a gzip file", "decompress it"),
    (0, b"version https://git-lfs", "a Git LFS pointer, not the image itself", "run `git lfs pull`"),
    (0, b"<svg", "an SVG drawing", "export it as PNG"),
    (0, b"<!doctype html", "a web page", "save the image itself"),
    (0, b"<html", "a web page", "save the image itself"),
)
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")  # of ISO/IEC 23008-12
_IMAGES = (
    (0, b"\x89PNG", "PNG"),
    (0, b"\xff\xd8\xff", "JPEG"),
    (0, b"GIF8", "GIF"),
    (8, b"WEBP", "WebP"),
    (0, b"II*\0", "TIFF"),
    (0, b"MM\0*", "TIFF"),
    (0, b"BM", "BMP"),
)


def open_image(source: ImageSource, *, background: Background = "white") -> Image.Image:
    """Decode an image completely, upright, as RGB.

    - The EXIF orientation is applied; damaged EXIF data is ignored.
    - Animations and multi-page TIFF files give their first frame. A PDF document gives its first page, or the one that
      its name ends with, as in "paper.pdf#page=3", drawn so that the longer side has `pdf_pages.LONG_SIDE` pixels.
    - Transparent pixels are laid over `background`. White by default: what is mostly transparent is dark ink made for
      a white page (logos, diagrams, formulas), and dropping the alpha channel instead, as LLaVA does, shows whatever
      color happens to lie under the transparent pixels, usually black on black.
    - 16-bit grays are divided by 257, so that 65535 becomes 255; Pillow alone would clip them at 255. For wider grays
      see `_eight_bit_gray`. 16-bit color is reduced to 8 bits by Pillow itself.
    - CMYK, LAB and others are converted as Pillow does. Embedded ICC profiles are not applied, as in training.

    Args:
        source: whatever `read_image_bytes` takes, a PIL image (not modified), or a uint8 array (H, W), (H, W, 1),
            (H, W, 3) RGB or (H, W, 4) RGBA.
        background: what shows through transparent pixels.

    Returns:
        The image in mode RGB with all pixels loaded. A PIL image that needs no change is returned itself.

    Raises:
        ImageError: the source cannot be read, is not an image, is damaged, or is larger than `MAX_IMAGE_PIXELS` or
            `MAX_IMAGE_SIDE`. Sizes are checked before any pixel is decoded.
        OptionError: `background` is unknown.
    """
    check_background(background)
    name = source_name(source)
    image, _ = _undecoded(source, name)
    _check_size(image, name)
    try:
        # No Image.draft: decoding a JPEG at half size is faster, but its pixels are not those of a full decode.
        # TIFF alone reads metadata, and may warn of it, while it decodes; the others decode in parallel threads.
        with _quiet_pillow() if image.format == "TIFF" else nullcontext():
            image.load()
    except Exception as error:  # damaged files make Pillow's decoders raise nearly any type
        raise _damaged(name, image.format, error) from error
    return _to_rgb(_upright(image), background)


def image_size(source: ImageSource) -> tuple[int, int]:
    """Width and height of the image that `open_image` returns. Its pixels are not decoded, unless its file calls for it.

    Raises:
        ImageError: as `open_image`, for what a file's beginning tells.
    """
    name = source_name(source)
    image, data = _undecoded(source, name)
    if data is not None:
        _check_size(image, name)
        # Pillow would decode a PNG to look behind its pixels.
        if image.format == "PNG" and not any(mark in data for mark in _PNG_ORIENTATIONS):
            return image.size
        # It gives TIFF the upright size at once, and the orientation until the pixels are turned.
        if image.format == "TIFF":
            return image.size
    width, height = image.size
    return (height, width) if _orientation(image) in _ON_A_SIDE else (width, height)


def check_background(background: str) -> None:
    """Raise OptionError unless it is one of `Background`."""
    if background not in get_args(Background):
        raise OptionError(f"The background is {background!r}; it must be one of {', '.join(get_args(Background))}.")


def _undecoded(source: ImageSource, name: str) -> tuple[Image.Image, bytes | None]:
    """The image, of a file without its pixels, and the file's bytes."""
    if isinstance(source, Image.Image):
        return source, None
    if isinstance(source, np.ndarray):
        return _from_array(source), None
    data = read_image_bytes(source)
    return _read_header(data, name, named_page(source)), data


def _from_array(array: np.ndarray) -> Image.Image:
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))):
        raise ImageError(
            f"The array is {array.dtype} of shape {array.shape}; uint8 of shape (height, width, 1, 3 or 4) is expected."
        )
    if 0 in array.shape:
        raise ImageError(f"The array of shape {array.shape} has no pixels.")
    return Image.fromarray(array[:, :, 0] if array.shape[2:] == (1,) else array)


def _read_header(data: bytes, name: str, page: int | None) -> Image.Image:
    """Recognize the format and read the size, but no pixels; a PDF document's page is drawn."""
    image = _read_pillow_header(data, name)
    if image is None and is_pdf(data):
        return Image.fromarray(render_page(data, 1 if page is None else page, name))
    if page is not None and page != 1:
        raise ImageError(f"{name} is no PDF document, so it has no page {page}: leave out #page={page}.")
    if image is None and data[4:8] == b"ftyp" and data[8:12] in _HEIC_BRANDS:
        return _read_heic_header(data, name)
    if image is None:
        raise _not_readable(data, name)
    return image


def _read_pillow_header(data: bytes, name: str) -> Image.Image | None:
    """What one of Pillow's formats, or of those registered with it, makes of the bytes; None if they are of none.

    Does what Image.open does. That function warns at 89 and refuses at 179 megapixels, limits that only a global
    variable can change, and runs Ghostscript on PostScript.
    """
    with _quiet_pillow():
        for register_formats in (Image.preinit, Image.init):  # the five common ones, then all
            register_formats()
            for format_name in list(Image.ID):
                factory, accept = Image.OPEN[format_name]
                try:
                    accepted = accept is None or accept(data[:16])  # a string is a reason why not
                    if accepted and not isinstance(accepted, str) and format_name != "EPS":
                        return factory(io.BytesIO(data), "")
                except (SyntaxError, IndexError, TypeError, struct.error):
                    continue  # how a format says that the file is not its own
                except Exception as error:  # it is, but damaged, which may raise nearly any type
                    raise _damaged(name, format_name, error) from error
    return None


def _read_heic_header(data: bytes, name: str) -> Image.Image:
    try:
        from pillow_heif import HeifImageFile  # here, because most runs see no HEIC image and it takes 40 ms
    except ImportError:
        raise ImageError(f"{name} is a HEIC image: run `pip install 'mlx-fastvlm[formats]'` to read it.") from None
    try:
        return HeifImageFile(io.BytesIO(data), "")
    except Exception as error:  # as Pillow's own formats
        raise _damaged(name, "HEIC", error) from error


def _not_readable(data: bytes, name: str) -> ImageError:
    for offset, magic, format_name in _IMAGES:
        if data.startswith(magic, offset):
            return ImageError(f"{name} begins like a {format_name} image, but is damaged or cut off: get a new copy.")
    what, advice = _not_an_image(data) or ("not an image that Pillow can read", "convert it to PNG or JPEG")
    return ImageError(f"{name} is {what}: {advice}.")


def _not_an_image(data: bytes) -> tuple[str, str] | None:
    """What a file is that is not an image, and what to do about it; None if that is not known."""
    start = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for offset, magic, what, advice in _NOT_IMAGES:
        if data.startswith(magic, offset) or start.startswith(magic):
            return what, advice
    if b"<svg" in start:
        return "an SVG drawing", "export it as PNG"
    if start and all(byte >= 32 or byte in b"\t\r\n" for byte in start) and start.isascii():
        return "text", "give an image file"
    return None


def _check_size(image: Image.Image, name: str) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageError(f"{name} is {width}x{height} pixels: it has no pixels.")
    if width * height > MAX_IMAGE_PIXELS or max(width, height) > MAX_IMAGE_SIDE:
        raise ImageError(
            f"{name} is {width}x{height} pixels; the limits are {MAX_IMAGE_PIXELS / 1e6:g} megapixels "
            f"and {MAX_IMAGE_SIDE} pixels on a side: make it smaller."
        )


def _damaged(name: str, format_name: str | None, error: Exception) -> ImageError:
    what = f"{format_name} image" if format_name else "image"
    reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    if isinstance(error, Image.DecompressionBombError):
        return ImageError(f"{name} is too large to decode ({reason}): make it smaller.")
    if isinstance(error, MemoryError):
        return ImageError(f"{name} does not fit into memory: make it smaller.")
    if isinstance(error, EOFError) or "truncated" in reason.lower() or "end of file" in reason.lower():
        return ImageError(f"{name} is cut off: the {what} ends too early ({reason}). Get a complete copy.")
    return ImageError(f"{name} is damaged: the {what} cannot be decoded ({reason}). Get a new copy.")


@contextmanager
def _quiet_pillow() -> Iterator[None]:
    """Hide Pillow's warnings about odd metadata, which the user can do nothing about.

    Python's warning filters belong to the process: the lock keeps our own threads from restoring each other's, and
    the filter covers nothing but Pillow.
    """
    with _warnings_lock, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


def _upright(image: Image.Image) -> Image.Image:
    # exif_transpose copies even where there is nothing to do.
    if _orientation(image) == 1:
        return image
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF data raises nearly any type; the pixels are fine
        return image


def _orientation(image: Image.Image) -> int:
    """EXIF's number for how the image lies, from 1, upright, to 8. What is damaged is upright."""
    try:
        with _quiet_pillow():
            orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # nearly any type
        return 1
    return orientation if orientation in range(2, 9) else 1


def _to_rgb(image: Image.Image, background: Background) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return Image.fromarray(_eight_bit_gray(np.asarray(image), image.mode)).convert("RGB")
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    if image.mode == "La":  # premultiplied gray: Pillow converts it to LA only
        image = image.convert("LA")
    rgba = image.convert("RGBA")
    opaque = Image.new("RGB", rgba.size, background)
    opaque.paste(rgba, mask=rgba.getchannel("A"))
    return opaque


def _eight_bit_gray(values: np.ndarray, mode: str) -> np.ndarray:
    """Scale grays of more than 8 bits to 0..255.

    White is 65535 in mode I;16. Modes I and F do not say: white is the first of 1 (F only), 255 (as Pillow widens
    8 bits) and 65535 (16-bit PGM) that no value exceeds. Values beyond, or below 0, are stretched from minimum to
    maximum. What is not finite becomes black.

    Args:
        values: (H, W) integers or floats.
        mode: Pillow's name for them.

    Returns:
        (H, W) uint8.
    """
    values = np.nan_to_num(values.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    whites = {"F": (1, 255, 65535), "I": (255, 65535)}.get(mode, (65535,))
    white = next((white for white in whites if low >= 0 and high <= white), None)
    if white is None:
        values, white = values - np.float32(low), (high - low) or 1
    return np.rint(values * np.float32(255) / np.float32(white)).astype(np.uint8)
