"""The benchmarks measure what they say, on tiny models: no number here is a result."""

import io
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from mlx_fastvlm.benchmarks import child, cold_start, conversion, peers, picture, report, runner, ttft
from mlx_fastvlm.benchmarks.command import BenchmarkError
from mlx_fastvlm.benchmarks.runner_process import RunnerProcess, Unavailable
from tests.conftest import GOLDEN

PICTURE = GOLDEN / "images" / "landscape.png"


def result_of(benchmark, capsys, *arguments):
    """Run a benchmark's main and read the JSON line that it prints last."""
    benchmark.main([str(argument) for argument in arguments])
    lines = capsys.readouterr().out.splitlines()
    return json.loads(lines[-1]), "\n".join(lines[:-1])


def test_a_summary_keeps_median_spread_and_order():
    summary = report.Summary.of([3.0, 1.0, 2.0, 10.0])
    assert (summary.median, summary.low, summary.high) == (2.5, 1.0, 10.0)
    assert summary.to_dict()["samples"] == [3.0, 1.0, 2.0, 10.0]
    assert summary.cells(1e3) == ["2,500.0", "1,000.0-10,000.0"]
    with pytest.raises(ValueError, match="nothing"):
        report.Summary.of([])


def test_ratios_are_taken_round_by_round():
    assert report.ratios(report.Summary.of([2.0, 30.0]), report.Summary.of([1.0, 10.0])).samples == (2.0, 3.0)


def test_a_table_lines_up():
    assert report.format_table(["what", "ms"], [["a", "1.0"], ["longer", "100.0"]]).splitlines() == [
        "what       ms",
        "------  -----",
        "a         1.0",
        "longer  100.0",
    ]


def test_saving_leaves_the_old_file_when_the_new_one_fails(tmp_path):
    path = tmp_path / "x.json"
    report.save_json(path, {"a": 1})
    with pytest.raises(TypeError):
        report.save_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [entry.name for entry in path.parent.iterdir()] == ["x.json"]


def test_the_generated_picture_is_a_png_of_what_was_drawn():
    pixels = picture.draw(65, 43)
    decoded = Image.open(io.BytesIO(picture.png_bytes(pixels)))
    assert decoded.format == "PNG"
    np.testing.assert_array_equal(np.asarray(decoded), pixels)
    np.testing.assert_array_equal(pixels, picture.draw(65, 43))


