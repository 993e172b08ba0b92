"""Answering end to end on the tiny model: the three rungs agree, statistics are what happened, options do what they say."""

import io
import itertools

import numpy as np
import pytest
from PIL import Image

from mlx_fastvlm import generate, stream_generate
from mlx_fastvlm.errors import ImageError, OptionError
from tests.conftest import GOLDEN
from tests.tolerances import relative_error

PICTURE = GOLDEN / "images" / "landscape.png"
OTHER = GOLDEN / "images" / "portrait.png"


def answer(tiny, prompt="What is this?", **options):
    model, processor = tiny
    options = {"image": PICTURE, "max_tokens": 12} | options
    return list(stream_generate(model, processor, prompt, **options))


def test_streamed_text_joins_to_what_generate_returns(tiny):
    model, processor = tiny
    responses = answer(tiny)
    whole = generate(model, processor, "What is this?", image=PICTURE, max_tokens=12)
    assert "".join(response.text for response in responses) == whole == processor.decode([r.token for r in responses])
    assert whole


def test_counts_are_what_the_decoder_saw(tiny):
    model, processor = tiny
    responses = answer(tiny)
    text_tokens = len(processor.tokenize("What is this?", 1)) - 1  # without the placeholder
    rows = model.config.vision_config.num_image_tokens
    assert {response.prompt_tokens for response in responses} == {text_tokens + rows}
    assert [response.generation_tokens for response in responses] == list(range(1, 13))
    assert [response.finish_reason for response in responses] == [None] * 11 + ["length"]


def test_stage_times_add_up_to_the_time_to_first_token(tiny):
    last = answer(tiny)[-1]
    assert list(last.timings) == ["tokenize", "decode", "resize", "encode", "project", "prefill", "first_token"]
    assert all(seconds > 0 for seconds in last.timings.values())
    assert sum(last.timings.values()) == pytest.approx(last.ttft, rel=0.01)
    assert last.prompt_tps == pytest.approx(last.prompt_tokens / last.timings["prefill"])
    assert last.peak_memory > 0


def test_without_an_image_only_words_are_seen(tiny):
    responses = answer(tiny, image=None)
    assert responses[-1].prompt_tokens == len(tiny[1].tokenize("What is this?"))
    assert "encode" not in responses[-1].timings


@pytest.mark.parametrize("form", ["path", "string", "bytes", "file", "PIL", "array", "list"])
def test_every_way_to_give_an_image_gives_the_same_answer(form, tiny):
    picture = Image.open(PICTURE).convert("RGB")
    image = {
        "path": PICTURE,
        "string": str(PICTURE),
        "bytes": PICTURE.read_bytes(),
        "file": io.BytesIO(PICTURE.read_bytes()),
        "PIL": picture,
        "array": np.asarray(picture),
        "list": [PICTURE],
    }[form]
    assert [r.token for r in answer(tiny, image=image)] == [r.token for r in answer(tiny)]


def test_the_answer_depends_on_the_image_and_on_the_order_of_two(tiny):
    model, processor = tiny

    def next_token_logits(*images):
        rows = [model.encode_images(processor.preprocess(image))[0] for image in images]
        return np.array(model(processor.tokenize("What is this?", len(images)), rows)[0, -1])

    seen = [next_token_logits(*images) for images in ([PICTURE], [OTHER], [PICTURE, OTHER], [OTHER, PICTURE])]
    for first, second in itertools.combinations(seen, 2):
        assert relative_error(first, second) > 1e-3


def test_an_end_token_ends_the_answer_without_text(tiny):
    model, processor = tiny
    free = answer(tiny)
    end = free[4].token
    first = next(i for i, response in enumerate(free) if response.token == end)
    processor = type(processor)(processor.tokenizer, processor.image_processor, frozenset({end}))
    stopped = list(stream_generate(model, processor, "What is this?", image=PICTURE, max_tokens=12))
    assert len(stopped) == first + 1
    assert stopped[-1].finish_reason == "stop"
    assert "".join(r.text for r in stopped) == processor.decode([r.token for r in free[:first]])


def test_a_stop_string_ends_the_answer_before_it(tiny):
    whole = "".join(response.text for response in answer(tiny))
    stop = whole[3:5]
    responses = answer(tiny, stop=stop)
    assert "".join(response.text for response in responses) == whole[: whole.index(stop)]
    assert responses[-1].finish_reason == "stop"


def test_a_seed_repeats_an_answer(tiny):
    def draw(seed):
        return [r.token for r in answer(tiny, temp=1.5, seed=seed)]

    assert draw(1) == draw(1)
    assert len({tuple(draw(seed)) for seed in range(4)}) > 1


def test_a_strong_repetition_penalty_forbids_repetition(tiny):
    plain = [r.token for r in answer(tiny, max_tokens=40)]
    penalized = [r.token for r in answer(tiny, max_tokens=40, repetition_penalty=1e6)]
    assert len(set(plain)) < len(plain)
    assert len(set(penalized)) == len(penalized)


def test_the_system_line_is_seen(tiny):
    assert answer(tiny, system="Be a poet, briefly.")[-1].prompt_tokens != answer(tiny)[-1].prompt_tokens


@pytest.mark.parametrize(
    "options, error, text",
    [
        ({"max_tokens": 0}, OptionError, "max_tokens"),
        ({"temp": -0.1}, OptionError, "temp"),
        ({"repetition_penalty": 0}, OptionError, "repetition_penalty"),
        ({"max_tokens": 10**6}, OptionError, "context"),
        ({"image": "missing.png"}, ImageError, "missing.png"),
        ({"prompt": "two <image> <image>"}, OptionError, "marks"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_yielded(options, error, text, tiny):
    with pytest.raises(error, match=text):
        answer(tiny, **options)
