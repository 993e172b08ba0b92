"""A client's images: from the URLs of a request to squares of the model's size, known by their content.

Large pictures are decoded and shrunk here, away from the engine's thread and few at a time; small squares go on. A
picture that was shown lately is not even decoded again.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from mlx_fastvlm.errors import ImageError
from mlx_fastvlm.image_content import ImageContent, recognize
from mlx_fastvlm.image_processing import ImageProcessor, open_image
from mlx_fastvlm.image_source import read_image_bytes
from mlx_fastvlm.server.api_errors import bad_request, from_library
from mlx_fastvlm.server.limits import Limits
from mlx_fastvlm.server.remote_images import fetch_image
from mlx_fastvlm.server.schema import ImageField

_KEPT_BYTES = 2**26  # 21 squares of 1024 pixels
_DECODED_AT_ONCE = 2  # each may take 0.8 GB for a moment


class Pictures:
    """Reads images for one model. Its methods may be called from several threads.

    Args:
        image_processor: of the model.
        limits: how many images, how large.
        allow_remote: whether http(s) URLs are fetched.
    """

    def __init__(self, image_processor: ImageProcessor, limits: Limits, allow_remote: bool):
        self._image_processor, self._limits, self._allow_remote = image_processor, limits, allow_remote
        self._decoding = threading.Semaphore(_DECODED_AT_ONCE)
        self._lock = threading.Lock()
        self._squares: OrderedDict[str, ImageContent] = OrderedDict()  # least recently used first
        self._bytes = 0

    def read(self, images: Sequence[ImageField]) -> list[ImageContent]:
        """The images of a request.

        Raises:
            ApiError: there are too many, a URL is not allowed or does not lead to an image, or one cannot be decoded.
        """
        if len(images) > self._limits.max_images:
            raise bad_request(
                f"The request has {len(images)} images; at most {self._limits.max_images} are taken.", "messages"
            )
        return [self._read(image) for image in images]

    def _read(self, image: ImageField) -> ImageContent:
        try:
            data = self._file(image)
            # A document is drawn, not known by its bytes: that is work too.
            with self._decoding:
                return self._square(recognize(data, self._image_processor.background, "The image"))
        except ImageError as error:
            raise from_library(error, image.param) from None

    def _file(self, image: ImageField) -> bytes:
        if image.url[:5].lower() == "data:":
            return read_image_bytes(image.url)
        if not re.match(r"https?://", image.url, re.IGNORECASE):
            raise bad_request("An image's URL begins with data: or https:; files are not read.", image.param)
        if not self._allow_remote:
            raise bad_request(
                "This server fetches no images: send a data: URL, or start it with --allow-remote-images.", image.param
            )
        return fetch_image(image.url, self._limits.remote_image_mb, self._limits.remote_image_seconds)

    def _square(self, content: ImageContent) -> ImageContent:
        """The image in the model's size, under the digest of the file it came from."""
        with self._lock:
            known = self._squares.get(content.digest)
            if known is not None:
                self._squares.move_to_end(content.digest)
                return known
        picture = open_image(content.open(), background=self._image_processor.background)
        square = ImageContent(content.digest, _to_bytes(self._image_processor, picture), content.name)
        with self._lock:
            if content.digest not in self._squares:
                self._squares[content.digest] = square
                self._bytes += square.source.nbytes
            while self._bytes > _KEPT_BYTES:
                _, oldest = self._squares.popitem(last=False)
                self._bytes -= oldest.source.nbytes
        return square


def _to_bytes(image_processor: ImageProcessor, picture: object) -> np.ndarray:
    """(R, R, 3) uint8: a picture as `ImageProcessor` fits it into its square, from which it makes the same pixel values."""
    pixels = image_processor.to_array(picture)
    scaled = (pixels * np.float32(image_processor.image_std) + np.float32(image_processor.image_mean)) * 255
    return np.rint(scaled).astype(np.uint8)
