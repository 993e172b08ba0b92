"""The ttft benchmark: stages that add up, every combination, memory of its own, and nothing that was reused."""

import dataclasses
import json
import subprocess
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from PIL import Image

from mlx_fastvlm import load
from mlx_fastvlm.benchmarks import random_model, ttft, ttft_variant
from mlx_fastvlm.benchmarks.command import BenchmarkError
from mlx_fastvlm.benchmarks.report import Summary
from mlx_fastvlm.benchmarks.ttft_variant import STAGES, Request, Variant
from mlx_fastvlm.config import FastVLMConfig, TextConfig, VisionConfig
from mlx_fastvlm.fastvithd import FastViTHD
from tests.benchmark_output import result_of
from tests.conftest import GOLDEN

PICTURE = GOLDEN / "images" / "landscape.png"
TINY = FastVLMConfig(
    TextConfig(
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
        tie_word_embeddings=True,
    ),
    VisionConfig(image_size=128, embed_dims=(8, 16, 32, 64, 128), layers=(1, 1, 2, 1, 1)),
)


@pytest.fixture
def tiny_random(monkeypatch):
    """Random models are tiny ones, in this process."""
    monkeypatch.setattr(ttft_variant, "random_config", lambda size: TINY)


def request_of(variant=None, **changes):
    values = {
        "model": None,
        "random_weights": "0.5b",
        "variant": variant or Variant(),
        "image": str(PICTURE),
        "prompt": "What is it?",
        "max_tokens": 3,
        "repeat": 2,
    }
    return Request(**{**values, **changes})


