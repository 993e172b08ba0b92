"""Any resolution and any rectangle: sizes, positions, batches, what is kept, notices and refusals."""

import itertools
import warnings

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mlx_fastvlm import Conversation, Reuse, generate, load, stream_generate
from mlx_fastvlm.answer import StageClock
from mlx_fastvlm.batch_generate import BatchGenerator
from mlx_fastvlm.captions.captioning import caption_images
from mlx_fastvlm.errors import ContextError, FastVLMWarning, OptionError
from mlx_fastvlm.generate import prefill_prompt
from mlx_fastvlm.image_content import recognize
from mlx_fastvlm.image_decoding import image_size, open_image
from mlx_fastvlm.image_processing import ImageProcessor
from mlx_fastvlm.kernels import cpu
from mlx_fastvlm.kernels.choice import plain_ops
from mlx_fastvlm.options import GenerationOptions
from mlx_fastvlm.resolution import check_resolution, count_rows, native_size, resolutions
from tests.conftest import GOLDEN
from tests.tolerances import FEATURES, LOGITS, relative_error

LANDSCAPE, PORTRAIT = GOLDEN / "images" / "landscape.png", GOLDEN / "images" / "portrait.png"
CHOICES = [{"resolution": 320}, {"resolution": 320, "fit": "native"}, {"fit": "native"}, {"fit": "crop"}]

pytestmark = pytest.mark.filterwarnings("ignore::mlx_fastvlm.errors.FastVLMWarning")


@pytest.fixture(scope="module")
def demo():
    return load("demo")


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def distortion(width, height, size):
    """By how much the one side changes more than the other, minus one."""
    change = (size[1] / width) / (size[0] / height)
    return max(change, 1 / change) - 1


class TestSizes:
    @pytest.mark.parametrize(
        "picture, resolution, size",
        [
            ((1920, 1080), 1024, (576, 1024)),
            ((1080, 1920), 1024, (1024, 576)),
            ((4032, 3024), 1024, (768, 1024)),
            ((3000, 2000), 1024, (640, 960)),  # exactly its shape, where 1024 would stretch it
            ((500, 500), 1024, (1024, 1024)),
            ((100, 60), 1024, (576, 960)),  # small ones grow, as padding has them grow
            ((5000, 10), 1024, (64, 1024)),
            ((1, 1), 64, (64, 64)),
        ],
    )
    def test_native_keeps_the_shape(self, picture, resolution, size):
        assert native_size(*picture, resolution) == size

    @pytest.mark.parametrize("resolution", [256, 512, 1024, 2048])
    def test_native_is_no_larger_than_the_square_and_hardly_smaller_than_the_picture_in_it(self, resolution):
        for width, height in itertools.product(range(100, 2000, 211), repeat=2):
            size = native_size(width, height, resolution)
            assert all(side % 64 == 0 for side in size)
            assert resolution * 7 / 8 <= max(size) <= resolution
            assert native_size(size[1], size[0], resolution) == size

    @pytest.mark.parametrize(
        "resolution, shape, limit",
        [(1024, 2, 0.034), (1024, 4, 0.047), (2048, 4, 0.018), (512, 2, 0.07), (256, 2, 0.25)],
    )
    def test_no_picture_is_stretched_by_more_than_documented(self, resolution, shape, limit):
        widths = np.linspace(1000, 1000 * shape, 500).astype(int)
        assert max(distortion(width, 1000, native_size(width, 1000, resolution)) for width in widths) <= limit

    def test_what_a_model_can_be_asked_for(self):
        assert resolutions(1024) == range(256, 2049, 64)
        assert resolutions(1536) == range(256, 2049, 64)
        assert resolutions(256) == range(64, 2049, 64)
        assert resolutions(64)[0] == 64

    @pytest.mark.parametrize(
        "resolution, nearest",
        [
            (1000, "960 or 1024 is nearest"),
            (192, "256 is nearest"),
            (0, "256 is nearest"),
            (-64, "256 is nearest"),
            (4096, "2048 is nearest"),
            (2100, "2048 is nearest"),
            ("512", "multiple of 64 from 256 to 2048, in pixels"),
            (512.0, "in pixels"),
        ],
    )
    def test_odd_resolutions_are_refused_in_one_line_that_names_the_nearest(self, resolution, nearest):
        with pytest.raises(OptionError, match=nearest) as caught:
            check_resolution(resolution, resolutions(1024))
        assert "\n" not in str(caught.value) and repr(resolution) in str(caught.value)
        with pytest.raises(OptionError):
            ImageProcessor(1024).at(resolution)

    @pytest.mark.parametrize("options", [{"resolution": 1000}, {"resolution": 2112}, {"fit": "stretch"}])
    def test_wrong_options_are_known_before_a_model_is(self, options):
        with pytest.raises(OptionError):
            GenerationOptions(**options)

    def test_rows_come_from_the_size(self):
        assert count_rows((576, 1024)) == 144
        assert count_rows((64, 64)) == 1