def test_the_stopwatch_sees_the_first_token_and_the_end(monkeypatch):
    clock, cpu_clock = iter([10.0, 12.0, 17.0]), iter([1.0, 4.0])
    monkeypatch.setattr(runner.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(runner.time, "process_time", lambda: next(cpu_clock))
    reply = runner.answer(lambda image, prompt, count: iter(range(count)), "x.png", "?", 3)
    assert (reply["ttft"], reply["ttft_cpu"], reply["seconds"], reply["tokens"]) == (2.0, 3.0, 7.0, [0, 1, 2])


@pytest.mark.parametrize(("one", "other", "common"), [([1, 2, 3], [1, 2, 4], 2), ([], [1], 0), ([1, 2], [1, 2], 2)])
def test_answers_are_compared_from_the_beginning(one, other, common):
    assert peers._common_start(one, other) == common


def test_ttft_stages_make_up_the_total(capsys, converted_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result, table = result_of(
        ttft, capsys, "--model", converted_folder("inference"), "--image", PICTURE, "--repeat", 1, "--max-tokens", 4,
        "--save",
    )  # fmt: skip
    times = {name: summary["median"] for name, summary in result["times_s"].items()}
    assert sum(times[stage] for stage in ttft.STAGES) == pytest.approx(times["ttft"], rel=0.05)
    assert times["encode + project + prefill"] == times["encode"] + times["project"] + times["prefill"]
    assert result["generation_tokens"] == 4
    assert result["decode_tps"]["median"] > 0
    assert result["peak_rss_bytes"] >= result["loaded_rss_bytes"] > result["weight_bytes"] > 0
    assert "ttft" in table
    assert json.loads((tmp_path / "benchmarks" / "results" / "ttft.json").read_text()) == result


def test_cold_start_orders_its_times_and_finds_nothing_heavy(capsys, converted_folder):
    result, _ = result_of(
        cold_start, capsys, "--model", converted_folder("inference"), "--image", PICTURE, "--repeat", 1
    )
    assert 0 < result["bare_interpreter_s"]["median"] < result["first_character_s"]["median"]
    assert result["first_character_s"]["median"] <= result["exit_s"]["median"]
    assert result["heavy_modules"] == []


def test_conversion_reports_time_and_memory(capsys, hub_folder):
    result, _ = result_of(conversion, capsys, hub_folder("inference"))
    assert result["seconds"]["median"] > 0
    assert result["peak_rss_bytes"]["median"] > 10e6
    assert result["within_limit"] is True


def test_peers_runs_with_ours_alone(capsys, hub_folder):
    result, table = result_of(
        peers, capsys, hub_folder("inference"), "--image", PICTURE, "--repeat", 1, "--max-tokens", 5, "--peers"
    )
    ours = result["runners"]["ours"]
    assert len(ours["tokens"]) == 5
    assert 0 < ours["ttft_s"]["median"] < ours["start_s"] + 60
    assert ours["ttft_over_ours"]["median"] == 1.0
    assert "all 5" in table


def test_children_import_nothing_of_the_current_folder(tmp_path, monkeypatch):
    for name in ("json", "runpy", "random", "mlx", "trap"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'has-run')!r}, 'w').close()")
    monkeypatch.chdir(tmp_path)
    command = child.module_command("json.tool", "--indent", "1")  # in the standard library, not the one here
    done = subprocess.run(command, input="[1]", capture_output=True, text=True, check=True)
    assert done.stdout == "[\n 1\n]\n"
    assert ttft.resolve_aside("demo").name == "demo"
    assert cold_start.import_times(1)[1].median > 0
    with pytest.raises(BenchmarkError, match="The unheard-of runner broke: KeyError"):
        RunnerProcess("unheard-of", tmp_path, sys.executable, "auto")
    refused = subprocess.run(child.code_command("import trap"), capture_output=True, text=True)
    assert "No module named 'trap'" in refused.stderr
    assert not (tmp_path / "has-run").exists()


def test_a_peer_that_is_not_there_is_named_with_the_reason(tmp_path):
    with pytest.raises(Unavailable, match="cannot be started"):
        RunnerProcess("mlx-vlm", tmp_path, str(tmp_path / "no-python"), "auto")


def test_a_runner_that_breaks_is_one_line(tmp_path):
    with pytest.raises(BenchmarkError, match="The unheard-of runner broke: KeyError"):
        RunnerProcess("unheard-of", tmp_path, sys.executable, "auto")


@pytest.mark.parametrize(
    ("benchmark", "arguments", "message"),
    [
        (ttft, ["--model", "nowhere"], "nowhere"),
        (ttft, ["--image", "nowhere.png", "--model", "{model}"], "There is no file nowhere.png"),
        (
            cold_start,
            ["--image", "{picture}", "--model", "nowhere"],
            "describe failed: mlx-fastvlm: There is no folder",
        ),
        (conversion, ["nowhere"], "nowhere is not a folder"),
        (conversion, ["{model}"], "converted already"),
        (peers, ["nowhere"], "nowhere is not a folder"),
    ],
)
def test_what_the_user_can_mend_is_one_line(benchmark, arguments, message, capsys, converted_folder):
    values = {"model": converted_folder("inference"), "picture": PICTURE}
    with pytest.raises(SystemExit) as stop:
        benchmark.main([argument.format(**values) for argument in arguments])
    assert stop.value.code == 1
    assert message in capsys.readouterr().err.splitlines()[-1]
