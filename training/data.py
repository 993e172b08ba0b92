"""Training samples: a preprocessed picture, its dialogue, and dense labels for the tower."""

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from PIL import Image

from training import dialogues, easy_vqa_data, scenes, text_pictures
from training.config import VISION_CONFIG
from training.preprocessing import to_square_array

IGNORE = -100
IMAGE_SIZE = VISION_CONFIG["image_size"]
KINDS = ("scene", "text", "easy_vqa")
FIRST_VALIDATION_IMAGE = 3800
# Seeds of generated pictures: training counts up from 0, the others are disjoint from it and from each other.
VALIDATION_SEEDS, TEST_SEEDS, EXAMPLE_SEEDS = 1_000_000_000, 2_000_000_000, 3_000_000_000
# What a cell of the stride-16 map may show: nothing, a character or a shape.
REGIONS = ("", *text_pictures.ALPHABET, *scenes.SHAPES)
REGION_STRIDE = 16
# Name → (answers per picture, classes) of the dense labels.
DENSE_LABELS = {
    "region": ((IMAGE_SIZE // REGION_STRIDE) ** 2, len(REGIONS)),
    "cell_kind": (9, len(scenes.SHAPES) + 1),
    "cell_color": (9, len(scenes.COLORS)),
    "cell_size": (9, len(scenes.SIZES)),
    "character": (text_pictures.MAX_LENGTH, len(text_pictures.ALPHABET) + 1),
    "ink": (1, len(text_pictures.COLORS)),
    "paper": (1, len(text_pictures.COLORS)),
    "easy_shape": (1, len(easy_vqa_data.SHAPES)),
    "easy_color": (1, len(easy_vqa_data.COLORS)),
}


@dataclass(frozen=True)
class View:
    """How pictures are shown.

    Attributes:
        resolution: of the longer side.
        aspect: (width, height) of all generated pictures, the longer 1; None leaves it to their seeds.
        padded: to a square; else the tower sees the rectangle, and the aspect must be given.
    """

    resolution: int = IMAGE_SIZE
    aspect: tuple[float, float] | None = None
    padded: bool = True

    @property
    def has_labels(self) -> bool:
        """Whether the dense labels, which are of a grid, belong to it."""
        return self.resolution == IMAGE_SIZE and self.padded

    def pixels(self, image: Image.Image) -> np.ndarray:
        """uint8 (H, W, 3)."""
        return to_square_array(image, self.resolution) if self.padded else np.asarray(image)


AS_DRAWN = View()


@dataclass
class Sample:
    """pixels: uint8 (H, W, 3); caption says all that may be asked; ask draws (prompt, answer) pairs; labels by name."""

    pixels: np.ndarray
    caption: str
    ask: Callable[[random.Random], dialogues.Dialogue]
    dialogue: dialogues.Dialogue
    labels: dict[str, list[int]]


def _index(names, name) -> int:
    return list(names).index(name)


def _regions(image: Image.Image, boxes: list[tuple[float, float, float, float]], names: Iterable[str]) -> list[int]:
    """Classes of the stride-16 map, row-major: the box that holds a cell's center, in the padded picture."""
    classes = np.zeros((IMAGE_SIZE // REGION_STRIDE,) * 2, dtype=np.int64)
    shift = [(IMAGE_SIZE - side) // 2 for side in image.size] * 2
    for box, name in zip(boxes, names, strict=True):
        cells = [round((edge + offset) / REGION_STRIDE) for edge, offset in zip(box, shift, strict=True)]
        left, top, right, bottom = (max(0, cell) for cell in cells)
        classes[top:bottom, left:right] = REGIONS.index(name)
    return classes.flatten().tolist()


def scene_sample(scene: scenes.Scene, rng: random.Random, view: View) -> Sample:
    kind, color, size = [0] * 9, [IGNORE] * 9, [IGNORE] * 9
    for shape in scene.shapes:
        kind[shape.cell] = 1 + _index(scenes.SHAPES, shape.kind)
        color[shape.cell] = _index(scenes.COLORS, shape.color)
        size[shape.cell] = _index(scenes.SIZES, shape.size)
    image = scenes.render(scene, IMAGE_SIZE)
    corners = [(x - s.radius, y - s.radius, x + s.radius, y + s.radius) for s in scene.shapes for x, y in (s.center,)]
    boxes = [tuple(edge * IMAGE_SIZE for edge in corner) for corner in corners]
    regions = _regions(image, boxes, [shape.kind for shape in scene.shapes])
    labels = {"region": regions, "cell_kind": kind, "cell_color": color, "cell_size": size}
    ask = partial(dialogues.scene_dialogue, scene)
    return Sample(view.pixels(image), scenes.caption(scene), ask, ask(rng), labels)


def text_sample(picture: text_pictures.TextPicture, rng: random.Random, view: View) -> Sample:
    blank = len(text_pictures.ALPHABET)
    characters = [text_pictures.ALPHABET.index(c) for c in picture.text]
    image = text_pictures.render(picture, IMAGE_SIZE)
    labels = {
        "region": _regions(image, text_pictures.character_boxes(picture, IMAGE_SIZE), picture.text),
        "character": characters + [blank] * (text_pictures.MAX_LENGTH - len(characters)),
        "ink": [_index(text_pictures.COLORS, picture.ink)],
        "paper": [_index(text_pictures.COLORS, picture.paper)],
    }
    ask = partial(dialogues.text_dialogue, picture)
    return Sample(view.pixels(image), text_pictures.caption(picture), ask, ask(rng), labels)


class TrainingData:
    """Endless: each sample is a fresh scene, a fresh text picture or an easy-VQA training image.

    easy-VQA images are turned and mirrored at random, which changes none of their answers. Images from
    `FIRST_VALIDATION_IMAGE` on are left for validation.
    """

    def __init__(self):
        self.images = easy_vqa_data.load_images("train")
        self.questions = easy_vqa_data.load_questions("train")
        self.labels = {i: easy_vqa_data.labels(asked) for i, asked in self.questions.items()}
        self.ids = [i for i, found in self.labels.items() if i < FIRST_VALIDATION_IMAGE and all(found)]

    def sample(self, index: int, mixture: tuple[float, ...], view: View = AS_DRAWN) -> Sample:
        """Sample number `index`; mixture is the share of each of KINDS. With a view's aspect none is of easy-VQA."""
        rng = random.Random(index)
        kind = rng.choices(KINDS, mixture)[0]
        if kind == "text":
            return text_sample(text_pictures.make_text_picture(index, aspect=view.aspect), rng, view)
        if kind == "scene" or view.aspect:
            return scene_sample(scenes.make_scene(index, view.aspect), rng, view)
        image_id = rng.choice(self.ids)
        shape, color = self.labels[image_id]
        turned = view.pixels(self.images[image_id].transpose(rng.choice(list(Image.Transpose))))
        ask = partial(dialogues.easy_vqa_dialogue, self.questions[image_id], shape, color)
        labels = {
            "easy_shape": [_index(easy_vqa_data.SHAPES, shape)],
            "easy_color": [_index(easy_vqa_data.COLORS, color)],
        }
        return Sample(turned, f"One shape: a {color} {shape}.", ask, ask(rng), labels)


def collate(samples: list[Sample]) -> tuple[torch.Tensor, dict[str, torch.Tensor], list[dialogues.Dialogue]]:
    """uint8 pixels (B, 3, H, W) in channels-last memory, labels (B, answers) filled with IGNORE, dialogues."""
    pixels = torch.from_numpy(np.stack([sample.pixels for sample in samples])).permute(0, 3, 1, 2)
    labels = {}
    for name, (answers, _) in DENSE_LABELS.items():
        unknown = [IGNORE] * answers
        labels[name] = torch.tensor([sample.labels.get(name, unknown) for sample in samples])
    return pixels, labels, [sample.dialogue for sample in samples]


def to_pixel_values(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 → float32 in [0, 1], keeping the memory layout."""
    return pixels.float().div_(255)