class TestPixels:
    @pytest.mark.parametrize("picture", [(640, 360), (360, 640), (300, 300), (1000, 90)])
    def test_native_is_one_bicubic_resize(self, picture):
        processor = ImageProcessor(256).at(fit="native")
        image = noise(*picture)
        height, width = processor.size_of(*picture)
        wanted = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC), np.float32) / np.float32(255)
        np.testing.assert_array_equal(processor.to_array(image), wanted)
        assert processor.preprocess(image).shape == (1, height, width, 3)

    @pytest.mark.parametrize("fit", ["pad", "crop", "native"])
    def test_what_already_has_the_size_is_not_changed(self, fit):
        processor = ImageProcessor(256).at(320, fit)
        height, width = processor.size_of(640, 350)
        array = np.asarray(noise(width, height))
        np.testing.assert_array_equal(processor.to_array(array), array.astype(np.float32) / np.float32(255))

    def test_pad_and_crop_make_squares_of_any_resolution(self):
        for fit in ("pad", "crop"):
            wanted = ImageProcessor(320, fit=fit).to_array(noise(400, 300))
            np.testing.assert_array_equal(ImageProcessor(256).at(320, fit).to_array(noise(400, 300)), wanted)

    def test_at_none_is_the_same(self):
        processor = ImageProcessor(256, fit="crop", background="black")
        assert processor.at() == processor
        assert processor.at(512) == ImageProcessor(512, fit="crop", background="black")


class TestImageSize:
    @pytest.mark.parametrize("orientation", [None, 1, 3, 6, 8, 99])
    @pytest.mark.parametrize("format_name", ["JPEG", "PNG", "TIFF", "WEBP"])
    def test_it_is_that_of_the_upright_image(self, format_name, orientation, tmp_path):
        path = tmp_path / "picture"
        image = noise(40, 30)
        exif = Image.Exif()
        if orientation:
            exif[0x0112] = orientation
        image.save(path, format_name, exif=exif)
        assert image_size(path) == recognize(path).size == open_image(path).size

    def test_an_orientation_behind_the_pixels_counts(self, tmp_path):
        """PNG allows it, and some programs write it there."""
        path = tmp_path / "late.png"
        exif = Image.Exif()
        exif[0x0112] = 6
        noise(40, 30).save(path, exif=exif)
        data = path.read_bytes()
        start = data.index(b"eXIf") - 4
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        tail = data.index(b"IEND") - 4
        late = data[:start] + data[end:tail] + data[start:end] + data[tail:]
        assert image_size(late) == open_image(late).size == (30, 40)

    def test_arrays_and_pictures_have_theirs(self):
        array = np.zeros((30, 40, 3), np.uint8)
        assert image_size(array) == image_size(Image.fromarray(array)) == recognize(array).size == (40, 30)

    def test_pixels_are_not_decoded(self, monkeypatch):
        monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
        assert image_size(LANDSCAPE)[0] > image_size(LANDSCAPE)[1]


