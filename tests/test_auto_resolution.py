"""Resolution by content: the measure of detail, thresholds and their file, every way to ask, and the calibration."""

import json
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from mlx_fastvlm import Conversation, Reuse, generate, load, stream_generate
from mlx_fastvlm.auto_resolution import AutoResolution, candidates, measure_detail
from mlx_fastvlm.batch_generate import BatchGenerator
from mlx_fastvlm.captions.captioning import caption_images
from mlx_fastvlm.errors import FastVLMWarning, OptionError
from mlx_fastvlm.image_decoding import open_image
from mlx_fastvlm.options import GenerationOptions
from mlx_fastvlm.processor import Processor
from mlx_fastvlm.resolution_calibration import calibrate_resolution, find_thresholds
from tests.conftest import GOLDEN
from tests.demo_pictures import draw

LANDSCAPE = GOLDEN / "images" / "landscape.png"


def text_page(size=(400, 300)):
    page = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(page)
    for line in range(0, size[1], 14):
        pen.text((4, line), "the quick brown fox jumps over the lazy dog " * 3, "black")
    return page


def gradient(size=(400, 300)):
    ramp = np.linspace(0, 255, size[0], dtype=np.uint8)
    return Image.fromarray(np.broadcast_to(ramp[None, :, None], (size[1], size[0], 3)).copy())


class TestDetail:
    def test_flat_pictures_have_none(self):
        assert measure_detail(Image.new("RGB", (50, 80), "red"), 256) == 0
        noisy = np.random.default_rng(0).integers(127, 129, (80, 80, 3), dtype=np.uint8)
        assert measure_detail(Image.fromarray(noisy), 256) == 0  # hardly visible

    def test_it_rises_from_gradients_over_shapes_to_text(self, tmp_path):
        draw(tmp_path / "shape.png", 1)
        shape = Image.open(tmp_path / "shape.png").resize((400, 400))
        levels = [measure_detail(picture, 256) for picture in (gradient(), shape, text_page())]
        assert levels[0] < 1e-4 < levels[1] < levels[2] / 5
        assert 0.05 < levels[2] < 1

    def test_blurring_takes_it_away(self):
        page = text_page()
        assert measure_detail(page.filter(ImageFilter.GaussianBlur(8)), 256) < measure_detail(page, 256) / 10

    def test_it_is_about_what_the_tower_sees_not_about_the_file(self):
        """Enlarging a picture adds no detail, and a model that sees more pixels needs finer detail to need them."""
        page = text_page()
        assert measure_detail(page.resize((1600, 1200)), 256) == pytest.approx(measure_detail(page, 256), rel=0.2)
        assert measure_detail(page, 2048) < measure_detail(page, 256) / 3

    def test_colors_of_equal_lightness_count(self):
        columns = np.arange(256) // 2 % 2
        stripes = np.where(columns[None, :, None], [180, 0, 0], [0, 92, 0]).astype(np.uint8)
        assert measure_detail(Image.fromarray(np.repeat(stripes, 256, axis=0)), 256) > 0.2

    @pytest.mark.parametrize("size", [(1, 1), (1, 300), (500, 3)])
    def test_any_size_can_be_measured(self, size):
        assert 0 <= measure_detail(Image.effect_noise(size, 80).convert("RGB"), 1024) <= 1.5


