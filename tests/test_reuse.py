"""Reuse is exact: what was computed for earlier answers changes later ones by no more than rounding, and is not redone."""

import dataclasses
import io
import itertools
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mlx_fastvlm import Reuse, generate, load, stream_generate
from mlx_fastvlm.answer import StageClock
from mlx_fastvlm.errors import FastVLMWarning, ImageError, OptionError
from mlx_fastvlm.feature_cache import FeatureCache
from mlx_fastvlm.generate import prefill_prompt
from mlx_fastvlm.image_content import recognize
from mlx_fastvlm.image_processing import ImageProcessor
from mlx_fastvlm.options import GenerationOptions
from mlx_fastvlm.prefix_cache import PrefixCache
from tests.conftest import GOLDEN
from tests.tolerances import LOGITS, relative_error

PICTURE = GOLDEN / "images" / "landscape.png"
OTHER = GOLDEN / "images" / "portrait.png"
OPTIONS = GenerationOptions(max_tokens=12)


def answer(tiny, prompt, images=(PICTURE,), **options):
    return list(stream_generate(*tiny, prompt, list(images), **({"max_tokens": 12} | options)))


def tokens(responses):
    return [response.token for response in responses]


def logits_both_ways(tiny, reuse, prompt, images, options=OPTIONS, answered=()):
    """Logits after a prompt and tokens of its answer, from scratch and with `reuse`, and how much of it was known."""
    ids = [*tiny[1].tokenize(prompt, len(images)), *answered]
    fresh = prefill_prompt(*tiny, ids, images, options, StageClock())
    with reuse.prefilled(ids, images, options, StageClock()) as reused:
        assert reused.prompt_tokens == fresh.prompt_tokens == fresh.cache[0].offset == reused.cache[0].offset
        return fresh.logits, reused.logits, reused.cached_tokens


def rows_per_image(tiny):
    return tiny[0].config.vision_config.num_image_tokens


def test_a_second_question_runs_only_its_own_tokens(tiny):
    reuse = Reuse(*tiny)
    answer(tiny, "What is this?", reuse=reuse)
    second = answer(tiny, "How many are there?", reuse=reuse)[-1]
    ids = tiny[1].tokenize("How many are there?", 1)
    assert second.cached_tokens > ids.index(-200) + rows_per_image(tiny)
    assert "encode" not in second.timings and "project" not in second.timings
    assert second.prompt_tokens == answer(tiny, "How many are there?")[-1].prompt_tokens
    assert tokens(answer(tiny, "How many are there?", reuse=reuse)) == tokens(answer(tiny, "How many are there?"))


@pytest.mark.parametrize(
    "before, prompt, images",
    [
        ([("What is this?", [PICTURE])], "How many are there?", [PICTURE]),
        ([("What is this?", [PICTURE])], "What is this?", [PICTURE]),
        ([("What is this?", [PICTURE])], "What is this?", [OTHER]),
        ([("What is this?", [PICTURE])], "Hello", []),
        ([("What is this?", [PICTURE, OTHER])], "What is this?", [PICTURE]),
        ([("What is this?", [PICTURE])], "What is this?", [PICTURE, OTHER]),
        ([("What is this?", [PICTURE, OTHER])], "And this?", [OTHER, PICTURE]),
        ([("What is this?", [PICTURE, PICTURE])], "And this?", [PICTURE, PICTURE]),
        ([("left <image> right <image>?", [PICTURE, OTHER])], "left <image> wrong <image>?", [PICTURE, OTHER]),
        ([("Hello", []), ("What is this?", [OTHER])], "What is that?", [OTHER]),
    ],
)
@pytest.mark.filterwarnings("ignore::mlx_fastvlm.errors.FastVLMWarning")
def test_reused_and_fresh_logits_are_equal(before, prompt, images, tiny):
    reuse = Reuse(*tiny)
    for asked, shown in before:
        answer(tiny, asked, shown, reuse=reuse)
    fresh, reused, known = logits_both_ways(tiny, reuse, prompt, images)
    assert known > 0
    assert relative_error(reused, fresh) < LOGITS["float32"]


@pytest.mark.parametrize("kv_bits", [8, 4])
def test_quantized_keys_and_values_are_reused_for_their_own_kind_only(kv_bits):
    tiny = load("demo")  # its heads have the 32 channels that quantization needs
    reuse = Reuse(*tiny)
    answer(tiny, "What is this?", reuse=reuse)
    options = GenerationOptions(max_tokens=12, kv_bits=kv_bits)
    fresh, reused, known = logits_both_ways(tiny, reuse, "What is this?", [PICTURE], options)
    assert known == 0
    np.testing.assert_array_equal(np.array(fresh), np.array(reused))
    fresh, reused, known = logits_both_ways(tiny, reuse, "What is that?", [PICTURE], options)
    assert known > rows_per_image(tiny)
    assert relative_error(reused, fresh) < LOGITS["float32"]


