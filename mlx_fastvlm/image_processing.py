"""From an image in any form to pixel_values: decode to RGB, fit into a square or rectangle, resize, scale.

Two calls, so that each can be timed: `open_image` decodes, `ImageProcessor.preprocess` does the rest.
The pixels of squares equal those of LLaVA's expand2square followed by transformers' CLIPImageProcessor, bit for bit.
Pillow is used here and, to measure detail, in auto_resolution only. HEIC images and PDF pages need the extra `formats`,
loaded when one is met.
"""

from __future__ import annotations

import io
import struct
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import mlx.core as mx
import numpy as np
from PIL import ExifTags, Image, ImageOps

from mlx_fastvlm.auto_resolution import AutoResolution
from mlx_fastvlm.errors import ConfigError, ImageError, OptionError
from mlx_fastvlm.image_source import FileSource, named_page, read_image_bytes, source_name
from mlx_fastvlm.pdf_pages import is_pdf, render_page
from mlx_fastvlm.resolution import (
    STEP,
    Fit,
    Size,
    check_fit,
    check_resolution,
    count_rows,
    native_size,
    resolutions,
)
from mlx_fastvlm.tiling import TiledPixels, Tiling

ImageSource = FileSource | Image.Image | np.ndarray
Background = Literal["white", "black"]

MAX_IMAGE_PIXELS = 200_000_000  # what the largest phone cameras make; 0.8 GB once decoded
MAX_IMAGE_SIDE = 32_768  # padding makes a square of it, and the resize then takes up to 15 s

_STRIP_PIXELS = 2**22  # a padded strip of 16 MB stays near the caches
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
    _check_choice("background", background, ("white", "black"))
    name = source_name(source)
    if isinstance(source, Image.Image):
        image = source
    elif isinstance(source, np.ndarray):
        image = _from_array(source)
    else:
        image = _read_header(read_image_bytes(source), name, named_page(source))
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
    if isinstance(source, Image.Image):
        image = source
    elif isinstance(source, np.ndarray):
        image = _from_array(source)
    else:
        data = read_image_bytes(source)
        image = _read_header(data, name, named_page(source))
        _check_size(image, name)
        # Pillow would decode a PNG to look behind its pixels.
        if image.format == "PNG" and not any(mark in data for mark in _PNG_ORIENTATIONS):
            return image.size
        # It gives TIFF the upright size at once, and the orientation until the pixels are turned.
        if image.format == "TIFF":
            return image.size
    width, height = image.size
    return (height, width) if _orientation(image) in _ON_A_SIDE else (width, height)


