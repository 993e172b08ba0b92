"""Generated scenes of one to three colored shapes, with the captions and questions that they determine.

Deterministic in the seed, PIL only. Attributes are unambiguous by construction: two sizes with a wide gap, colors far
apart and always in contrast with the background, every shape well inside its own cell of a 3×3 grid.
"""

import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "star", "cross")
COLORS = {
    "red": (220, 30, 30),
    "green": (30, 150, 50),
    "blue": (30, 60, 220),
    "yellow": (250, 215, 30),
    "orange": (250, 130, 20),
    "purple": (140, 40, 170),
    "black": (15, 15, 15),
    "white": (250, 250, 250),
}
SIZES = ("small", "large")
POSITIONS = (
    "at the top left",
    "at the top",
    "at the top right",
    "on the left",
    "in the center",
    "on the right",
    "at the bottom left",
    "at the bottom",
    "at the bottom right",
)
COUNTS = ("zero", "one", "two", "three")
BACKGROUNDS = {
    "white": (255, 255, 255),
    "light gray": (205, 205, 205),
    "pale blue": (195, 220, 245),
    "pale pink": (250, 215, 220),
    "dark gray": (75, 75, 75),
}
TOO_CLOSE = {("white", name) for name in BACKGROUNDS if name != "dark gray"} | {
    ("black", "dark gray"),
    ("purple", "dark gray"),
}
ASPECTS = ((1.0, 1.0), (1.0, 0.75), (0.75, 1.0))
RADII = {"small": (0.064, 0.072), "large": (0.104, 0.115)}
SUPERSAMPLING = 4
OUTLINES = {
    "square": ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
    "triangle": ((0.0, -1.0), (1.0, 0.85), (-1.0, 0.85)),
    "star": (
        *((0.0, -1.08), (0.26, -0.36), (1.03, -0.33), (0.43, 0.14), (0.63, 0.87)),
        *((0.0, 0.45), (-0.63, 0.87), (-0.43, 0.14), (-1.03, -0.33), (-0.26, -0.36)),
    ),
    "cross": (
        *((-0.33, -1.0), (0.33, -1.0), (0.33, -0.33), (1.0, -0.33), (1.0, 0.33), (0.33, 0.33)),
        *((0.33, 1.0), (-0.33, 1.0), (-0.33, 0.33), (-1.0, 0.33), (-1.0, -0.33), (-0.33, -0.33)),
    ),
}


@dataclass(frozen=True)
class Shape:
    """One shape; center and radius are fractions of the picture's longer side."""

    kind: str
    color: str
    size: str
    cell: int
    center: tuple[float, float]
    radius: float
    rgb: tuple[int, int, int]

    @property
    def noun(self) -> str:
        return f"{self.size} {self.color} {self.kind}"

    @property
    def position(self) -> str:
        return POSITIONS[self.cell]


@dataclass(frozen=True)
class Scene:
    """Shapes in reading order on a plain background; aspect is (width, height) with the longer side 1."""

    shapes: tuple[Shape, ...]
    background: tuple[int, int, int]
    aspect: tuple[float, float]


def _jitter(rng: random.Random, rgb: tuple[int, int, int], amount: int) -> tuple[int, int, int]:
    return tuple(min(255, max(0, value + rng.randint(-amount, amount))) for value in rgb)