class TestTower:
    @pytest.mark.parametrize("size", [(64, 64), (64, 256), (192, 128), (128, 320)], ids=str)
    def test_rows_are_in_reading_order(self, size, demo):
        """What appears in one 64x64 patch changes that patch's row most."""
        height, width = size
        pixels = np.full((1, height, width, 3), 0.9, np.float32)
        before = np.array(demo[0].vision_tower(mx.array(pixels)))[0]
        assert len(before) == count_rows(size)
        for index, (row, column) in enumerate(itertools.product(range(height // 64), range(width // 64))):
            changed = pixels.copy()
            changed[0, row * 64 + 16 : row * 64 + 48, column * 64 + 16 : column * 64 + 48] = (0.8, 0.1, 0.1)
            after = np.array(demo[0].vision_tower(mx.array(changed)))[0]
            assert np.abs(after - before).sum(axis=1).argmax() == index

    @pytest.mark.parametrize("size", [(64, 128), (320, 192), (448, 64)], ids=str)
    def test_a_batch_equals_its_images_alone(self, size, tiny):
        pixels = mx.random.uniform(shape=(3, *size, 3), key=mx.random.key(1))
        together = tiny[0].encode_images(pixels)
        for index in range(3):
            alone = tiny[0].encode_images(pixels[index : index + 1])
            assert relative_error(together[index : index + 1], alone) < FEATURES["float32"]

    @pytest.mark.skipif(cpu.missing() is not None, reason="install the extra 'cpu'")
    @pytest.mark.parametrize("size", [(64, 128), (192, 320), (448, 64)], ids=str)
    def test_the_fast_path_equals_plain_ops(self, size, tiny, monkeypatch):
        cpu.loops()
        monkeypatch.setattr(cpu, "suits", lambda x, elements: cpu.kernels_allowed() and x.dtype == mx.float32)
        pixels = mx.random.uniform(shape=(2, *size, 3), key=mx.random.key(2))
        fast = tiny[0].encode_images(pixels)
        with plain_ops():
            plain = tiny[0].encode_images(pixels)
        assert relative_error(fast, plain) < FEATURES["float32"]
        assert not np.array_equal(np.array(fast), np.array(plain))  # another way was taken


def tokens(responses):
    return [response.token for response in responses]


def direct_tokens(tiny, prompt, images, count, **choice):
    """Greedy tokens by one pass after the other, from pixels that Pillow and the processor make for each image."""
    model, processor = tiny
    prepare = processor.image_processor.at(**choice)
    ids = processor.tokenize(prompt, len(images))
    features = [model.encode_images(mx.array(prepare.to_array(image)[None]))[0] for image in images]
    embeds = model.embed(ids, features)
    found = []
    for _ in range(count):
        cache = model.make_cache()
        hidden = model.language_model.hidden_states(embeds, cache)
        found.append(int(mx.argmax(model.language_model.logits(hidden[:, -1]))))
        embeds = mx.concatenate([embeds, model.language_model.embed_tokens(mx.array([found[-1:]]))], axis=1)
    return found


@pytest.mark.parametrize("choice", CHOICES, ids=str)
class TestAnswers:
    def test_every_way_to_ask_gives_the_answer_for_these_pixels(self, choice, tiny):
        wanted = direct_tokens(tiny, "What is this?", [LANDSCAPE], 6, **choice)
        options = {"max_tokens": 6, **choice}
        alone = list(stream_generate(*tiny, "What is this?", LANDSCAPE, **options))
        assert tokens(alone) == wanted[: len(alone)]
        reuse = Reuse(*tiny)
        for _ in range(2):
            assert tokens(stream_generate(*tiny, "What is this?", LANDSCAPE, reuse=reuse, **options)) == tokens(alone)
        conversation = Conversation(*tiny, image=LANDSCAPE, **options)
        assert tokens(conversation.stream("What is this?")) == tokens(alone)
        generator = BatchGenerator(*tiny)
        generator.add("What is this?", LANDSCAPE, options=GenerationOptions(**options))
        batch = []
        while generator.waiting or generator.decoding:
            batch += [response.token for _, response in generator.step()]
        assert batch == tokens(alone)
        (caption,) = caption_images(*tiny, [LANDSCAPE], "What is this?", **options)
        assert caption.text == "".join(response.text for response in alone)
        assert caption.prompt_tokens == alone[-1].prompt_tokens

    def test_positions_are_counted_by_the_pixels(self, choice, tiny):
        model, processor = tiny
        ids = processor.tokenize("What is this?", 2)
        images = [LANDSCAPE, PORTRAIT]
        prepare = processor.image_processor.at(**choice)
        rows = [prepare.to_array(image)[::64, ::64].shape[:2] for image in images]
        expected = len(ids) - 2 + sum(height * width for height, width in rows)
        options = GenerationOptions(max_tokens=4, **choice)
        fresh = prefill_prompt(*tiny, ids, images, options, StageClock())
        assert fresh.prompt_tokens == fresh.cache[0].offset == expected
        reuse = Reuse(*tiny)
        with reuse.prefilled(ids, images, options, StageClock()) as reused:
            assert reused.prompt_tokens == reused.cache[0].offset == expected
        assert relative_error(reused.logits, fresh.logits) < LOGITS["float32"]
        # and from the middle of the second image on
        longer = processor.tokenize("And what is that?", 2)
        with reuse.prefilled(longer, images, options, StageClock()) as reused:
            assert reused.cached_tokens > expected - len(ids)
            again = prefill_prompt(*tiny, longer, images, options, StageClock())
            assert relative_error(reused.logits, again.logits) < LOGITS["float32"]

    def test_the_context_counts_what_the_image_takes(self, choice, tiny):
        model, processor = tiny
        limit = model.config.text_config.max_position_embeddings
        ids = processor.tokenize("What is this?", 1)
        fresh = prefill_prompt(*tiny, ids, [LANDSCAPE], GenerationOptions(max_tokens=4, **choice), StageClock())
        most = limit - fresh.prompt_tokens
        prefill_prompt(*tiny, ids, [LANDSCAPE], GenerationOptions(max_tokens=most, **choice), StageClock())
        too_long = GenerationOptions(max_tokens=most + 1, **choice)
        with pytest.raises(ContextError, match=f"takes {fresh.prompt_tokens} tokens"):
            prefill_prompt(*tiny, ids, [LANDSCAPE], too_long, StageClock())
        with pytest.raises(ContextError, match=f"takes {fresh.prompt_tokens} tokens"):
            Reuse(*tiny).prefill(ids, [LANDSCAPE], too_long)
        conversation = Conversation(*tiny, image=LANDSCAPE, **choice)
        conversation.ask("What is this?", max_tokens=1)
        words = len(processor.tokenize([{"role": "user", "content": "<image>\nWhat is this?"}], 1))
        assert conversation.context_tokens > words - 1 + count_rows(
            processor.image_processor.at(**choice).size_of(*image_size(LANDSCAPE))
        )


def test_images_of_several_sizes_are_answered_in_one_batch(tiny):
    """Those of one size are encoded together, and each gets its own rows."""
    images = [LANDSCAPE, PORTRAIT, noise(200, 100), noise(100, 200), noise(90, 90), LANDSCAPE]
    alone = [generate(*tiny, "What is this?", image, max_tokens=6, fit="native") for image in images]
    assert len(set(alone)) > 2
    captions = list(caption_images(*tiny, images, "What is this?", max_tokens=6, fit="native"))
    assert [caption.text for caption in captions] == alone


def test_one_batch_may_mix_resolutions(tiny):
    generator = BatchGenerator(*tiny)
    choices = [{"resolution": 128}, {"resolution": 320, "fit": "native"}, {}]
    texts = {}
    for choice in choices:
        ticket = generator.add("Hi", LANDSCAPE, options=GenerationOptions(max_tokens=6, **choice))
        texts[ticket] = ""
    while generator.waiting or generator.decoding:
        for ticket, response in generator.step():
            texts[ticket] += response.text
    assert list(texts.values()) == [generate(*tiny, "Hi", LANDSCAPE, max_tokens=6, **choice) for choice in choices]


def test_rows_kept_at_one_resolution_are_not_taken_for_another(tiny, tmp_path):
    reuse = Reuse(*tiny, folder=tmp_path)
    for choice in [{}, *CHOICES]:
        first = list(stream_generate(*tiny, "What is this?", LANDSCAPE, reuse=reuse, max_tokens=6, **choice))[-1]
        assert "encode" in first.timings
        again = list(stream_generate(*tiny, "What is this?", LANDSCAPE, reuse=reuse, max_tokens=6, **choice))[-1]
        assert "encode" not in again.timings and again.prompt_tokens == first.prompt_tokens
    later = Reuse(*tiny, folder=tmp_path)
    last = list(stream_generate(*tiny, "And this?", LANDSCAPE, reuse=later, max_tokens=6, fit="native"))[-1]
    assert "encode" not in last.timings


class TestNotices:
    def said(self, tiny, count=2, **options):
        model, processor = tiny
        fresh = type(processor)(processor.tokenizer, processor.image_processor, processor.eos_token_ids)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(count):
                generate(model, fresh, "Hi", LANDSCAPE, max_tokens=1, **options)
                generate(model, fresh, "Hi", PORTRAIT, max_tokens=1, **options)
        assert all(issubclass(each.category, FastVLMWarning) for each in caught)
        return [str(each.message) for each in caught]

    def test_another_resolution_is_noticed_once(self, tiny):
        (notice,) = self.said(tiny, resolution=320)
        assert "256x256" in notice and "320" in notice

    def test_rectangles_are_noticed_once(self, tiny):
        (notice,) = self.said(tiny, fit="native")
        assert "square" in notice

    @pytest.mark.parametrize("options", [{}, {"resolution": 256}, {"fit": "pad"}, {"resolution": 256, "fit": "pad"}])
    def test_what_the_model_was_trained_on_is_not(self, options, tiny):
        assert self.said(tiny, **options) == []
