"""The easy-VQA data set (PyPI `easy-vqa`, MIT license): images, official questions, shape and color labels."""

from collections import defaultdict

from PIL import Image

SHAPES = ("circle", "rectangle", "triangle")
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")


def load_questions(split: str) -> dict[int, list[tuple[str, str]]]:
    """Image id → its official (question, answer) pairs; split is "train" or "test"."""
    import easy_vqa  # 22 MB of pictures: only who asks for them needs the package

    texts, answers, ids = getattr(easy_vqa, f"get_{split}_questions")()
    questions = defaultdict(list)
    for text, answer, image_id in zip(texts, answers, ids, strict=True):
        questions[image_id].append((text, answer))
    return dict(questions)


def load_images(split: str) -> dict[int, Image.Image]:
    """Image id → the picture, RGB, 64×64 as shipped."""
    import easy_vqa

    paths = getattr(easy_vqa, f"get_{split}_image_paths")()
    return {image_id: Image.open(path).convert("RGB") for image_id, path in paths.items()}


def labels(questions: list[tuple[str, str]]) -> tuple[str | None, str | None]:
    """The (shape, color) of the one shape in an image, read off its own questions; None where none tells."""
    answers = {answer for _, answer in questions}
    affirmed = " ".join(q for q, a in questions if (a == "no") == (" no " in q or " not " in q))
    affirmed_words = set(affirmed.replace("?", "").split())
    shape = next((s for s in SHAPES if s in answers or s in affirmed_words), None)
    color = next((c for c in COLORS if c in answers or c in affirmed_words), None)
    return shape, color
