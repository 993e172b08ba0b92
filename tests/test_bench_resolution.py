"""What resolutions cost: the table of `info --resolution`, and the benchmark of rectangles beside padded squares."""

import json
from dataclasses import replace

import pytest

from mlx_fastvlm import load
from mlx_fastvlm.benchmarks import resolution as bench
from mlx_fastvlm.benchmarks.apple_chips import chip_named
from mlx_fastvlm.benchmarks.layer_work import FUSED
from mlx_fastvlm.benchmarks.random_model import random_config
from mlx_fastvlm.benchmarks.roofline import TEXT_TOKENS, first_token_seconds


@pytest.fixture
def run(command_line):
    return command_line


def test_costs_of_the_released_model():
    costs = {row["resolution"]: row for row in bench.cost_table(random_config("0.5b"))}
    assert list(costs) == [256, 512, 768, 1024, 1536, 2048]
    assert {side: row["tokens"] for side, row in costs.items()} == {side: (side // 64) ** 2 for side in costs}
    assert costs[1024]["native_tokens"] == {"4:3": 192, "16:9": 144}
    config = random_config("0.5b")
    smaller = replace(config, vision_config=replace(config.vision_config, image_size=512))
    for chip, seconds in costs[512]["predicted_ttft_s"].items():
        assert seconds == first_token_seconds(smaller, FUSED, chip_named(chip), TEXT_TOKENS)
        assert seconds < costs[1024]["predicted_ttft_s"][chip] / 2


def test_this_machines_chip_is_the_one_predicted_for(monkeypatch):
    monkeypatch.setattr(bench, "cpu_name", lambda: "Apple M3")
    (row, *_) = bench.cost_table(random_config("0.5b"))
    assert list(row["predicted_ttft_s"]) == ["M3"]


def test_info_shows_what_resolutions_cost(run):
    code, out, _ = run("info", "demo", "--resolution")
    assert code == 0
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert {"64", "128", "192", "256", "384", "512"} <= set(lines)
    assert "256 (trained)" in lines["256"] and "PREDICTED by a model, not measured" in out
    assert "measured here" not in out


def test_info_measures_on_this_machine(run, monkeypatch):
    """Every resolution is really run: the decoder's positions are those of the table."""
    seen = []
    answer = bench.stream_generate

    def watched(model, processor, prompt, picture, **options):
        responses = list(answer(model, processor, prompt, picture, **options))
        seen.append((options["resolution"], options["fit"], responses[-1].prompt_tokens))
        return iter(responses)

    monkeypatch.setattr(bench, "stream_generate", watched)
    code, out, err = run("info", "demo", "--resolution", "--measure", "--json")
    found = json.loads(out)
    assert (code, err) == (0, "") and found["trained"] == 256
    text = len(load("demo")[1].tokenize("Describe this image.", 1)) - 1
    for row in found["resolutions"]:
        assert row["measured_ttft_s"] > 0
        assert seen.count((row["resolution"], "pad", row["tokens"] + text)) == 4


def test_measuring_is_about_resolutions(run):
    code, out, err = run("info", "demo", "--measure")
    assert (code, out) == (1, "") and "give --resolution too" in err


def test_rectangles_are_measured_beside_padded_squares(run, monkeypatch):
    monkeypatch.setattr(bench, "WIDTH", 320)
    monkeypatch.setattr(bench, "HEIGHT", 180)
    code, out, _ = run("bench", "resolution", "--resolutions", 192, "--repeat", 2)
    assert code == 0
    record = json.loads(out.splitlines()[-1])
    padded, native = record["choices"]
    assert (padded["fit"], padded["image_tokens"], padded["size"]) == ("pad", 9, [192, 192])
    assert (native["fit"], native["image_tokens"], native["size"]) == ("native", 6, [128, 192])
    assert padded["prompt_tokens"] - native["prompt_tokens"] == 3  # as the decoder saw them
    assert native["tokens_over_padded"] == 6 / 9
    assert len(native["encode_s"]["samples"]) == len(native["encode_over_padded"]["samples"]) == 2
    ratio = native["encode_s"]["samples"][0] / padded["encode_s"]["samples"][0]
    assert native["encode_over_padded"]["samples"][0] == pytest.approx(ratio)
    assert "native 192" in out and "-33%" in out


def test_a_resolution_that_cannot_be_had_is_one_line(run):
    code, _, err = run("bench", "resolution", "--resolutions", 4096)
    assert code == 1 and "2048 is nearest" in err and err.count("\n") == 1
