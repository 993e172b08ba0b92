"""From an image to pixel_values: fit it into a square or rectangle, resize, scale.

Two calls, so that each can be timed: `image_decoding.open_image` decodes, `ImageProcessor.preprocess` does the rest.
The pixels of squares equal those of LLaVA's expand2square followed by transformers' CLIPImageProcessor, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from mlx_fastvlm.auto_resolution import AutoResolution
from mlx_fastvlm.errors import ConfigError, ImageError, OptionError
from mlx_fastvlm.image_decoding import MAX_IMAGE_PIXELS, Background, ImageSource, check_background, open_image
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

_STRIP_PIXELS = 2**22  # a padded strip of 16 MB stays near the caches


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
        check_background(self.background)

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
