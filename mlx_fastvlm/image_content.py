"""An image known by its content, so that the same picture is recognized however it is named."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from mlx_fastvlm.image_decoding import Background, ImageSource, image_size, open_image
from mlx_fastvlm.image_source import named_page, read_image_bytes, source_name

_DIGEST_LENGTH = 32  # hexadecimal digits of a SHA-256, which processors have built in


@dataclass(frozen=True)
class ImageContent:
    """A snapshot of an image: equal content, equal digest.

    Attributes:
        digest: of the file's bytes, or of the pixels where there is no file; 32 hexadecimal digits.
        source: what `open_image` takes: those bytes, or an RGB picture that nobody else changes.
        name: what messages call it.
    """

    digest: str
    source: ImageSource = field(compare=False, repr=False)
    name: str = field(compare=False)

    @property
    def is_file(self) -> bool:
        """Whether it is known by a file's bytes rather than by pixels."""
        return isinstance(self.source, bytes)

    @cached_property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels, upright. Raises ImageError where a file's beginning is damaged."""
        return image_size(self.open())

    def open(self) -> ImageSource:
        """What `open_image` takes, and calls by its name if it is damaged."""
        if not self.is_file:
            return self.source
        return _named_file(self.source, self.name)

    def file_bytes(self) -> bytes:
        """The image as a file: its own bytes, or a PNG of the pixels."""
        if self.is_file:
            return self.source
        file = io.BytesIO()
        self.source.save(file, "PNG")
        return file.getvalue()


def recognize(
    source: ImageSource | ImageContent, background: Background = "white", name: str | None = None
) -> ImageContent:
    """Read an image, once, and know it by its content. It is not decoded unless it has to be.

    Args:
        source: whatever `open_image` takes, or a content, which is returned.
        background: what shows through transparent pixels of a picture that is not a file.
        name: what messages call it, in place of what `source` says.

    Raises:
        ImageError: it cannot be read.
    """
    if isinstance(source, ImageContent):
        return source
    name = name or source_name(source)
    if not hasattr(source, "convert") and not isinstance(source, np.ndarray):
        data = read_image_bytes(source)
        page = named_page(source)
        if page is None:
            return ImageContent(hashlib.sha256(data).hexdigest()[:_DIGEST_LENGTH], data, name)
        # One page of a document is known by its pixels.
        source = _named_file(data, f"{name.removesuffix(f'#page={page}')}#page={page}")
    picture = open_image(source, background=background).copy()
    pixels = hashlib.sha256(repr(picture.size).encode())
    pixels.update(picture.tobytes())
    return ImageContent(pixels.hexdigest()[:_DIGEST_LENGTH], picture, name)


def _named_file(data: bytes, name: str) -> io.BytesIO:
    file = io.BytesIO(data)
    file.name = name
    return file