class TestThresholds:
    def test_the_smallest_resolution_that_suffices_is_chosen(self):
        auto = AutoResolution(256, ((64, 0.001), (192, 0.01)))
        assert [auto.choose_for(detail) for detail in (0, 0.001, 0.0011, 0.01, 0.5)] == [64, 64, 192, 192, 256]
        assert auto.choose(gradient()) == 64 and auto.choose(text_page()) == 256

    def test_candidates(self):
        assert candidates(1024) == [256, 512, 768]
        assert candidates(256) == [64, 128, 192]
        assert candidates(128) == [64]
        assert candidates(64) == []

    def test_file_round_trip(self, tmp_path):
        auto = AutoResolution(1024, ((256, 0.0), (512, 0.25)))
        path = tmp_path / "auto.json"
        path.write_text(json.dumps({**auto.to_dict(), "calibration": {"images": 3}}))
        assert AutoResolution.from_file(path) == auto

    @pytest.mark.parametrize(
        "content, told",
        [
            ("{", "cannot be read as JSON"),
            ("{}", "holds no thresholds"),
            ('{"trained": 1024, "steps": [{"resolution": 500, "max_detail": 1}]}', "448 or 512"),
            ('{"trained": 1024, "steps": [{"resolution": 1024, "max_detail": 1}]}', "must rise up to the trained one"),
            ('{"trained": 1024, "steps": [{"resolution": 512, "max_detail": -1}]}', "0 or more"),
            ('{"trained": 1024, "steps": [{"resolution": 512, "max_detail": "much"}]}', "holds no thresholds"),
            ('{"trained": 1024, "steps": 5}', "holds no thresholds"),
        ],
    )
    def test_files_that_hold_none_are_refused_in_one_line(self, content, told, tmp_path):
        path = tmp_path / "auto.json"
        path.write_text(content)
        with pytest.raises(OptionError, match=told) as caught:
            AutoResolution.from_file(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)

    def test_a_missing_file_tells_how_to_make_one(self, tmp_path):
        with pytest.raises(OptionError, match="There is no file .*calibrate-resolution"):
            AutoResolution.from_file(tmp_path / "none.json")


AUTO = AutoResolution(256, ((64, 0.0001), (128, 1e9)))  # 64 for gradients, 128 for all others


@pytest.fixture
def pictures(tmp_path):
    gradient().save(tmp_path / "gradient.png")
    text_page().save(tmp_path / "text.png")
    return [tmp_path / "gradient.png", tmp_path / "text.png", LANDSCAPE]


@pytest.mark.filterwarnings("ignore::mlx_fastvlm.errors.FastVLMWarning")
class TestAnswers:
    @pytest.mark.parametrize("fit", [None, "native"])
    def test_every_way_to_ask_shows_each_picture_at_its_own_resolution(self, fit, tiny, pictures):
        model, processor = tiny
        prompt, options = "What is this?", {"max_tokens": 6, "fit": fit}
        reuse = Reuse(*tiny)
        wanted = {}
        for picture, side in zip(pictures, (64, 128, 128), strict=True):
            wanted[picture] = list(stream_generate(*tiny, prompt, picture, resolution=side, **options))
        for picture, responses in wanted.items():
            for _ in range(2):
                for kept in (None, reuse):
                    found = list(stream_generate(*tiny, prompt, picture, resolution=AUTO, reuse=kept, **options))
                    assert [each.token for each in found] == [each.token for each in responses]
                    assert found[-1].prompt_tokens == responses[-1].prompt_tokens
            conversation = Conversation(*tiny, image=picture, resolution=AUTO, **options)
            known = conversation.context_tokens
            assert conversation.ask(prompt) == "".join(each.text for each in responses)
            fixed = Conversation(*tiny, image=picture, resolution=64 if picture == pictures[0] else 128, **options)
            assert known == fixed.context_tokens
        captions = list(caption_images(*tiny, pictures, prompt, resolution=AUTO, **options))
        assert [each.text for each in captions] == ["".join(r.text for r in responses) for responses in wanted.values()]
        generator = BatchGenerator(*tiny)
        tickets = [
            generator.add(prompt, picture, options=GenerationOptions(resolution=AUTO, **options))
            for picture in pictures
        ]
        texts = dict.fromkeys(tickets, "")
        while generator.waiting or generator.decoding:
            for ticket, response in generator.step():
                texts[ticket] += response.text
        assert list(texts.values()) == [each.text for each in captions]

    def test_a_picture_is_looked_at_once(self, tiny, pictures, monkeypatch):
        reuse = Reuse(*tiny)
        generate(*tiny, "What is this?", pictures[1], resolution=AUTO, reuse=reuse, max_tokens=2)
        monkeypatch.setattr(AutoResolution, "choose", lambda *args: pytest.fail("measured again"))
        generate(*tiny, "And this?", pictures[1], resolution=AUTO, reuse=reuse, max_tokens=2)

    def test_rows_are_shared_with_the_resolution_that_was_chosen(self, tiny, pictures):
        reuse = Reuse(*tiny)
        generate(*tiny, "What is this?", pictures[1], resolution=128, reuse=reuse, max_tokens=2)
        *_, last = stream_generate(*tiny, "What is this?", pictures[1], resolution=AUTO, reuse=reuse, max_tokens=2)
        assert "encode" not in last.timings

    def test_auto_takes_the_models_own_thresholds(self, tiny, pictures):
        model, processor = tiny
        own = type(processor)(processor.tokenizer, processor.image_processor, processor.eos_token_ids, AUTO)
        found = generate(model, own, "What is this?", pictures[1], resolution="auto", max_tokens=6)
        assert found == generate(*tiny, "What is this?", pictures[1], resolution=128, max_tokens=6)
        assert own.images_at("auto", None).auto == AUTO

    def test_thresholds_of_another_model_are_refused(self, tiny, pictures):
        with pytest.raises(OptionError, match="trained on 1024 pixels, this one was on 256"):
            generate(*tiny, "Hi", pictures[0], resolution=replace(AUTO, trained=1024))

    def test_a_step_that_the_model_has_not_is_refused(self, tiny, pictures):
        model, processor = tiny
        larger = Processor(processor.tokenizer, processor.image_processor.at(1024), processor.eos_token_ids)
        with pytest.raises(OptionError, match="from 256 to 2048: 256 is nearest"):
            generate(model, larger, "Hi", pictures[0], resolution=AutoResolution(1024, ((128, 0.1),)))


