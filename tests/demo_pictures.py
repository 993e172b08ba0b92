"""Pictures that the demo model has words for, drawn for tests that caption many."""

import random
from pathlib import Path

from PIL import Image, ImageDraw

_COLORS = ["red", "green", "blue", "yellow", "black"]


def draw(path: Path | str, seed: int) -> None:
    """Write one shape on white; equal seeds give equal pictures."""
    rng = random.Random(seed)
    image = Image.new("RGB", (96, 96), "white")
    pen = ImageDraw.Draw(image)
    x, y = rng.randint(0, 40), rng.randint(0, 40)
    shape = pen.ellipse if rng.random() < 0.5 else pen.rectangle
    shape((x, y, x + 50, y + 50), fill=rng.choice(_COLORS))
    image.save(path)
