"""Question and answer pairs for each kind of picture: scenes, text pictures and easy-VQA images."""

import random

from training import prompts, scenes, text_pictures

Dialogue = list[tuple[str, str]]


def scene_dialogue(scene: scenes.Scene, rng: random.Random) -> Dialogue:
    """A full caption, then a brief caption, a count or an absence now and then, and two questions."""
    pairs = [(rng.choice(prompts.DESCRIBE), scenes.caption(scene))]
    form = rng.random()
    if form < 0.45:
        pairs.append((rng.choice(prompts.BRIEF), scenes.brief_caption(scene)))
    elif form < 0.85:
        pairs.append((rng.choice(prompts.COUNT), scenes.count_answer(scene)))
    else:
        pairs.append(_absent(rng, reads_text=False))
    return pairs + [scenes.ask(scene, rng) for _ in range(2)]


def text_dialogue(picture: text_pictures.TextPicture, rng: random.Random) -> Dialogue:
    """The text alone, its caption, and one other question."""
    pairs = [
        (rng.choice(prompts.READ), picture.text),
        (rng.choice(prompts.DESCRIBE), text_pictures.caption(picture)),
    ]
    form = rng.random()
    if form < 0.35:
        pairs.append((rng.choice(prompts.BRIEF), text_pictures.brief_caption(picture)))
    elif form < 0.8:
        pairs.append(text_pictures.ask(picture, rng))
    elif form < 0.9:
        pairs.append((rng.choice(prompts.COUNT), scenes.COUNTS[0]))
    else:
        pairs.append(_absent(rng, reads_text=True))
    return pairs


def easy_vqa_dialogue(questions: Dialogue, shape: str, color: str, rng: random.Random) -> Dialogue:
    """Up to five of the image's own questions, and now and then one of the general prompts."""
    pairs = rng.sample(questions, min(5, len(questions)))
    form = rng.random()
    if form < 0.25:
        pairs.append((rng.choice(prompts.DESCRIBE), f"One shape: a {color} {shape}."))
    elif form < 0.35:
        pairs.append((rng.choice(prompts.BRIEF), f"A {color} {shape}."))
    elif form < 0.45:
        pairs.append((rng.choice(prompts.COUNT), scenes.COUNTS[1]))
    elif form < 0.55:
        pairs.append(_absent(rng, reads_text=False))
    return pairs


def _absent(rng: random.Random, reads_text: bool) -> tuple[str, str]:
    if reads_text or rng.random() < 0.4:
        return prompts.EXPRESSION[0], prompts.NO_PERSON
    return rng.choice(prompts.READ), prompts.NO_TEXT


def grammar_corpus(count: int = 500) -> list[str]:
    """What is said around pictures, without the texts to read, to learn a vocabulary from.

    Words to read stay out so that the tokenizer spells them letter by letter.
    """
    rng = random.Random(0)
    fixed = [prompts.SYSTEM, prompts.NO_TEXT, prompts.NO_PERSON, "system", "user", "assistant"]
    fixed += [*prompts.DESCRIBE, *prompts.BRIEF, *prompts.READ, *prompts.COUNT, *prompts.EXPRESSION]
    fixed += ["does the image not contain a gray shape?", "is no teal shape present?", "is a brown rectangle present?"]
    fixed += ["what shape does the image contain?", "what color is the shape?"]
    lines = fixed * 200
    for seed in range(count):
        for pair in scene_dialogue(scenes.make_scene(seed), rng):
            lines += pair
        for placeholder in ("0", "Q"):
            picture = text_pictures.make_text_picture(seed, placeholder)
            lines += [text_pictures.caption(picture), text_pictures.brief_caption(picture)]
            lines += text_pictures.ask(picture, rng)
    return lines