def test_thresholds_lie_in_the_models_folder(converted_folder, tmp_path):
    import shutil

    folder = Path(shutil.copytree(converted_folder("inference"), tmp_path / "model"))
    assert load(folder)[1].auto_resolution is None
    (folder / "auto_resolution.json").write_text(json.dumps(AUTO.to_dict()))
    assert load(folder)[1].auto_resolution == AUTO


def test_guessed_thresholds_are_noticed_once_and_found_ones_are_not(tiny):
    model, processor = tiny
    fresh = type(processor)(processor.tokenizer, processor.image_processor, processor.eos_token_ids)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            generate(model, fresh, "Hi", LANDSCAPE, max_tokens=1, resolution="auto")
        generate(model, fresh, "Hi", LANDSCAPE, max_tokens=1, resolution=AUTO)
    assert [each.category for each in caught] == [FastVLMWarning]
    assert "guessed" in str(caught[0].message) and "calibrate-resolution" in str(caught[0].message)


class TestFindThresholds:
    def test_the_cheapest_that_keeps_enough_answers(self):
        """Answers stay at 64 below a detail of 0.3, at 128 below 0.7: nothing is gained or lost by any other cut."""
        detail = np.linspace(0.01, 1, 100)
        same = {64: (detail < 0.3) * 1.0, 128: (detail < 0.7) * 1.0, 256: np.ones(100)}
        found = find_thresholds(256, list(detail), same, 1.0)
        steps = dict(found.auto.steps)
        assert 0.24 < steps[64] < 0.3 and 0.64 < steps[128] < 0.7
        assert found.agreement == 1 and found.fixed == {64: 0.29, 128: 0.69, 256: 1.0}
        chosen = [found.auto.choose_for(each) for each in detail]
        assert found.area == pytest.approx(np.mean(np.square(chosen)) / 256**2)
        assert all(same[side][i] for i, side in enumerate(chosen))

    def test_fewer_answers_may_be_kept_for_less_work(self):
        rng = np.random.default_rng(0)
        detail = rng.random(200)
        same = {64: (rng.random(200) > detail) * 1.0, 256: np.ones(200)}
        areas = []
        for agreement in (1.0, 0.98, 0.9, 0.5):
            found = find_thresholds(256, list(detail), same, agreement)
            assert found.agreement >= agreement
            areas.append(found.area)
        assert areas == sorted(areas, reverse=True) and areas[-1] < 0.6

    def test_images_of_equal_detail_are_not_told_apart(self):
        detail = [0.0] * 20 + [0.1] * 20
        same = {64: np.repeat([1.0, 0.0], [10, 30]), 256: np.ones(40)}
        assert find_thresholds(256, detail, same, 0.995).auto.steps == ()
        found = find_thresholds(256, detail, same, 0.75)
        assert found.auto.steps == ((64, 0.0),) and found.agreement == 0.75

    def test_where_detail_tells_nothing_the_full_resolution_stays(self):
        detail = np.linspace(0, 1, 100)
        same = {64: np.tile([1.0, 0.0], 50), 256: np.ones(100)}
        found = find_thresholds(256, list(detail), same, 0.995)
        assert found.auto.steps == () and found.area == 1 and found.auto.choose_for(0) == 256