def test_turns_are_known_by_what_the_decoder_saw(tiny):
    reuse = Reuse(*tiny)
    first = "".join(response.text for response in answer(tiny, "What is this?", reuse=reuse))
    turns = [
        {"role": "user", "content": "What is this?"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "Why?"},
    ]
    fresh, reused, known = logits_both_ways(tiny, reuse, turns, [PICTURE])
    assert known >= len(tiny[1].tokenize("What is this?", 1)) - 1 + rows_per_image(tiny)
    assert relative_error(reused, fresh) < LOGITS["float32"]


def test_the_constant_beginning_is_known_from_the_start(tiny):
    ids = tiny[1].tokenize("Hello", 1)
    assert answer(tiny, "Hello", reuse=Reuse(*tiny))[-1].cached_tokens == ids.index(-200)


def test_another_preparation_of_the_same_picture_is_another_picture(tiny):
    model, processor = tiny
    processor = type(processor)(processor.tokenizer, processor.image_processor, processor.eos_token_ids)
    reuse = Reuse(model, processor)
    padded = answer((model, processor), "What is this?", reuse=reuse)
    processor.image_processor = dataclasses.replace(processor.image_processor, fit="crop")
    cropped = answer((model, processor), "What is this?", reuse=reuse)
    assert "encode" in cropped[-1].timings
    assert cropped[-1].cached_tokens == processor.tokenize("What is this?", 1).index(-200)  # what comes before it
    assert tokens(cropped) == tokens(answer((model, processor), "What is this?"))
    assert tokens(padded) == tokens(answer(tiny, "What is this?"))


@pytest.mark.parametrize("stopped_after", [1, 2, 7])
def test_an_answer_given_up_leaves_what_can_be_relied_on(stopped_after, tiny):
    reuse = Reuse(*tiny)
    responses = stream_generate(*tiny, "What is this?", PICTURE, reuse=reuse, max_tokens=12)
    for _ in range(stopped_after):
        next(responses)
    responses.close()
    for prompt in ("What is this?", "How many are there?"):
        fresh, reused, known = logits_both_ways(tiny, reuse, prompt, [PICTURE])
        assert known > rows_per_image(tiny)
        assert relative_error(reused, fresh) < LOGITS["float32"]


