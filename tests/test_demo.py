"""The embedded demo model: small, of known origin, and right about what it was trained on."""

import json
from pathlib import Path

import pytest

from mlx_fastvlm import generate, load
from mlx_fastvlm.loading import resolve_model
from training import prompts, scenes, text_pictures
from training.evaluate_embedded import TEST_SEEDS

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def demo():
    return load("demo")


def test_it_fits_in_the_package():
    assert sum(path.stat().st_size for path in resolve_model("demo").iterdir()) <= 8_000_000


def test_its_origin_is_recorded_without_anybodys_paths():
    record = json.loads((resolve_model("demo") / "conversion.json").read_text())
    assert record["license"] == "mit"
    assert record["folded"]["multi_branch_blocks"] > 0  # it went through the converter in training form
    assert record["self_check"]["max_relative_error"] < 1e-4
    assert not Path(record["source"]).is_absolute()


def test_it_describes_unseen_square_scenes(demo):
    drawn = [scenes.make_scene(TEST_SEEDS + 10_000 + i) for i in range(80)]
    drawn = [scene for scene in drawn if scene.aspect == (1.0, 1.0)][:40]
    right = sum(
        generate(*demo, prompts.DESCRIBE[0], image=scenes.render(scene)) == scenes.caption(scene) for scene in drawn
    )
    assert right >= 37, f"{right} of {len(drawn)}"  # 98% of 1,000: three standard errors below


def test_it_reads_unseen_pictures_of_text(demo):
    drawn = [text_pictures.make_text_picture(TEST_SEEDS + 10_000 + i) for i in range(40)]
    right = sum(
        generate(*demo, prompts.READ[1], image=text_pictures.render(picture)) == picture.text for picture in drawn
    )
    assert right >= 35, f"{right} of {len(drawn)}"  # 97% of 1,000


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.png")))
def test_the_answers_in_examples_are_what_it_says(name, demo):
    answers = json.loads((EXAMPLES / "answers.json").read_text(encoding="utf-8"))
    for prompt, answer in answers[name].items():
        assert generate(*demo, prompt, image=EXAMPLES / name) == answer


def test_a_picture_without_text_or_people_is_said_to_be_so(demo):
    picture = scenes.render(scenes.make_scene(TEST_SEEDS + 20_000))
    assert generate(*demo, prompts.READ[1], image=picture) == prompts.NO_TEXT
    assert generate(*demo, prompts.EXPRESSION[0], image=picture) == prompts.NO_PERSON