@pytest.fixture
def folder(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(20):
        draw(photos / f"{number}.png", number)
    return photos


@pytest.fixture
def run(command_line):
    return command_line


@pytest.mark.filterwarnings("ignore::mlx_fastvlm.errors.FastVLMWarning")
def test_calibration_compares_the_models_own_answers(folder):
    model, processor = load("demo")
    images = sorted(folder.iterdir())
    prompts = ["what shape is in the image?", "what color is the shape?"]
    told = []
    found = calibrate_resolution(
        model, processor, images, prompts, agreement=0.9, on_answer=lambda done, total: told.append((done, total))
    )
    for side in (64,):
        answers = [
            [generate(model, processor, prompt, image, resolution=each, max_tokens=32) for each in (side, 256)]
            for prompt in prompts
            for image in images
        ]
        assert found.fixed[side] == pytest.approx(np.mean([low == full for low, full in answers]))
    assert found.fixed[256] == 1 and found.agreement >= 0.9 and found.images == 20
    assert told[-1] == (160, 160) and len(told) == 160
    again = find_thresholds(
        256, [measure_detail(open_image(image), 256) for image in images], {256: np.ones(20)}, agreement=0.9
    )
    assert again.auto.steps == ()


@pytest.mark.filterwarnings("ignore::mlx_fastvlm.errors.FastVLMWarning")
@pytest.mark.parametrize(
    "change, told",
    [
        ({"images": 19}, "19 images are given"),
        ({"prompts": ()}, "a prompt"),
        ({"agreement": 0}, "agreement"),
        ({"agreement": 1.5}, "agreement"),
    ],
)
def test_what_cannot_be_calibrated_is_refused_before_any_work(change, told, folder, tiny):
    images = sorted(folder.iterdir())[: change.pop("images", 20)]
    with pytest.raises(OptionError, match=told):
        calibrate_resolution(*tiny, images, **change)


def test_the_command_writes_what_auto_then_uses(run, folder, tmp_path):
    out = tmp_path / "auto.json"
    asked = ("--model", "demo", "--prompt", "what color is the shape?")
    code, text, err = run("calibrate-resolution", folder, *asked, "--agreement", 0.5, "--out", out)
    assert (code, err) == (0, "") and "Saved" in text and "100.0% of the answers stay the same" in text
    found = AutoResolution.from_file(out)
    assert found.trained == 256 and found.steps
    assert json.loads(out.read_text())["calibration"]["images"] == 20
    picture = folder / "1.png"
    arguments = ("describe", picture, "what color is the shape?", "-m", "demo", "--json")
    record = json.loads(run(*arguments, "--resolution", f"auto:{out}")[1])
    side = found.choose(open_image(picture))
    assert (
        side < 256 and record["prompt_tokens"] == json.loads(run(*arguments, "--resolution", side)[1])["prompt_tokens"]
    )


def test_what_cannot_be_written_is_refused_before_any_work(run, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("mlx_fastvlm.cli.calibrate_resolution.load_model", None)
    code, out, err = run("calibrate-resolution", folder, "--out", tmp_path / "gone" / "auto.json")
    assert (code, out) == (1, "") and "gone is not a folder; make it first." in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["calibrate-resolution", "missing"], "missing"),
        (["calibrate-resolution", str(LANDSCAPE), "--model", "demo"], "1 pictures were found; 20 are needed"),
        (["describe", str(LANDSCAPE), "--resolution", "auto:none.json"], "There is no file none.json"),
        (["describe", str(LANDSCAPE), "--resolution", "automatic"], "expected a number such as 512, auto"),
    ],
)
def test_mistakes_are_one_line(arguments, told, run):
    code, out, err = run(*arguments)
    assert (code, out) == (1, "") and told in err and err.count("\n") == 1