def test_stages_make_up_the_total_in_every_combination(capsys, converted_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result, table = result_of(
        ttft, capsys, "--model", converted_folder("inference"), "--image", PICTURE, "--repeat", 1, "--max-tokens", 4,
        "--resolution", 128, 192, "--bits", "none", 8, "--cold-starts", 1, "--save", "matrix",
    )  # fmt: skip
    variants = result["variants"]
    asked = [(variant["quantization"], variant["resolution"], variant["image_tokens"]) for variant in variants]
    assert asked == [(None, 128, 4), (None, 192, 9), ("int8", 128, 4), ("int8", 192, 9)]
    for variant in variants:
        times = {name: summary["median"] for name, summary in variant["times_s"].items()}
        assert sum(times[stage] for stage in STAGES) == pytest.approx(times["ttft"], rel=0.05)
        assert times["paper_ttft"] == pytest.approx(times["encode"] + times["project"] + times["image_prefill"])
        assert variant["generation_tokens"] == 4
        assert variant["prompt_tokens"] == variant["image_tokens"] + variant["text_tokens"]
        assert variant["decode_tps"]["median"] > 0
        assert variant["peak_rss_bytes"] >= variant["loaded_rss_bytes"] > variant["weight_bytes"] > 0
        (row,) = [line for line in table.splitlines() if line.startswith(ttft.variant_name(variant))]
        assert f" {variant['peak_rss_bytes'] / variant['weight_bytes']:.2f} " in row
    assert variants[2]["weight_bytes"] < variants[0]["weight_bytes"]
    (cold_start,) = result["cold_start"]
    assert cold_start["first_character_s"]["median"] > variants[0]["times_s"]["ttft"]["median"]
    assert json.loads((tmp_path / "benchmarks" / "results" / "matrix.json").read_text()) == result


def test_the_first_cold_start_is_not_counted(monkeypatch, tmp_path):
    commands, firsts = [], iter([9.0, 1.0, 2.0, 9.0, 3.0, 4.0])
    monkeypatch.setattr(ttft, "time_answer", lambda command: commands.append(command) or (next(firsts), 10.0))
    args = SimpleNamespace(dtype=[None, "float16"], cold_starts=2, prompt="What?", max_tokens=4)
    measured = list(ttft.measure_cold_starts(tmp_path, PICTURE, args))
    assert [cold_start["first_character_s"]["samples"] for cold_start in measured] == [[1.0, 2.0], [3.0, 4.0]]
    assert ["--dtype" in command for command in commands] == [False] * 3 + [True] * 3


def test_the_paper_s_figure_is_taken_answer_by_answer():
    sample = dict.fromkeys((*STAGES, "ttft", "image_prefill"), 100.0)
    samples = [
        sample | {"encode": 1.0, "project": 0.5, "image_prefill": 0.25},
        sample | {"encode": 2.0, "project": 0.5, "image_prefill": 0.5},
    ]
    times = ttft.stage_summaries(samples)
    assert times["paper_ttft"].samples == (1.75, 3.0)
    assert list(times)[: len(STAGES)] == list(STAGES)


def test_an_answer_about_a_picture_that_was_seen_before_is_refused(tiny_random, monkeypatch):
    stream_generate = ttft_variant.stream_generate

    def without_encoding(*arguments, **options):
        for response in stream_generate(*arguments, **options):
            timings = {stage: seconds for stage, seconds in response.timings.items() if stage != "encode"}
            yield dataclasses.replace(response, timings=timings)

    monkeypatch.setattr(ttft_variant, "stream_generate", without_encoding)
    with pytest.raises(BenchmarkError, match="no time for encode: something was reused"):
        ttft_variant.measure(request_of(repeat=1))


@pytest.mark.parametrize(("bits", "recipe"), [("none", None), ("8", "int8"), ("4", "int4")])
def test_a_random_model_answers_to_the_end(bits, recipe, tiny_random):
    measured = ttft_variant.measure(request_of(Variant(dtype="float32", bits=bits, resolution=64)))
    assert measured["quantization"] == recipe
    assert measured["generation_tokens"] == 3
    assert measured["image_tokens"] == 1
    assert len(measured["samples"]) == len(measured["decode_tps"]) == 2


def test_the_image_s_rows_alone_are_prefilled_once_an_answer(tiny_random, monkeypatch):
    shapes, prefill = [], ttft_variant.prefill
    monkeypatch.setattr(ttft_variant, "prefill", lambda *inputs: shapes.append(inputs[1].shape) or prefill(*inputs))
    ttft_variant.measure(request_of(Variant(resolution=128), repeat=2))
    assert shapes == [(1, 4, TINY.text_config.hidden_size)] * 3


def test_mlx_s_peak_is_that_of_answering(tiny_random, monkeypatch):
    prepare_model, loading = ttft_variant.prepare_model, 400_000_000

    def prepare(request):
        mx.eval(mx.zeros(loading, mx.uint8))
        return prepare_model(request)

    monkeypatch.setattr(ttft_variant, "prepare_model", prepare)
    assert 0 < ttft_variant.measure(request_of(repeat=1))["mlx_peak_bytes"] < loading


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_random_values_stay_ordinary_numbers(dtype):
    kind = getattr(mx, dtype)
    model = random_model.load_random(TINY, dtype)
    assert {array.dtype for _, array in tree_flatten(model.parameters())} == {kind}
    features = model.vision_tower(mx.random.uniform(shape=(1, 128, 128, 3)).astype(kind))
    logits = model([1, -200, 2], model.project(features))
    for result in (features, logits):
        values = np.abs(np.array(result.astype(mx.float32)))
        assert np.isfinite(values).all()
        assert 1e-3 < values.mean() < 100


@pytest.mark.parametrize(("size", "millions"), [("0.5b", 620), ("1.5b", 1675), ("7b", 7760)])
def test_random_models_have_the_released_sizes(size, millions):
    model = random_model.FastVLM(random_model.random_config(size))  # nothing is computed: MLX is lazy
    parameters = sum(array.size for _, array in tree_flatten(model.parameters()))
    assert parameters / 1e6 == pytest.approx(millions, rel=0.01)


def test_words_count_as_the_released_tokenizer_counts_them():
    processor = random_model.word_processor(TINY)
    assert len(processor.tokenize("Describe this image.", 1)) == 25  # 24 of Qwen2's, and the image's mark
    assert max(processor.tokenize("Read 42 words, please!", 1)) < TINY.text_config.vocab_size


@pytest.mark.parametrize("count", [20, 21, 64, 200])
def test_a_prompt_has_as_many_text_tokens_as_asked(count, tiny):
    for processor in (random_model.word_processor(TINY), load("demo")[1]):
        question = ttft_variant.question_of(processor, count)
        assert len(processor.tokenize(question, 1)) == count + 1
    with pytest.raises(BenchmarkError, match="template alone has"):
        ttft_variant.question_of(processor, 5)


def test_quantizing_in_memory_is_what_the_converter_does(tmp_path):
    from mlx_fastvlm.convert.quantize import quantize

    folder = quantize(ttft.resolve_aside("demo"), tmp_path / "int8", "int8")
    expected = dict(tree_flatten(load(folder, dtype="float16")[0].parameters()))
    model = ttft_variant.quantize_in_memory(load("demo", dtype="float16")[0], "8")
    found = dict(tree_flatten(model.parameters()))
    assert {name: array.shape for name, array in found.items()} == {
        name: array.shape for name, array in expected.items()
    }
    packed = [name for name in expected if name.endswith(".scales")]
    assert packed
    for name in packed:
        weight = name.replace(".scales", ".weight")
        assert mx.mean((found[weight] == expected[weight]).astype(mx.float32)).item() > 0.99, name
    with pytest.raises(BenchmarkError, match="quantized already, by recipe int8"):
        ttft_variant.quantize_in_memory(model, "4")


def test_another_resolution_is_what_the_tower_sees(tiny_random, monkeypatch):
    seen = []
    encode = FastViTHD.__call__
    monkeypatch.setattr(FastViTHD, "__call__", lambda self, pixels: seen.append(pixels.shape) or encode(self, pixels))
    measured = ttft_variant.measure(request_of(Variant(resolution=192), repeat=1))
    assert set(seen) == {(1, 192, 192, 3)}
    assert (measured["resolution"], measured["image_tokens"]) == (192, 9)
    assert measured["prompt_tokens"] == 9 + measured["text_tokens"]


def test_ctrl_c_shows_what_was_measured(capsys, converted_folder, monkeypatch):
    run_variant = ttft.run_variant

    def run_first_only(request):
        if request.variant.resolution == 192:
            raise KeyboardInterrupt
        return run_variant(request)

    monkeypatch.setattr(ttft, "run_variant", run_first_only)
    arguments = ["--model", str(converted_folder("inference")), "--image", str(PICTURE), "--repeat", "1"]
    with pytest.raises(SystemExit) as end:
        ttft.main([*arguments, "--cold-starts", "0", "--max-tokens", "2", "--resolution", "128", "192"])
    assert end.value.code == 130
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [variant["resolution"] for variant in result["variants"]] == [128]
    assert result["interrupted"] is True


def test_a_variant_that_fails_leaves_those_before_it(capsys, converted_folder, monkeypatch, tmp_path):
    run_variant = ttft.run_variant

    def run_first_only(request):
        if request.variant.resolution == 192:
            raise BenchmarkError("There is no room.")
        return run_variant(request)

    monkeypatch.setattr(ttft, "run_variant", run_first_only)
    monkeypatch.chdir(tmp_path)
    arguments = ["--model", str(converted_folder("inference")), "--image", str(PICTURE), "--repeat", "1", "--save"]
    with pytest.raises(SystemExit) as end:
        ttft.main([*arguments, "--cold-starts", "0", "--max-tokens", "1", "--resolution", "128", "192"])
    assert end.value.code == 1
    out, err = capsys.readouterr()
    result = json.loads(out.splitlines()[-1])
    (variant,) = result["variants"]
    assert (variant["resolution"], result["error"]) == (128, "There is no room.")
    assert variant["decode_tps"] is None  # one token has no rate
    assert err.splitlines()[-1] == "ttft: There is no room."
    assert not list(tmp_path.iterdir())


def test_random_weights_that_find_no_room_say_so(monkeypatch):
    monkeypatch.setattr(random_model.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(BenchmarkError, match="0.0 GB free; the random weights need"):
        random_model.load_random(TINY, "float32")


@pytest.mark.parametrize(
    ("returncode", "stdout", "message"),
    [
        (0, '{"error": "The picture is odd."}\n', "The picture is odd"),
        (-9, "", "killed, probably for want of memory"),
        (1, "", "exit code 1"),
    ],
)
def test_a_variant_that_fails_says_why(returncode, stdout, message, monkeypatch):
    done = subprocess.CompletedProcess([], returncode, stdout=stdout)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    with pytest.raises(BenchmarkError, match=message):
        ttft.run_variant(request_of())


def test_a_request_survives_the_way_to_its_process():
    request = request_of(Variant("float16", "8", 512, 64))
    assert Request.from_json(request.command()[-1]) == request


def test_stage_bars_are_drawn_as_a_png(tmp_path):
    pytest.importorskip("matplotlib")
    from mlx_fastvlm.benchmarks.stage_plot import plot_stages

    times = {stage: Summary.of([0.1]) for stage in STAGES}
    path = plot_stages("demo", ["one", "other"], [{"times_s": times}, {"times_s": times}], tmp_path / "bars.png")
    assert Image.open(path).format == "PNG"
    assert [entry.name for entry in tmp_path.iterdir()] == ["bars.png"]


def test_a_plot_that_cannot_be_drawn_is_refused_before_anything_is_measured(monkeypatch, capsys):
    monkeypatch.setattr(ttft, "resolve_aside", lambda model: pytest.fail("measured"))
    with pytest.raises(SystemExit) as end:
        ttft.main(["--plot", "bars.jpg"])
    assert end.value.code == 1
    assert "bars.jpg does not end in .png" in capsys.readouterr().err
