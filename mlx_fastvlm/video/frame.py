"""One frame of a video, and how it would look on a screen: upright, in its true proportions, without combs, in sRGB.

The conversion is done when it is asked for, so that frames that nobody describes cost their decoding only.
"""

from __future__ import annotations

from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from mlx_fastvlm.video.tone_map import tone_map

if TYPE_CHECKING:
    from av import VideoFrame

THUMBNAIL_SIDE = 128

_HDR_TRANSFERS = {16: False, 18: True}  # SMPTE ST 2084, ARIB STD-B67, as ITU-T H.273 numbers them; whether it is HLG
_HDR_LONG_SIDE = 2048  # tone mapping is slow, and no model here sees more
_UNSPECIFIED = 2  # colorspace
_HD_HEIGHT = 720  # from here on a video that does not name its colors has BT.709's, below BT.601's, as players take it


class Frame:
    """A decoded frame.

    Args:
        picture: as PyAV decodes it.
        time: seconds since the video's beginning; of a live source, since watching began.
        pixel_aspect: width to height of a pixel, where the picture itself does not say.

    Attributes:
        time: as given.
    """

    def __init__(self, picture: VideoFrame, time: float, pixel_aspect: Fraction | None = None):
        self.time = time
        self._picture = picture
        self._pixel_aspect = pixel_aspect or Fraction(1)

    @cached_property
    def thumbnail(self) -> np.ndarray:
        """(128, 128, 3) uint8, to compare frames by: the whole picture, each pixel the mean of those it stands for."""
        size = {"width": THUMBNAIL_SIDE, "height": THUMBNAIL_SIDE}
        return self._picture.reformat(**size, format="rgb24", interpolation="AREA", threads=1).to_ndarray()

    def pixels(self) -> np.ndarray:
        """The frame as it is to be seen.

        Returns:
            (H, W, 3) uint8 RGB, or (H, W, 4) RGBA if it has an alpha channel.
        """
        picture = self._picture
        width, height = max(1, round(picture.width * self._pixel_aspect)), picture.height
        transfer = int(picture.color_trc)
        if picture.interlaced_frame:
            picture = _one_field(picture)
        if transfer in _HDR_TRANSFERS:
            shrink = max(1, max(width, height) / _HDR_LONG_SIDE)
            codes = _convert(picture, round(width / shrink), round(height / shrink), "rgb48le")
            pixels = tone_map(codes, is_hlg=_HDR_TRANSFERS[transfer])
        else:
            has_alpha = any(component.is_alpha for component in picture.format.components)
            pixels = _convert(picture, width, height, "rgba" if has_alpha else "rgb24")
        turns = round(self._picture.rotation / 90) % 4  # of the display matrix, counterclockwise
        return np.ascontiguousarray(np.rot90(pixels, turns))


def _convert(picture: VideoFrame, width: int, height: int, pixel_format: str) -> np.ndarray:
    is_hd_unnamed = int(picture.colorspace) == _UNSPECIFIED and height >= _HD_HEIGHT
    return picture.reformat(
        width,
        height,
        pixel_format,
        src_colorspace="ITU709" if is_hd_unnamed else None,
        interpolation="BICUBIC",
        threads=1,  # frames are converted in threads
    ).to_ndarray()


def _one_field(picture: VideoFrame) -> VideoFrame:
    """Every other line: the two fields of an interlaced frame are of different moments, which shows as combs."""
    from av.filter import Graph

    graph = Graph()
    source = graph.add_buffer(
        width=picture.width, height=picture.height, format=picture.format, time_base=Fraction(1, 1000)
    )
    graph.link_nodes(source, graph.add("field", "type=top"), graph.add("buffersink")).configure()
    graph.vpush(picture)
    return graph.vpull()