@dataclass(frozen=True)
class ImageProcessor:
    """Turns images into the pixel_values of one vision tower.

    Attributes:
        image_size: side R of the square result, in pixels; about the longer side of a rectangular one.
        fit: "pad" centers the image on a square as LLaVA does, which is what FastVLM was trained with; "crop" keeps
            only the central square, as the model card's snippet does; "native" resizes the whole image to the rectangle
            of `resolution.native_size`, whose shape is nearly its own; "tiles" cuts it, see `tiles`.
        background: what shows through transparent pixels.
        image_mean, image_std: per RGB channel, in units of [0, 1]. FastVLM has 0 and 1. Padding has the mean's color.
        auto: chooses each image's resolution by its content; `image_size` is the largest that it chooses then.
        tiling: how "tiles" cuts.
    """

    image_size: int
    fit: Fit = "pad"
    background: Background = "white"
    image_mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    image_std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    auto: AutoResolution | None = None
    tiling: Tiling = Tiling()

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise OptionError(f"The image size is {self.image_size}; it must be a positive number of pixels.")
        check_fit(self.fit)
        if self.fit in ("native", "tiles") and self.image_size % STEP:
            raise OptionError(
                f"The image size is {self.image_size}; it must be a multiple of {STEP} for fit {self.fit}."
            )
        if self.fit == "tiles" and self.auto is not None:
            raise OptionError("Tiles all have one resolution: leave out resolution auto, or fit tiles.")
        _check_choice("background", self.background, ("white", "black"))

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, fit: Fit = "pad") -> ImageProcessor:
        """Build from the content of a preprocessor_config.json.

        Args:
            config: fields as in CLIPImageProcessor and LlavaImageProcessor. A missing field means FastVLM's value.
            fit: what to do if `config` lacks `do_pad`, which CLIPImageProcessor does not have.

        Raises:
            ConfigError: `config` asks for something other than bicubic resizing to a square of [0, 1] values.
        """
        crop_size = _square_side(config, "crop_size")
        size = _square_side(config, "size")
        if (crop_size or size) is None:
            raise ConfigError("preprocessor_config.json has neither crop_size nor size: the image size is not known.")
        if crop_size and size and crop_size != size:
            raise ConfigError(
                f"preprocessor_config.json has size {size} but crop_size {crop_size}: they must be equal."
            )
        expected = {"do_resize": True, "do_rescale": True, "resample": int(Image.Resampling.BICUBIC)}
        for name, value in expected.items():
            if config.get(name, value) != value:
                raise ConfigError(f"preprocessor_config.json has {name} {config[name]!r}; only {value} is supported.")
        if abs(config.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6:
            raise ConfigError(f"preprocessor_config.json has rescale_factor {config['rescale_factor']}, not 1/255.")
        normalized = config.get("do_normalize", True)
        return cls(
            image_size=crop_size or size,
            fit=fit if config.get("do_pad") is None else "pad" if config["do_pad"] else "crop",
            image_mean=_three_numbers(config, "image_mean", cls.image_mean) if normalized else cls.image_mean,
            image_std=_three_numbers(config, "image_std", cls.image_std) if normalized else cls.image_std,
        )

    def to_dict(self) -> dict[str, Any]:
        """The content of a preprocessor_config.json, with which transformers gives the same pixels."""
        return {
            "image_processor_type": "LlavaImageProcessor" if self.fit == "pad" else "CLIPImageProcessor",
            "do_convert_rgb": True,
            "do_pad": self.fit == "pad",
            "do_resize": True,
            "size": {"shortest_edge": self.image_size},
            "resample": int(Image.Resampling.BICUBIC),
            "do_center_crop": True,
            "crop_size": {"height": self.image_size, "width": self.image_size},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.image_mean),
            "image_std": list(self.image_std),
        }

    def at(self, resolution: int | None = None, fit: Fit | None = None) -> ImageProcessor:
        """The same for another resolution or fit; None leaves the present one.

        Raises:
            OptionError: the resolution is not one of `resolutions`, or the fit is unknown.
        """
        if resolution is not None:
            check_resolution(resolution, self.resolutions)
        return replace(self, image_size=resolution or self.image_size, fit=fit or self.fit)

    @property
    def resolutions(self) -> range:
        """What `at` takes, for a processor that is as the model was trained."""
        return resolutions(self.image_size)

    @property
    def fixed_size(self) -> Size | None:
        """Height and width of what the tower sees, where those are the same for every image; else None."""
        is_fixed = self.fit in ("pad", "crop") and self.auto is None
        return (self.image_size, self.image_size) if is_fixed else None

    def chosen_for(self, picture: Image.Image) -> ImageProcessor:
        """The same with the resolution that `auto` chooses for this RGB picture; without `auto`, the same."""
        return self if self.auto is None else replace(self, image_size=self.auto.choose(picture), auto=None)

    def size_of(self, width: int, height: int) -> Size:
        """Height and width of what the tower sees of an image of this size. An image of just that size is not changed.

        Where `auto` chooses, ask what `chosen_for` gives.
        """
        assert self.auto is None, "an image's size depends on its content: ask chosen_for first"
        assert self.fit != "tiles", "tiles have a layout, not a size"
        return self.fixed_size or native_size(width, height, self.image_size)

    def to_array(self, image: ImageSource) -> np.ndarray:
        """Fit, resize and scale one image.

        Args:
            image: anything `open_image` takes; an RGB image that it returned is not decoded again.

        Returns:
            (H, W, 3) float32, HWC, H and W as `size_of` says. In [0, 1] with FastVLM's mean and std.

        Raises:
            ImageError: see `open_image`; or the image is too narrow to be cropped.
        """
        return self._scaled(self.to_bytes(image))

    def to_bytes(self, image: ImageSource) -> np.ndarray:
        """`to_array` before it scales: (H, W, 3) uint8, an image of which it makes the same values. Same errors."""
        rgb = open_image(image, background=self.background)
        if self.auto is not None:
            return self.chosen_for(rgb).to_bytes(rgb)
        if self.fit == "tiles":
            raise OptionError("Tiles are several arrays, and one is expected here: choose another fit.")
        return np.asarray({"pad": self._pad, "crop": self._crop, "native": self._keep_shape}[self.fit](rgb))

    def tiles(self, image: ImageSource) -> TiledPixels:
        """Cut one image as LLaVA's AnyRes does, into tiles of `image_size`.

        The overview is the whole image resized to a square, its shape not kept. Behind it come the tiles of the best
        grid (`Tiling.layout`), on which the image is centered on black, its shape kept.

        Args:
            image: anything `open_image` takes.

        Raises:
            ImageError: see `open_image`.
        """
        rgb = open_image(image, background=self.background)
        size = self.image_size
        layout = self.tiling.layout(*rgb.size, size)
        canvas = Image.new("RGB", layout.canvas)
        left, top = ((whole - part) // 2 for whole, part in zip(layout.canvas, layout.resized, strict=True))
        canvas.paste(_resize(rgb, layout.resized), (left, top))
        columns, rows = layout.grid
        corners = [(column * size, row * size) for row in range(rows) for column in range(columns)]
        cut = [_resize(rgb, (size, size)), *(canvas.crop((x, y, x + size, y + size)) for x, y in corners)]
        return TiledPixels(self._scaled(np.stack([np.asarray(tile) for tile in cut])), layout)

    def prepare(self, image: ImageSource) -> np.ndarray | TiledPixels:
        """What the fit makes of one image: `tiles`, or else `to_array`. Same arguments and errors."""
        return self.tiles(image) if self.fit == "tiles" else self.to_array(image)

    def largest(self) -> np.ndarray | TiledPixels:
        """What `prepare` makes of an image that takes most positions, without the image's values."""
        size = self.image_size
        if self.fit == "tiles":
            return TiledPixels(np.empty((0, size, size, 3), np.float32), self.tiling.largest(size))
        return np.empty((size, size, 3), np.float32)

    def count_rows(self, width: int, height: int) -> int:
        """How many positions of the decoder an image of this size takes. Without `auto`, see `size_of`."""
        if self.fit == "tiles":
            return self.tiling.layout(width, height, self.image_size).rows
        return count_rows(self.size_of(width, height))

    def preprocess(self, image: ImageSource) -> mx.array:
        """`to_array` as a batch of one: (1, H, W, 3) float32, NHWC. Same arguments and errors."""
        return mx.array(self.to_array(image)[None])

    def _scaled(self, values: np.ndarray) -> np.ndarray:
        """uint8 → float32, with FastVLM's mean and std in [0, 1]."""
        pixels = np.divide(values, 255, dtype=np.float32)
        if any(self.image_mean) or any(std != 1 for std in self.image_std):
            pixels = (pixels - np.float32(self.image_mean)) / np.float32(self.image_std)
        return pixels

    def _pad(self, image: Image.Image) -> Image.Image:
        """Center on a square of the longer side, then resize to R.

        Equals apple/ml-fastvlm@592b4ad llava/mm_utils.py#L154 (expand2square) and one bicubic resize, without making
        the whole square, which takes 400 MB for a screenshot of 1080x10000. Pillow resizes rows first, columns second,
        with 8-bit values in between. So rows can be resized strip by strip, and rows of padding need no work.
        """
        side, (width, height) = max(image.size), image.size
        left, top = (side - width) // 2, (side - height) // 2
        color = tuple(int(mean * 255) for mean in self.image_mean)
        rows_done = Image.new("RGB", (self.image_size, side), color)
        strip_height = height if width == side else max(1, _STRIP_PIXELS // side)
        for start in range(0, height, strip_height):
            strip = image
            if width != side:
                strip = Image.new("RGB", (side, min(strip_height, height - start)), color)
                strip.paste(image, (left, -start))
            rows_done.paste(_resize(strip, (self.image_size, strip.height)), (0, top + start))
        return _resize(rows_done, (self.image_size, self.image_size))

    def _crop(self, image: Image.Image) -> Image.Image:
        """Resize the shorter side to R, then keep the center, with CLIPImageProcessor's rounding of sizes."""
        short, long = sorted(image.size)
        resized_long = int(self.image_size * long / short)
        if resized_long * self.image_size > MAX_IMAGE_PIXELS:
            raise ImageError(
                f"The image is {image.width}x{image.height} pixels, too narrow to crop to a square of "
                f'{self.image_size}: pad it instead (fit "pad").'
            )
        wide = image.width > image.height
        resized = _resize(image, (resized_long, self.image_size) if wide else (self.image_size, resized_long))
        left, top = (resized.width - self.image_size) // 2, (resized.height - self.image_size) // 2
        return resized.crop((left, top, left + self.image_size, top + self.image_size))

    def _keep_shape(self, image: Image.Image) -> Image.Image:
        """One bicubic resize of the whole image; its sides change by nearly the same factor."""
        height, width = self.size_of(*image.size)
        return _resize(image, (width, height))


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise OptionError(f"The {name} is {value!r}; it must be one of {', '.join(allowed)}.")


def _resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)


def _square_side(config: Mapping[str, Any], name: str) -> int | None:
    """The one length in a size that Hugging Face writes as a number or as a mapping."""
    value = config.get(name)
    lengths = set(value.values()) if isinstance(value, Mapping) else {value}
    if len(lengths) != 1 or not all(length is None or isinstance(length, int) for length in lengths):
        raise ConfigError(f"preprocessor_config.json has {name} {value!r}; a square of whole pixels is expected.")
    return lengths.pop()


def _three_numbers(config: Mapping[str, Any], name: str, default: tuple[float, ...]) -> tuple[float, ...]:
    value = config.get(name)
    if value is None:
        return default
    if not isinstance(value, (list, tuple)) or len(value) != 3 or not all(isinstance(v, (int, float)) for v in value):
        raise ConfigError(f"preprocessor_config.json has {name} {value!r}; three numbers are expected.")
    return tuple(float(v) for v in value)


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
