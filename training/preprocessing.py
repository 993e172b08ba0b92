"""LLaVA's image preprocessing with `image_aspect_ratio: pad`, up to the division by 255."""

import numpy as np
from PIL import Image


def to_square_array(image: Image.Image, image_size: int) -> np.ndarray:
    """Paste centered on a black square, resize bicubically; uint8 (image_size, image_size, 3)."""
    image = image.convert("RGB")
    side = max(image.size)
    if image.size != (side, side):
        square = Image.new("RGB", (side, side))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = square
    if side != image_size:
        image = image.resize((image_size, image_size), Image.Resampling.BICUBIC)
    return np.asarray(image)