def make_scene(seed: int, aspect: tuple[float, float] | None = None) -> Scene:
    """The scene that belongs to a seed; `aspect` overrides the drawn one."""
    rng = random.Random(seed)
    drawn = rng.choices(ASPECTS, (6, 1, 1))[0]
    aspect = aspect or drawn
    background = rng.choice(list(BACKGROUNDS))
    colors = [color for color in COLORS if (color, background) not in TOO_CLOSE]
    shapes = []
    for cell in sorted(rng.sample(range(9), rng.choice((1, 2, 2, 3, 3, 3)))):
        size, color = rng.choice(SIZES), rng.choice(colors)
        radius = rng.uniform(*RADII[size])
        center = []
        for axis, index in enumerate((cell % 3, cell // 3)):
            width = aspect[axis] / 3
            slack = max(0.0, width / 2 - 1.05 * radius) * 0.4
            center.append((index + 0.5) * width + rng.uniform(-slack, slack))
        rgb = _jitter(rng, COLORS[color], 10)
        shapes.append(Shape(rng.choice(SHAPES), color, size, cell, tuple(center), radius, rgb))
    return Scene(tuple(shapes), _jitter(rng, BACKGROUNDS[background], 6), aspect)


def render(scene: Scene, long_side: int = 256) -> Image.Image:
    """Draw a scene, anti-aliased, as an RGB picture whose longer side has `long_side` pixels."""
    image = Image.new("RGB", tuple(round(side * long_side) for side in scene.aspect), scene.background)
    for shape in scene.shapes:
        left, top = (int((c - 1.1 * shape.radius) * long_side) for c in shape.center)
        side = int(2.2 * shape.radius * long_side) + 2
        mask = Image.new("L", (side * SUPERSAMPLING, side * SUPERSAMPLING))
        x, y = ((c * long_side - origin) * SUPERSAMPLING for c, origin in zip(shape.center, (left, top), strict=True))
        r = shape.radius * long_side * SUPERSAMPLING
        if shape.kind == "circle":
            ImageDraw.Draw(mask).ellipse((x - r, y - r, x + r, y + r), fill=255)
        else:
            ImageDraw.Draw(mask).polygon([(x + r * u, y + r * v) for u, v in OUTLINES[shape.kind]], fill=255)
        image.paste(shape.rgb, (left, top), mask.reduce(SUPERSAMPLING))
    return image


def _join(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def caption(scene: Scene) -> str:
    """The canonical caption: count, then every shape with size, color and position in reading order."""
    count = COUNTS[len(scene.shapes)].capitalize()
    listing = _join([f"a {shape.noun} {shape.position}" for shape in scene.shapes])
    return f"{count} shape{'s' if len(scene.shapes) > 1 else ''}: {listing}."


def brief_caption(scene: Scene) -> str:
    """The short form: the shapes without count and positions."""
    return _join([f"a {shape.noun}" for shape in scene.shapes]).capitalize() + "."


def count_answer(scene: Scene) -> str:
    return COUNTS[len(scene.shapes)]


def ask(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """One random question about a scene whose answer the scene determines, as (prompt, answer)."""
    shape = rng.choice(scene.shapes)
    form = rng.choice(("color", "shape", "where", "at", "kind?", "color?", "both?"))
    if form == "color" and sum(other.kind == shape.kind for other in scene.shapes) == 1:
        return rng.choice((f"what color is the {shape.kind}?", f"what is the color of the {shape.kind}?")), shape.color
    if form == "shape" and sum(other.color == shape.color for other in scene.shapes) == 1:
        return f"what is the {shape.color} shape?", shape.kind
    if form == "where" and sum((o.kind, o.color) == (shape.kind, shape.color) for o in scene.shapes) == 1:
        return f"where is the {shape.color} {shape.kind}?", shape.position
    if form == "at":
        cell = shape.cell if rng.random() < 0.7 else rng.randrange(9)
        found = [other for other in scene.shapes if other.cell == cell]
        return f"what is {POSITIONS[cell]}?", f"a {found[0].noun}" if found else "nothing"
    kind = shape.kind if rng.random() < 0.5 else rng.choice(SHAPES)
    color = shape.color if rng.random() < 0.5 else rng.choice(list(COLORS))
    if form == "kind?":
        present = any(other.kind == kind for other in scene.shapes)
        prompt = rng.choice((f"is there a {kind}?", f"is there a {kind} in the image?"))
    elif form == "color?":
        present = any(other.color == color for other in scene.shapes)
        prompt = rng.choice((f"is there a {color} shape?", f"is there a {color} shape in the image?"))
    else:
        present = any((other.kind, other.color) == (kind, color) for other in scene.shapes)
        prompt = f"is there a {color} {kind}?"
    return prompt, "yes" if present else "no"
