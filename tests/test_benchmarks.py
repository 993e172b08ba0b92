"""The benchmarks measure what they say, on tiny models: no number here is a result."""

import argparse
import errno
import io
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from mlx_fastvlm.benchmarks import child, cold_start, command, conversion, machine, peers, picture, report, ttft
from mlx_fastvlm.benchmarks.command import BenchmarkError
from mlx_fastvlm.benchmarks.runner_process import RunnerProcess
from tests.benchmark_output import result_of
from tests.conftest import GOLDEN

PICTURE = GOLDEN / "images" / "landscape.png"


def test_a_summary_keeps_median_spread_and_order():
    summary = report.Summary.of([3.0, 1.0, 2.0, 10.0])
    assert (summary.median, summary.low, summary.high) == (2.5, 1.0, 10.0)
    assert summary.to_dict()["samples"] == [3.0, 1.0, 2.0, 10.0]
    assert summary.cells(1e3) == ["2,500.0", "1,000.0-10,000.0"]
    with pytest.raises(ValueError, match="nothing"):
        report.Summary.of([])


def test_ratios_are_taken_round_by_round():
    assert report.ratios(report.Summary.of([2.0, 30.0]), report.Summary.of([1.0, 10.0])).samples == (2.0, 3.0)


@pytest.mark.parametrize(
    ("samples", "words"),
    [([2.0, 4.0, 3.0], "3.00 times less (2.00-4.00)"), ([0.5, 0.25], "3.00 times more (2.00-4.00)")],
)
def test_a_factor_says_its_direction(samples, words):
    assert report.as_factor(report.Summary.of(samples), "less", "more") == words


def test_results_are_plain_at_every_depth():
    values = {"a": {"b": report.Summary.of([1.0])}, "c": None}
    assert json.loads(json.dumps(report.plain(values)))["a"]["b"]["samples"] == [1.0]
    assert report.plain(values)["c"] is None


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


def test_cold_start_orders_its_times_and_finds_nothing_heavy(capsys, converted_folder):
    result, _ = result_of(
        cold_start, capsys, "--model", converted_folder("inference"), "--image", PICTURE, "--repeat", 1
    )
    assert 0 < result["bare_interpreter_s"]["median"] < result["first_character_s"]["median"]
    assert result["first_character_s"]["median"] <= result["exit_s"]["median"]
    assert result["heavy_modules"] == []


@pytest.mark.parametrize(
    ("code", "message"),
    [("print()", "said nothing"), ("import sys; print('A'); sys.exit('It is odd.')", "describe failed: It is odd.")],
)
def test_an_answer_that_is_none_has_no_time(code, message):
    with pytest.raises(BenchmarkError, match=message):
        cold_start.time_answer([sys.executable, "-c", code])


def test_an_import_costs_what_it_takes_beyond_the_interpreter(monkeypatch):
    seconds = iter([5.0, 1.0, 7.0, 2.0])
    monkeypatch.setattr(cold_start, "_time_python", lambda code: next(seconds))
    imports, bare = cold_start.import_times(2)
    assert (imports.samples, bare.samples) == ((4.0, 5.0), (1.0, 2.0))


def test_peak_memory_is_in_bytes():
    assert 20e6 < machine.peak_rss() < 100e9  # an interpreter with MLX


def test_conversion_reports_time_and_memory(capsys, hub_folder):
    result, _ = result_of(conversion, capsys, hub_folder("inference"))
    assert result["seconds"]["median"] > 0
    assert result["peak_rss_bytes"]["median"] > 10e6
    assert result["within_limit"] is True


def run_with(result, argv, capsys):
    """`command.run` on a benchmark that measures `result`; (exit code, the JSON line)."""
    parser = command.make_parser("example", "An example.")
    code = 0
    try:
        command.run("example", parser, lambda args: ("the table", result), argv)
    except SystemExit as end:
        code = end.code
    return code, json.loads(capsys.readouterr().out.splitlines()[-1])


def test_what_ctrl_c_cut_short_is_shown_but_not_saved(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, result = run_with({"value": 1, "interrupted": True}, ["--save"], capsys)
    assert (code, result["value"]) == (130, 1)
    assert not list(tmp_path.iterdir())
    code, result = run_with({"value": 2}, ["--save"], capsys)
    assert (code, result["value"]) == (0, 2)
    assert json.loads((tmp_path / "benchmarks" / "results" / "example.json").read_text()) == result
    assert result["machine"]["load_average_after"] >= 0


def test_a_result_that_could_not_be_saved_is_refused_before_anything_is_measured(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "benchmarks").touch()
    measured = []
    with pytest.raises(SystemExit) as end:
        command.run("example", command.make_parser("example", ""), measured.append, ["--save"])
    assert (end.value.code, measured) == (1, [])
    assert "takes no files" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["../up", "a/b", ".hidden", ""])
def test_a_result_s_name_is_no_path(name, capsys):
    with pytest.raises(SystemExit) as end:
        command.make_parser("example", "").parse_args(["--save", name])
    assert end.value.code == 1
    assert "expected a plain name" in capsys.readouterr().err


def test_a_result_that_could_not_be_saved_is_shown_all_the_same(capsys, tmp_path, monkeypatch):
    def full(path, value):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "save_json", full)
    with pytest.raises(SystemExit) as end:
        command.run("example", command.make_parser("example", ""), lambda args: ("table", {"value": 3}), ["--save"])
    out, err = capsys.readouterr()
    assert end.value.code == 1
    assert json.loads(out.splitlines()[-1])["value"] == 3
    assert "cannot be saved (No space left on device); the result is in the JSON line" in err


@pytest.mark.parametrize("text", ["0", "100", "-64", "x"])
def test_sizes_come_in_steps(text):
    assert command.positive_multiple_of(64)("192") == 192
    with pytest.raises((argparse.ArgumentTypeError, ValueError)):
        command.positive_multiple_of(64)(text)


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
        RunnerProcess("unheard-of", sys.executable, {"device": "auto", "blas": "auto"})
    refused = subprocess.run(child.code_command("import trap"), capture_output=True, text=True)
    assert "No module named 'trap'" in refused.stderr
    assert not (tmp_path / "has-run").exists()


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
