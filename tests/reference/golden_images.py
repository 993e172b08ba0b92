"""Small generated pictures of odd shapes and modes, and LLaVA's preprocessing done by transformers' processor."""

from typing import Any

import numpy as np
import transformers
from PIL import Image, ImageDraw

PREPROCESSED_SIZE = 128

# name: (width, height, PIL mode)
SHAPES: dict[str, tuple[int, int, str]] = {
    "landscape": (200, 120, "RGB"),
    "portrait": (91, 233, "RGB"),
    "square": (64, 64, "RGB"),
    "exact": (128, 128, "RGB"),
    "wide": (301, 17, "RGB"),
    "odd_gray": (77, 50, "L"),
    "alpha": (60, 81, "RGBA"),
    "palette": (45, 44, "P"),
}


def draw(width: int, height: int, mode: str, phase: float = 0.0) -> Image.Image:
    """Gradients, an ellipse, thin lines and a few letters: content on which resampling filters differ."""
    x = np.linspace(0, 1, width)[None, :]
    y = np.linspace(0, 1, height)[:, None]
    planes = [x + 0 * y, (y + 0 * x + phase) % 1, ((x + y) * 2 + phase) % 1]
    image = Image.fromarray((np.stack(planes, axis=-1) * 255).astype(np.uint8), "RGB")
    pen = ImageDraw.Draw(image)
    pen.ellipse((width * 0.2, height * 0.2, width * 0.6, height * 0.8), fill=(230, 40, 20), outline=(255, 255, 255))
    for step in range(0, width, 9):
        pen.line((step, 0, step // 2, height), fill=(step % 256, 255, 0))
    pen.text((width // 2, height // 3), "FastVLM 64", fill=(0, 0, 0))
    if mode == "RGBA":
        image.putalpha(Image.fromarray((np.broadcast_to(x, (height, width)) * 255).astype(np.uint8), "L"))
    elif mode == "P":
        image = image.quantize(16)
    elif mode != "RGB":
        image = image.convert(mode)
    return image


def clip_processor(size: int) -> Any:
    """CLIPImageProcessor on PIL with the arguments of MobileCLIPVisionTower (ml-fastvlm@592b4ad)."""
    kind = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    return kind(
        crop_size={"height": size, "width": size},
        image_mean=[0.0, 0.0, 0.0],
        image_std=[1.0, 1.0, 1.0],
        size={"shortest_edge": size},
    )


def preprocess(image: Image.Image, size: int, *, pad: bool) -> np.ndarray:
    """(3, size, size) float32 in [0, 1] as LLaVA makes it.

    `pad` is config.json's image_aspect_ratio "pad": centered on a square of the processor's mean color (black).
    Without it the shortest edge is resized and the center cropped, as in the model card's snippet.
    """
    processor = clip_processor(size)
    image = image.convert("RGB")
    if pad and image.width != image.height:
        side = max(image.size)
        canvas = Image.new("RGB", (side, side), tuple(int(mean * 255) for mean in processor.image_mean))
        canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = canvas
    return np.asarray(processor.preprocess(image, return_tensors="np")["pixel_values"][0])
