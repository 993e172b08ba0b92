"""A client's images: from the URLs of a request to pictures of the model's size, known by their content.

Large pictures are decoded and shrunk here, away from the engine's thread and few at a time, clients in turn; small ones
go on. A picture that was shown lately is not even decoded again.
"""

from __future__ import annotations

import re
import struct
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace

from mlx_fastvlm.answer import StageClock
from mlx_fastvlm.errors import ImageError
from mlx_fastvlm.image_content import ImageContent, recognize
from mlx_fastvlm.image_decoding import open_image
from mlx_fastvlm.image_processing import ImageProcessor
from mlx_fastvlm.image_source import read_image_bytes
from mlx_fastvlm.server.api_errors import bad_request, from_library
from mlx_fastvlm.server.asked import ImageField
from mlx_fastvlm.server.fair_workers import FairWorkers
from mlx_fastvlm.server.limits import Limits
from mlx_fastvlm.server.remote_images import fetch_image

_Shrunk = tuple[ImageContent, ImageProcessor]  # an image in a model's size, and what gave it that, without `auto`

_KEPT_BYTES = 2**26  # 21 squares of 1024 pixels
_DECODED_AT_ONCE = 2  # each may take four bytes a pixel for a moment, and as much again
_FETCHED_AT_ONCE = 8  # each mostly waits
_PNG_BEGINNING = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"  # and then its size
_PNG_SIZE = struct.Struct(">II")


class Pictures:
    """Reads images for all models of a server. Used from one event loop.

    Args:
        limits: how many images, how large.
        allow_remote: whether http(s) URLs are fetched.
    """

    def __init__(self, limits: Limits, allow_remote: bool):
        self._limits, self._allow_remote = limits, allow_remote
        self._decoders = FairWorkers(_DECODED_AT_ONCE, "decode")
        self._fetchers = FairWorkers(_FETCHED_AT_ONCE, "fetch")
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[str, ImageProcessor], _Shrunk] = OrderedDict()  # least recently used first
        self._bytes = 0

    async def read(
        self, images: Sequence[ImageField], image_processor: ImageProcessor, client: str, clock: StageClock
    ) -> tuple[list[ImageContent], ImageProcessor]:
        """The images of a request.

        Args:
            images: where they are.
            image_processor: gives them their size. With `auto` it is the largest that is chosen for one of them.
            client: whose turn it takes, for each image one.
            clock: fetch, wait and decode are booked on it.

        Returns:
            They, and what gave them their size, without `auto`.

        Raises:
            ApiError: there are too many, a URL is not allowed or does not lead to an image, or one cannot be decoded.
        """
        if len(images) > self._limits.max_images:
            raise bad_request(
                f"The request has {len(images)} images; at most {self._limits.max_images} are taken.", "messages"
            )
        found = [await self._read(image, image_processor, client, clock) for image in images]
        largest = max(
            (chosen for _, chosen in found),
            key=lambda each: each.image_size,
            default=replace(image_processor, auto=None),
        )
        contents = [
            content if chosen == largest else (await self._read(image, largest, client, clock))[0]
            for image, (content, chosen) in zip(images, found, strict=True)
        ]
        return contents, largest

    def close(self) -> None:
        """Read no more."""
        self._decoders.close()
        self._fetchers.close()

    async def _read(
        self, image: ImageField, image_processor: ImageProcessor, client: str, clock: StageClock
    ) -> _Shrunk:
        """An image, whose file is let go then."""
        try:
            source = await self._source(image, client, clock)
            return await self._decoders.run(client, self._decoded, source, image_processor, clock)
        except ImageError as error:
            raise from_library(error, image.param) from None

    async def _source(self, image: ImageField, client: str, clock: StageClock) -> str | bytes:
        """A data: URL itself, or what another leads to."""
        if image.url[:5].lower() == "data:":
            return image.url
        if not re.match(r"https?://", image.url, re.IGNORECASE):
            raise bad_request("An image's URL begins with data: or https:; files are not read.", image.param)
        if not self._allow_remote:
            raise bad_request(
                "This server fetches no images: send a data: URL, or start it with --allow-remote-images.", image.param
            )
        limits = self._limits
        file = await self._fetchers.run(
            client, fetch_image, image.url, limits.remote_image_mb, limits.remote_image_seconds
        )
        clock.lap("fetch")
        return file

    def _decoded(self, source: str | bytes, image_processor: ImageProcessor, clock: StageClock) -> _Shrunk:
        """The image in the model's size, under the digest of the file it came from, and what gave it that size."""
        clock.lap("wait")
        content = recognize(read_image_bytes(source), image_processor.background, "The image")
        found = self._known(content, image_processor) or self._shrunk(content, image_processor)
        clock.lap("decode")
        return found

    def _known(self, content: ImageContent, image_processor: ImageProcessor) -> _Shrunk | None:
        with self._lock:
            known = self._kept.get((content.digest, image_processor))
            if known is not None:
                self._kept.move_to_end((content.digest, image_processor))
            return known

    def _shrunk(self, content: ImageContent, image_processor: ImageProcessor) -> _Shrunk:
        self._check_size(content)
        picture = open_image(content.open(), background=image_processor.background)
        chosen = image_processor.chosen_for(picture)
        small = ImageContent(content.digest, chosen.to_bytes(picture), content.name)
        found = small, chosen
        with self._lock:
            if self._kept.setdefault((content.digest, image_processor), found) is found:
                self._bytes += small.source.nbytes
            while self._bytes > _KEPT_BYTES:
                _, (oldest, _) = self._kept.popitem(last=False)
                self._bytes -= oldest.source.nbytes
        return found

    def _check_size(self, content: ImageContent) -> None:
        width, height = _size(content)
        if width * height > self._limits.max_image_mp * 1e6:
            raise ImageError(
                f"The image is {width}x{height} pixels; this server takes {self._limits.max_image_mp:g} megapixels: "
                "make it smaller."
            )


def _size(content: ImageContent) -> tuple[int, int]:
    """Width and height, or the other way round, without decoding it."""
    # Pillow would decode a PNG with metadata, such as a screenshot, to see which side is up.
    if content.is_file and content.source.startswith(_PNG_BEGINNING):
        return _PNG_SIZE.unpack_from(content.source.ljust(24, b"\0"), 16)
    return content.size