@pytest.mark.parametrize("layer", [0, -1])
def test_an_interruption_in_the_middle_of_a_layer_leaves_what_can_be_relied_on(layer, tiny, monkeypatch):
    reuse = Reuse(*tiny)
    responses = stream_generate(*tiny, "What is this?", PICTURE, reuse=reuse, max_tokens=12)
    for _ in range(3):
        next(responses)
    kind = type(tiny[0].make_cache()[0])
    attend = kind.attend
    before = range(len(tiny[0].language_model.layers))[layer]  # layers that are run all the same
    calls = itertools.count()

    def interrupted(self, queries, keys, values, scale):
        if next(calls) < before:
            return attend(self, queries, keys, values, scale)
        self.offset += 1  # the position is counted, but not written
        raise KeyboardInterrupt

    monkeypatch.setattr(kind, "attend", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(responses)
    monkeypatch.setattr(kind, "attend", attend)
    answered = tokens(answer(tiny, "What is this?"))
    fresh, reused, known = logits_both_ways(tiny, reuse, "What is this?", [PICTURE], answered=answered)
    assert known > rows_per_image(tiny)
    assert relative_error(reused, fresh) < LOGITS["float32"]


@pytest.fixture
def working_ahead(monkeypatch):
    """Answers as on a GPU: the next step is under way while the last token is handled."""
    gpu = SimpleNamespace(type=mx.DeviceType.gpu)
    seen = SimpleNamespace(**(vars(mx) | {"default_device": lambda: gpu}))
    monkeypatch.setattr(sys.modules["mlx_fastvlm.generate"], "mx", seen)


@pytest.mark.parametrize("options", [{}, {"temp": 1.5, "seed": 2, "repetition_penalty": 1.4}, {"stop": ["e"]}])
def test_working_ahead_changes_no_answer_and_nothing_that_is_kept(options, tiny, working_ahead, monkeypatch):
    reuse = Reuse(*tiny)
    ahead = answer(tiny, "What is this?", reuse=reuse, **options)
    given_up = stream_generate(*tiny, "And how?", PICTURE, reuse=reuse, max_tokens=12, **options)
    for _ in range(3):
        next(given_up, None)
    given_up.close()
    monkeypatch.undo()
    assert tokens(ahead) == tokens(answer(tiny, "What is this?", **options))
    for asked in ("What is this?", "And how?"):
        answered = tokens(answer(tiny, asked, **options))
        fresh, reused, known = logits_both_ways(tiny, reuse, asked, [PICTURE], answered=answered)
        assert known >= len(tiny[1].tokenize(asked, 1)) + rows_per_image(tiny)  # and what was said of the answer
        assert relative_error(reused, fresh) < LOGITS["float32"]


def test_half_precision_is_reused_too(converted_folder):
    half = load(converted_folder("inference"), dtype="bfloat16")
    reuse = Reuse(*half)
    answer(half, "What is this?", reuse=reuse)
    fresh, reused, known = logits_both_ways(half, reuse, "How many are there?", [PICTURE])
    assert known > rows_per_image(half)
    assert relative_error(reused.astype(mx.float32), fresh.astype(mx.float32)) < LOGITS["bfloat16"]


def test_another_models_memory_is_refused(tiny):
    model, processor = tiny
    reuse = Reuse(model, type(processor)(processor.tokenizer, processor.image_processor, processor.eos_token_ids))
    with pytest.raises(OptionError, match="another model"):
        answer(tiny, "What is this?", reuse=reuse)


def test_refusals_leave_nothing_and_harm_nothing(tiny, tmp_path):
    reuse = Reuse(*tiny)
    with pytest.raises(OptionError, match="context"):
        answer(tiny, "What is this?", max_tokens=10**6, reuse=reuse)
    with pytest.raises(ImageError, match="missing.png"):
        answer(tiny, "What is this?", ["missing.png"], reuse=reuse)
    broken = tmp_path / "broken.png"
    broken.write_bytes(PICTURE.read_bytes()[:200])
    with pytest.raises(ImageError):
        answer(tiny, "What is this?", [broken], reuse=reuse)
    assert tokens(answer(tiny, "What is this?", reuse=reuse)) == tokens(answer(tiny, "What is this?"))


def test_several_images_come_with_a_notice(tiny):
    with pytest.warns(FastVLMWarning, match="one image"):
        answer(tiny, "What is this?", [PICTURE, OTHER])


class TestRecognize:
    def test_a_file_is_known_however_it_is_named(self):
        data = PICTURE.read_bytes()
        with PICTURE.open("rb") as file:
            named = [recognize(source) for source in (PICTURE, str(PICTURE), data, memoryview(data), file)]
        assert len({content.digest for content in named}) == 1
        assert {content.source for content in named} == {data}

    def test_pixels_are_known_by_their_values(self):
        picture = Image.open(PICTURE).convert("RGB")
        array = np.array(picture)
        first = recognize(array)
        assert first == recognize(picture) == recognize(array.copy())
        array[0, 0, 0] ^= 1
        assert recognize(array) != first
        assert recognize(picture.resize(picture.size[::-1])) != first

    def test_pages_of_a_document_are_pictures_of_their_own(self, tmp_path):
        pytest.importorskip("pypdfium2", reason="install the extra 'formats'")
        document = tmp_path / "two.pdf"
        colors = [Image.new("RGB", (40, 30), color) for color in ("red", "blue")]
        colors[0].save(document, save_all=True, append_images=colors[1:])
        first, second = (recognize(f"{document}#page={page}") for page in (1, 2))
        assert first != second
        file = io.BytesIO(document.read_bytes())
        file.name = f"{document}#page=2"  # as `describe` hands it on
        assert recognize(file) == second == recognize(Path(f"{document}#page=2"))

    def test_it_is_a_snapshot(self):
        array = np.array(Image.open(PICTURE).convert("RGB"))
        content = recognize(array)
        before = content.source.tobytes()
        array[:] = 0
        assert content.source.tobytes() == before


class TestFeatureCache:
    def features(self, tiny, **options):
        return FeatureCache(tiny[0], **({"max_bytes": 2**20} | options))

    def stages(self, cache, image, image_size=256):
        clock = StageClock()
        rows = cache.rows(recognize(image), ImageProcessor(image_size), clock)
        return rows, set(clock.seconds)

    def test_the_least_recently_used_goes_first(self, tiny):
        colors = [np.full((8, 8, 3), 40 * i, np.uint8) for i in range(3)]
        one = self.stages(self.features(tiny), colors[0])[0].nbytes
        cache = self.features(tiny, max_bytes=2 * one)
        for i in (0, 1, 0, 2):
            self.stages(cache, colors[i])
        assert cache.nbytes == 2 * one
        assert ["encode" in self.stages(cache, colors[i])[1] for i in (0, 2, 1)] == [False, False, True]

    def test_files_serve_another_process_and_only_the_same_weights(self, tiny, tmp_path):
        rows, stages = self.stages(self.features(tiny, folder=tmp_path), PICTURE)
        assert "encode" in stages
        again, stages = self.stages(self.features(tiny, folder=tmp_path), PICTURE)
        assert "encode" not in stages
        np.testing.assert_array_equal(np.array(rows), np.array(again))
        in_tower = next(module for module in tiny[0].vision_tower.modules() if "weight" in module)
        for layer in (tiny[0].mm_projector[2], in_tower):
            weight = layer.weight
            try:
                layer.weight = weight * 2
                assert "encode" in self.stages(self.features(tiny, folder=tmp_path), PICTURE)[1]
            finally:
                layer.weight = weight

    def test_damaged_files_are_made_again(self, tiny, tmp_path):
        rows, _ = self.stages(self.features(tiny, folder=tmp_path), PICTURE)
        (file,) = tmp_path.rglob("*.safetensors")
        whole = file.read_bytes()
        for damaged in (b"", whole[:50], whole[:-8], b"x" * len(whole)):
            file.write_bytes(damaged)
            again, stages = self.stages(self.features(tiny, folder=tmp_path), PICTURE)
            assert "encode" in stages
            np.testing.assert_array_equal(np.array(rows), np.array(again))
            assert file.read_bytes() == whole

    def test_the_folder_is_bounded(self, tiny, tmp_path):
        self.stages(self.features(tiny, folder=tmp_path), PICTURE)
        (file,) = tmp_path.rglob("*.safetensors")
        cache = self.features(tiny, folder=tmp_path, max_folder_bytes=2 * file.stat().st_size)
        for i in range(4):
            self.stages(cache, np.full((8, 8, 3), 40 * i, np.uint8))
        assert len(list(tmp_path.rglob("*.safetensors"))) == 2
        assert not file.exists()

    def test_in_the_folder_too_the_least_recently_used_goes_first(self, tiny, tmp_path):
        colors = [np.full((8, 8, 3), 40 * i, np.uint8) for i in range(3)]
        for color in colors[:2]:
            self.stages(self.features(tiny, folder=tmp_path), color)
            for file in tmp_path.rglob("*.safetensors"):
                os.utime(file, (file.stat().st_atime, file.stat().st_mtime - 100))  # the first is the older one
        room = 2 * file.stat().st_size
        assert "encode" not in self.stages(self.features(tiny, folder=tmp_path), colors[0])[1]
        self.stages(self.features(tiny, folder=tmp_path, max_folder_bytes=room), colors[2])
        again = [self.stages(self.features(tiny, folder=tmp_path), colors[i])[1] for i in (0, 1)]
        assert ["encode" in stages for stages in again] == [False, True]

    def test_one_picture_is_held_however_little_room_there_is(self, tiny):
        cache = self.features(tiny, max_bytes=1)
        assert ["encode" in self.stages(cache, image)[1] for image in (PICTURE, PICTURE, OTHER, PICTURE)] == [
            True,
            False,
            True,
            True,
        ]

    def test_a_folder_that_cannot_be_written_is_given_up_with_a_warning(self, tiny, tmp_path):
        (tmp_path / "file").touch()
        cache = self.features(tiny, folder=tmp_path / "file")
        with pytest.warns(FastVLMWarning, match="cannot be kept"):
            rows, _ = self.stages(cache, PICTURE)
        assert rows.shape[0] == rows_per_image(tiny)
        self.stages(cache, OTHER)


class TestPrefixCache:
    def layers(self, tiny, length, fill):
        model = tiny[0]
        caches = model.make_cache()
        config = model.config.text_config
        rows = mx.full((1, config.num_key_value_heads, length, config.head_dim), fill)
        for cache in caches:
            cache.update_and_fetch(rows, rows)
        return caches

    def test_the_longest_beginning_is_found_and_never_all_of_it(self, tiny):
        cache = PrefixCache(2**20)
        cache.keep([1, 2, "a", "a"], self.layers(tiny, 4, 1.0))
        cache.keep([1, 2, "a", "b", 5], self.layers(tiny, 5, 2.0))
        for positions, length, value in [
            ([1, 2, "a", "b", 6], 4, 2.0),
            ([1, 2, "a", "a"], 3, 2.0),  # both hold it: the one used last
            ([1, 2, "a", "a", 7, 8], 4, 1.0),
            ([9], 0, None),
            ([1], 0, None),
        ]:
            found, known = cache.longest(positions)
            assert known == length
            if length:
                assert {layer.offset for layer in found} == {length}
                assert found[0].keys.min().item() == found[0].keys.max().item() == value

    def test_what_is_taken_is_the_callers_own(self, tiny):
        cache = PrefixCache(2**20)
        cache.keep([1, 2, 3], self.layers(tiny, 3, 1.0))
        taken, _ = cache.longest([1, 2, 4, 4])
        extra = mx.full(taken[0].keys[..., :1, :].shape, 9.0)
        for layer in taken:
            layer.update_and_fetch(extra, extra)
        again, known = cache.longest([1, 2, 3, 4])
        assert known == 3
        assert again[0].keys.max().item() == 1.0

    def test_a_longer_one_takes_the_place_of_its_beginning(self, tiny):
        cache = PrefixCache(2**20)
        cache.keep([1, 2], self.layers(tiny, 2, 1.0))
        cache.keep([1, 2, 3], self.layers(tiny, 3, 1.0))
        assert cache.nbytes == sum(layer.nbytes for layer in cache.longest([1, 2, 3, 4])[0])

    @pytest.mark.parametrize("tail, entries", [(5, 1), (20, 2)])
    def test_what_holds_next_to_nothing_else_gives_way(self, tail, entries, tiny):
        cache = PrefixCache(2**24)
        for end in (1, 2):
            cache.keep([0] * 100 + [end] * tail, self.layers(tiny, 100 + tail, 1.0))
        one = sum(layer.copy(100 + tail).nbytes for layer in self.layers(tiny, 100 + tail, 1.0))
        assert cache.nbytes == entries * one
        assert cache.longest([0] * 100 + [2] * tail + [3])[1] == 100 + tail

    def test_other_kinds_and_pinned_ones_do_not_give_way(self, tiny):
        cache = PrefixCache(2**20)
        cache.keep([1, 2], self.layers(tiny, 2, 1.0), pinned=True)
        cache.keep([1, 2], self.layers(tiny, 2, 8.0), kv_bits=8)
        cache.keep([1, 2, 3], self.layers(tiny, 3, 1.0))
        assert cache.longest([1, 2, 4], kv_bits=8)[0][0].keys.max().item() == 8.0
        assert cache.nbytes == sum(self.layers(tiny, 7, 1.0)[0].copy(7).nbytes for _ in self.layers(tiny, 1, 1.0))

    def test_what_shares_only_a_beginning_is_not_used_by_that(self, tiny):
        cache = PrefixCache(2 * sum(layer.copy(3).nbytes for layer in self.layers(tiny, 3, 1.0)))
        cache.keep([7, 1, 1], self.layers(tiny, 3, 1.0))
        cache.keep([7, 2, 2], self.layers(tiny, 3, 1.0))
        assert cache.longest([7, 3, 3])[1] == 1
        cache.keep([7, 3, 3], self.layers(tiny, 3, 1.0))
        assert [cache.longest([7, last, last, 0])[1] for last in (1, 2, 3)] == [1, 3, 3]

    def test_of_what_is_too_long_the_beginning_is_held(self, tiny):
        cache = PrefixCache(sum(layer.copy(5).nbytes for layer in self.layers(tiny, 5, 1.0)))
        cache.keep(list(range(9)), self.layers(tiny, 9, 1.0))
        found, known = cache.longest(list(range(12)))
        assert known == 5 and found[0].offset == 5
        assert cache.nbytes == sum(layer.nbytes for layer in found)

    def test_the_least_recently_used_goes_first_and_pinned_ones_never(self, tiny):
        one = sum(layer.copy(3).nbytes for layer in self.layers(tiny, 3, 1.0))
        cache = PrefixCache(2 * one)
        cache.keep([0, 0, 0], self.layers(tiny, 3, 0.0), pinned=True)
        for first in (1, 2):
            cache.keep([first] * 3, self.layers(tiny, 3, 1.0))
        cache.longest([1, 1, 1, 1])
        cache.keep([3, 3, 3], self.layers(tiny, 3, 1.0))
        assert [cache.longest([first] * 4)[1] for first in (0, 1, 2, 3)] == [3, 3, 0, 3]


def test_generate_takes_a_reuse(tiny):
    reuse = Reuse(*tiny)
    first, second = (generate(*tiny, "What is this?", PICTURE, reuse=reuse, max_tokens=12) for _ in range(2))
    assert first == second == generate(*tiny, "What is this?", PICTURE, max_tokens=12)
