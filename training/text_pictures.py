"""Printed words and numbers to read, with the captions that they determine.

Deterministic in the seed, PIL only; the font is Pillow's built-in one (Aileron, CC0).
"""

import random
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont
from PIL.ImageFont import FreeTypeFont

WORDS = tuple(
    """STOP GO EXIT OPEN CLOSED PUSH PULL SALE TAXI BUS TRAIN HOTEL BAR CAFE MENU PIZZA BREAD MILK WATER TEA
    COFFEE SUGAR SALT RICE FISH MEAT SOUP CAKE APPLE LEMON MELON GRAPE BOOK PEN PAPER DESK CHAIR TABLE LAMP DOOR
    ROAD STREET PARK BANK SHOP SCHOOL HOME HOUSE CITY TOWN NORTH SOUTH EAST WEST LEFT RIGHT UP DOWN YES NO
    HELLO BYE THANKS PLEASE LOVE PEACE HOPE TIME DAY NIGHT SUN MOON STAR SKY RAIN SNOW WIND FIRE TREE LEAF
    RED BLUE GREEN BLACK WHITE DOG CAT BIRD HORSE MOUSE ONE TWO THREE TEN FREE NEW HOT COLD FAST SLOW
    KEY BOX ZERO QUEEN KING JAZZ MUSIC VIDEO WAX QUIZ""".split()
)
MAX_LENGTH = 6
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
COLORS = {
    "red": (215, 30, 30),
    "green": (25, 140, 50),
    "blue": (30, 60, 215),
    "yellow": (250, 215, 30),
    "black": (15, 15, 15),
    "white": (250, 250, 250),
}
PAIRS = tuple(
    (ink, paper) for ink in COLORS for paper in COLORS if (ink in ("white", "yellow")) != (paper in ("white", "yellow"))
)
ASPECTS = ((1.0, 1.0), (1.0, 0.75), (1.0, 0.5), (0.75, 1.0))
FONT_UNIT = 100


@dataclass(frozen=True)
class TextPicture:
    """A word or number in one color on another; box is (center x, center y, text width) in fractions of the picture."""

    text: str
    ink: str
    paper: str
    aspect: tuple[float, float]
    box: tuple[float, float, float]
    rgb: tuple[tuple[int, int, int], tuple[int, int, int]]


def is_held_out(number: int) -> bool:
    """Numbers that training never shows, to tell reading from remembering."""
    return number >= 10 and number * 7919 % 1009 % 20 == 0


TRAIN_NUMBERS = tuple(str(n) for n in range(1000) if not is_held_out(n))
HELD_OUT_NUMBERS = tuple(str(n) for n in range(1000) if is_held_out(n))


def make_text_picture(seed: int, text: str | None = None, aspect: tuple[float, float] | None = None) -> TextPicture:
    """The text picture that belongs to a seed; `text` and `aspect` override what is drawn."""
    rng = random.Random(seed)
    drawn = rng.choice(WORDS) if rng.random() < 0.6 else rng.choice(TRAIN_NUMBERS)
    ink, paper = rng.choice(PAIRS)
    drawn_aspect = rng.choices(ASPECTS, (5, 2, 2, 1))[0]
    box = (0.5 + rng.uniform(-0.04, 0.04), 0.5 + rng.uniform(-0.12, 0.12), rng.uniform(0.65, 0.85))
    rgb = tuple(
        tuple(min(255, max(0, value + rng.randint(-10, 10))) for value in COLORS[name]) for name in (ink, paper)
    )
    return TextPicture(drawn if text is None else text, ink, paper, aspect or drawn_aspect, box, rgb)


def _layout(picture: TextPicture, long_side: int) -> tuple[tuple[int, int], tuple[float, float], FreeTypeFont]:
    """Picture size and text center in pixels, and the font; the text takes at most half the picture's height."""
    width, height = (round(side * long_side) for side in picture.aspect)
    x, y, fraction = picture.box
    left, top, right, bottom = ImageFont.load_default(FONT_UNIT).getbbox(picture.text)
    scale = min(fraction * width / (right - left), 0.5 * height / (bottom - top))
    return (width, height), (x * width, y * height), ImageFont.load_default(FONT_UNIT * scale)


def render(picture: TextPicture, long_side: int = 256) -> Image.Image:
    """Draw a text picture as RGB with the longer side `long_side`."""
    size, center, font = _layout(picture, long_side)
    image = Image.new("RGB", size, picture.rgb[1])
    ImageDraw.Draw(image).text(center, picture.text, picture.rgb[0], font, anchor="mm")
    return image


def character_boxes(picture: TextPicture, long_side: int = 256) -> list[tuple[float, float, float, float]]:
    """(left, top, right, bottom) in pixels of the rendered picture, one per character."""
    _, center, font = _layout(picture, long_side)
    _, top, _, bottom = font.getbbox(picture.text, anchor="mm")
    edges = [font.getlength(picture.text[:count]) for count in range(len(picture.text) + 1)]
    left = center[0] - edges[-1] / 2
    return [(left + a, center[1] + top, left + b, center[1] + bottom) for a, b in zip(edges, edges[1:], strict=False)]


def caption(picture: TextPicture) -> str:
    """The canonical caption, for example: The word "STOP" in white on red."""
    kind = "number" if picture.text.isdigit() else "word"
    return f'The {kind} "{picture.text}" in {picture.ink} on {picture.paper}.'


def brief_caption(picture: TextPicture) -> str:
    """The short form: the caption without the colors."""
    return caption(picture).split(" in ")[0] + "."


def ask(picture: TextPicture, rng: random.Random) -> tuple[str, str]:
    """One question about the colors of a text picture, as (prompt, answer)."""
    if rng.random() < 0.5:
        return "what color is the text?", picture.ink
    return "what color is the background?", picture.paper
