"""The performance model: its work counts equal the traced network's, its predictions behave, nothing passes for measured."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from mlx.utils import tree_flatten

from mlx_fastvlm.benchmarks import roofline
from mlx_fastvlm.benchmarks.apple_chips import CHIPS, Figure, chip_named
from mlx_fastvlm.benchmarks.command import BenchmarkError
from mlx_fastvlm.benchmarks.docs_page import fill
from mlx_fastvlm.benchmarks.layer_work import (
    FUSED,
    MLX_VLM,
    PLAIN,
    decode_step,
    encode_stages,
    prefill_stage,
    tower_attention,
)
from mlx_fastvlm.benchmarks.op_work import Launch
from mlx_fastvlm.benchmarks.performance_model import (
    BANDWIDTH_SHARE,
    BOUNDS,
    COMPUTE_SHARE,
    LAUNCH_SECONDS,
    predict,
)
from mlx_fastvlm.benchmarks.published_points import POINTS
from mlx_fastvlm.benchmarks.random_model import SIZES, random_config
from mlx_fastvlm.qwen2 import Qwen2

ROOT = Path(__file__).resolve().parent.parent
CONFIG = random_config("0.5b")
M2, M4_MAX, M5_MAX = (chip_named(name) for name in ("M2", "M4 Max", "M5 Max"))


def traced_products(part: str, config: str, size: int) -> list[tuple[str, float]]:
    """(kind, operations) of every product and convolution that MLX sees, traced in a process of its own.

    Once MLX has crashed in a trace, in a process in which hundreds of other tests had run.
    """
    command = [sys.executable, "-m", "tests.traced_products", part, config, str(size)]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [tuple(product) for product in json.loads(told.stdout)]


def tower_launches(graph, resolution: int = 1024) -> list[Launch]:
    vision = replace(CONFIG.vision_config, image_size=resolution)
    return [launch for stage in encode_stages(vision, graph).values() for launch in stage]


@pytest.mark.parametrize("resolution", [256, 1024])
def test_the_towers_products_are_those_that_mlx_traces(resolution):
    traced = traced_products("tower", "0.5b", resolution)
    launches = tower_launches(PLAIN, resolution)

    products = [launch for launch in launches if launch.matmul_flops]
    assert len(products) == sum(kind == "product" for kind, _ in traced)
    assert sum(x.matmul_flops for x in products) == sum(flops for kind, flops in traced if kind == "product")

    depthwise = [launch for launch in launches if launch.op.startswith("depthwise")]
    assert len(depthwise) == sum(kind == "depthwise" for kind, _ in traced)
    assert sum(x.vector_flops for x in depthwise) == sum(flops for kind, flops in traced if kind == "depthwise")

    # The others run on padded tiles: at least what is wanted.
    padded = [launch for launch in launches if launch.op.startswith(("widening", "convolution"))]
    wanted = [flops for kind, flops in traced if kind == "convolution"]
    assert len(padded) == len(wanted) == 6
    assert all(launch.vector_flops >= flops for launch, flops in zip(padded, wanted, strict=True))


@pytest.mark.parametrize("size", SIZES)
def test_the_decoders_products_are_those_that_mlx_traces(size):
    text = random_config(size).text_config
    tokens = 37
    traced = [flops for _, flops in traced_products("decoder", size, tokens)]
    linear = [x for x in prefill_stage(text, PLAIN, tokens) if x.op in ("linear", "head")]
    attention = [x for x in prefill_stage(text, PLAIN, tokens) if x.op == "attention"]
    # MLX on a CPU computes all scores; the GPU kernel only those that a causal mask leaves.
    all_scores = sum(x.matmul_flops for x in attention) * 2 * tokens / (tokens + 1)
    assert sum(x.matmul_flops for x in linear) + all_scores == pytest.approx(sum(traced), rel=1e-12)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("graph", [PLAIN, FUSED, MLX_VLM], ids=lambda graph: graph.name)
def test_a_decode_step_reads_every_parameter_once(size, graph):
    text = random_config(size).text_config
    parameters = sum(array.size for _, array in tree_flatten(Qwen2(text).parameters()))
    table = 0 if text.tie_word_embeddings else text.vocab_size * text.hidden_size  # one row of it is read
    read = sum(launch.device_bytes for launch in decode_step(text, graph, context=1) if launch.matmul_flops)
    assert read == pytest.approx(2 * (parameters - table), rel=0.005)
    few_bits = sum(x.device_bytes for x in decode_step(text, graph, 1, weight_bits=4.5) if x.matmul_flops)
    assert few_bits == pytest.approx(4.5 / 8 * (parameters - table), rel=0.02)


def test_a_launch_waits_for_the_slowest_of_three_and_for_its_start():
    memory = Launch("copy", device_bytes=M2.bandwidth.value * BANDWIDTH_SHARE)
    product = Launch("product", device_bytes=1, matmul_flops=2 * M2.flops.value * COMPUTE_SHARE)
    prediction = predict([memory, product], M2)
    assert prediction.waits == pytest.approx(
        {"memory": 1, "compute": 2, "on-core": 0, "launch": 2 * LAUNCH_SECONDS}, abs=1e-12
    )
    assert prediction.seconds == pytest.approx(3 + 2 * LAUNCH_SECONDS)
    assert prediction.launches == 2
    assert sum(prediction.share(bound) for bound in BOUNDS) == pytest.approx(1)
    on_core = Launch("convolution", device_bytes=1, on_core_bytes=M2.flops.value * COMPUTE_SHARE / 4)
    assert predict([on_core], M2).waits["on-core"] == pytest.approx(1)


def test_neural_accelerators_speed_up_products_only():
    product, other = Launch("product", 1, matmul_flops=1e12), Launch("other", 1, vector_flops=1e12)
    assert predict([other], M5_MAX).seconds / predict([product], M5_MAX).seconds == pytest.approx(70 / 18, rel=1e-3)
    assert predict([other], M2).seconds == predict([product], M2).seconds


def test_nothing_to_do_is_refused():
    with pytest.raises(ValueError, match="nothing to predict"):
        predict([], M2)
    with pytest.raises(ValueError, match="moves and computes nothing"):
        predict([Launch("empty", 0)], M2)


@pytest.mark.parametrize("graph", [PLAIN, FUSED], ids=lambda graph: graph.name)
def test_better_figures_are_never_slower(graph):
    def first_and_token(chip):
        first = roofline.first_token_seconds(CONFIG, graph, chip, text_tokens=24)
        return first, 1 / roofline.decode_tps(CONFIG, graph, chip, 300, 16)

    now = first_and_token(M2)
    for field in ("bandwidth", "flops"):
        old = getattr(M2, field)
        better = first_and_token(replace(M2, **{field: Figure(2 * old.value, old.publisher, old.url)}))
        assert all(new <= before for new, before in zip(better, now, strict=True))
        assert better != now


def test_decoding_slows_with_context_and_bits():
    speeds = [roofline.decode_tps(CONFIG, FUSED, M2, context, 16) for context in (300, 1024, 4096)]
    assert speeds == sorted(speeds, reverse=True) and speeds[0] > speeds[-1] > 0
    by_bits = [roofline.decode_tps(CONFIG, FUSED, M2, 300, bits) for bits in (16, 8, 4)]
    assert by_bits == sorted(by_bits) and by_bits[0] < by_bits[-1]


def test_each_graph_launches_and_moves_less_than_the_one_before():
    for launches in (tower_launches, lambda graph: decode_step(CONFIG.text_config, graph, 300)):
        counts = [(len(x), sum(y.device_bytes for y in x)) for x in map(launches, (MLX_VLM, PLAIN, FUSED))]
        assert counts[0][0] > counts[1][0] > counts[2][0]
        assert counts[0][1] >= counts[1][1] >= counts[2][1]


def test_attention_by_padding_computes_twice_and_unfused_writes_its_scores():
    tokens, heads, head_dim = 1024, 24, 32
    unfused, padded, own = (tower_attention(kind, tokens, heads, head_dim) for kind in ("unfused", "padded", "own"))
    products = 4 * heads * tokens**2 * head_dim
    assert sum(x.matmul_flops for x in unfused) == products
    assert sum(x.matmul_flops for x in padded) == 2 * products
    scores = heads * tokens**2 * 2
    assert sum(x.device_bytes for x in unfused) > 4 * scores
    assert sum(x.device_bytes for x in own) == 4 * tokens * heads * head_dim * 2
    with pytest.raises(ValueError, match="expected one of"):
        tower_attention("flash", tokens, heads, head_dim)


def test_every_figure_has_a_source():
    assert len(CHIPS) == 7
    for chip in CHIPS:
        figures = [chip.bandwidth, chip.flops, *([chip.accelerator_flops] if chip.accelerator_flops else [])]
        assert all(figure.value > 1e10 and figure.url.startswith("https://") for figure in figures)
    assert [chip.name for chip in CHIPS if chip.accelerator_flops] == ["M5 Max"]
    assert chip_named("apple m2 ultra").gpu_cores == 76
    with pytest.raises(BenchmarkError, match="'M9'; known: M1 Max, M2"):
        chip_named("M9")


def test_the_fit_hits_its_point_and_the_other_points_lie_where_the_page_says():
    fitted = [point for point in POINTS if point.fitted]
    assert len(fitted) == 1 and abs(fitted[0].error) < 0.005
    others = {point.what: point.error for point in POINTS if not point.fitted}
    assert all(abs(error) < 0.4 for error in others.values()), others
    assert sum(abs(error) < 0.1 for error in others.values()) >= 3, others


def test_the_pages_tables_are_the_models():
    page = (ROOT / "docs" / "performance-model.md").read_text(encoding="utf-8")
    assert fill(page, roofline.docs_blocks()) == page
    with pytest.raises(BenchmarkError, match="begin points"):
        fill(page.replace("<!-- begin points -->", ""), roofline.docs_blocks())


def test_command_calls_itself_a_prediction_everywhere(capsys):
    roofline.main(["--chip", "m4 max", "--model", "1.5b", "--resolution", "512"])
    *text, last = capsys.readouterr().out.strip().splitlines()
    result = json.loads(last)
    assert result["predicted"] is True and result["note"].startswith("PREDICTED by a model, not measured")
    assert result["model"] == "1.5b" and list(result["chips"]) == ["M4 Max"]
    tables = "\n".join(text).split("\n\n")[1:]
    assert tables[0].startswith("PREDICTED by a model, not measured") and "FastVLM-1.5B, 512 pixels" in tables[0]
    assert "M4 Max, PREDICTED by a model, not measured" in tables
    stages = result["chips"]["M4 Max"]["stages"]
    assert sum(stage["fused_s"] for stage in stages.values()) == pytest.approx(
        result["chips"]["M4 Max"]["first_token_s"]["fused"]
    )
    assert all(
        stage["fused_s"] > 0 and sum(stage["fused_shares"].values()) == pytest.approx(1) for stage in stages.values()
    )


def test_command_refuses_an_unknown_chip(capsys):
    with pytest.raises(SystemExit) as stopped:
        roofline.main(["--chip", "M9"])
    assert stopped.value.code == 1
    assert "No figures are known for a chip 'M9'" in capsys.readouterr().err
