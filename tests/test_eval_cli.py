"""`mlx-fastvlm eval`: a task, a comparison and a sweep from the command line, and what is refused."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlx_fastvlm import generate
from mlx_fastvlm.cli.eval import evaluation
from mlx_fastvlm.errors import FastVLMError, OptionError
from mlx_fastvlm.evaluation.comparison import compare_runs, format_comparison
from mlx_fastvlm.evaluation.run_file import Row, RunFile, Settings, read_run
from mlx_fastvlm.evaluation.tasks import TASKS
from mlx_fastvlm.loading import load
from tests import eval_sets


@pytest.fixture(scope="module")
def demo():
    return load("demo")


@pytest.fixture
def run(capsys, monkeypatch, tmp_path, demo):
    """Run the command in this process with a demo model that is loaded once: arguments → stdout."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mlx_fastvlm.cli.eval.load_model", lambda *args: demo)

    def run_command(*arguments):
        evaluation(list(map(str, arguments)), prog_name="mlx-fastvlm eval", standalone_mode=False)
        return capsys.readouterr().out

    return run_command


@pytest.fixture
def easy_vqa(tmp_path):
    eval_sets.easy_vqa(tmp_path / "set")
    return tmp_path / "set"


def test_help_lists_all_tasks_and_their_files(run):
    listed = run("--help")
    assert all(name in listed for name in TASKS)
    for task in TASKS.values():
        explained = "".join(run(task.name, "--help").split())
        assert "".join(f"{task.title}: {task.metric}. Files: {task.files}".split()) in explained


def test_a_task(run, easy_vqa, tmp_path):
    printed = run("easy-vqa", "demo", "--data", easy_vqa, "--json", "result.json")
    assert printed.startswith("easy-VQA test: demo (max_tokens 128)\n") and "answer: yes or no" in printed
    assert printed.endswith("Answers: easy-vqa-demo.jsonl\n")
    settings, rows = read_run(Path("easy-vqa-demo.jsonl"))
    assert (settings.task, settings.model, len(rows)) == ("easy-vqa", "demo", 9)
    result = json.loads(Path("result.json").read_text())
    assert result["score"]["questions"] == 9
    assert result["score"]["mean"]["value"] == sum(row.score for row in rows.values()) / 9
    assert run("easy-vqa", "demo", "--data", easy_vqa) == printed  # nothing is asked again


def test_options_reach_the_answers(run, easy_vqa):
    run(
        "easy-vqa", "demo", "--data", easy_vqa, "--out", "o.jsonl", "--limit", 2, "--max-tokens", 1, "--fit", "crop",
        "--template", r"{question}\nReally?", "--system", "Be brief.", "--batch-size", 1,
    )  # fmt: skip
    settings, rows = read_run(Path("o.jsonl"))
    assert settings.template == "{question}\nReally?"
    assert settings.options == {"max_tokens": 1, "fit": "crop", "system": "Be brief."}
    assert [row.tokens for row in rows.values()] == [1, 1]


@pytest.mark.filterwarnings("ignore::mlx_fastvlm.errors.FastVLMWarning")
def test_answers_about_tiles_are_those_of_generate(run, easy_vqa, demo):
    run("easy-vqa", "demo", "--data", easy_vqa, "--out", "o.jsonl", "--fit", "tiles", "--resolution", 128)
    _, rows = read_run(Path("o.jsonl"))
    assert len(rows) == 9
    for row in rows.values():
        image = easy_vqa / row.image
        expected = generate(*demo, row.question, image=image, fit="tiles", resolution=128, max_tokens=128)
        assert row.answer == expected.strip()


def test_every_task_can_be_run(run, tmp_path):
    for name, write in eval_sets.SETS.items():
        write(tmp_path / name)
        printed = run(name, "demo", "--data", tmp_path / name, "--max-tokens", 2)
        assert printed.startswith(TASKS[name].title) and TASKS[name].metric in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["textvqa", "demo"], "TextVQA validation needs --data"),
        (["easy-vqa", "demo", "--data", "nowhere"], "There is no folder nowhere"),
        (["easy-vqa", "./no-model", "--data", "set"], "no-model"),
        (["easy-vqa", "demo", "--data", "set", "--json", "gone/x.json"], "gone is not a folder"),
        (["easy-vqa", "demo", "--data", "set", "--out", "gone/x.jsonl"], "gone/x.jsonl cannot be written"),
        (["sweep", "nope", "demo"], "There is no task nope"),
        (["sweep", "easy-vqa", "demo", "demo", "--data", "set"], "The model demo is given twice"),
        (
            ["sweep", "easy-vqa", "demo", "--data", "set", "--resolutions", "256,256"],
            "The resolution 256 is given twice",
        ),
        (
            ["sweep", "easy-vqa", "demo", "--data", "set", "--resolutions", "auto,auto:set/auto.json"],
            "The resolution auto is given twice",
        ),
        (
            ["sweep", "easy-vqa", "demo", "--data", "set", "--resolutions", "big"],
            "The resolution is 'big'; expected a number",
        ),
        (["sweep", "easy-vqa", "demo", "--data", "set", "--plot", "x.pdf"], "x.pdf does not end in .png"),
        (["compare", "set/a.jsonl", "set/b.jsonl"], "set/a.jsonl cannot be read"),
    ],
)
def test_what_cannot_be_done_is_one_line(arguments, message, run, easy_vqa):
    (easy_vqa / "auto.json").write_text('{"trained": 256, "steps": []}')
    with pytest.raises(FastVLMError, match=message) as error:
        run(*arguments)
    assert "\n" not in str(error.value)


def write_run(path, scores, task="gqa", data="d", model="demo", **options):
    with RunFile(path, Settings(task, data, model, "w", "{question}", {"max_tokens": 8} | options)) as file:
        for name, score in scores.items():
            file.add(Row(name, "Q", None, ("a",), {}, "a", score, 1, "stop", {}))


def test_two_runs_of_right_and_wrong_answers(run, tmp_path):
    write_run(Path("a.jsonl"), {str(n): float(n < 10) for n in range(40)})
    write_run(Path("b.jsonl"), {str(n): float(0 < n < 20) for n in range(38)} | {"x": 1.0}, model="other")
    found = compare_runs(Path("a.jsonl"), Path("b.jsonl"))
    assert (found.questions, found.left_out, found.better, found.worse) == (38, 3, 10, 1)
    assert found.p_value == pytest.approx(2 * (1 + 11) / 2**11) and found.test == "McNemar's test, exact"
    assert found.difference.value == pytest.approx(9 / 38)
    printed = run("compare", "a.jsonl", "b.jsonl", "--json", "c.json")
    assert printed == format_comparison(found) + "\n"
    assert "GQA balanced test-dev, 38 questions; 3 that only one has are left out" in printed
    assert "does better at 10 questions and worse at 1: more than chance explains (p = 0.012, McNemar's" in printed
    assert json.loads(Path("c.json").read_text())["p_value"] == found.p_value


def test_two_runs_of_partly_right_answers(tmp_path):
    scores = {str(n): (n % 4) * 0.3 for n in range(40)}
    write_run(tmp_path / "a.jsonl", scores, task="textvqa")
    write_run(tmp_path / "b.jsonl", scores, task="textvqa", resolution=512)
    found = compare_runs(tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    assert (found.p_value, found.test, found.better, found.worse) == (1.0, "paired permutation test", 0, 0)
    assert "no more than chance may explain" in format_comparison(found)
    write_run(tmp_path / "c.jsonl", {name: score / 2 for name, score in scores.items()}, task="textvqa")
    found = compare_runs(tmp_path / "a.jsonl", tmp_path / "c.jsonl")
    assert found.p_value < 0.001 and found.difference.value == pytest.approx(-0.225)
    assert found.difference.low < -0.225 < found.difference.high < 0


def test_runs_about_other_questions_are_not_compared(tmp_path):
    write_run(tmp_path / "a.jsonl", {"1": 1.0})
    for name, changed in (("b", {"task": "pope"}), ("c", {"data": "other"})):
        write_run(tmp_path / f"{name}.jsonl", {"1": 1.0}, **changed)
        with pytest.raises(OptionError, match="only answers to the same questions can be compared"):
            compare_runs(tmp_path / "a.jsonl", tmp_path / f"{name}.jsonl")
    write_run(tmp_path / "d.jsonl", {"2": 1.0})
    with pytest.raises(OptionError, match="no question in common"):
        compare_runs(tmp_path / "a.jsonl", tmp_path / "d.jsonl")


@pytest.mark.filterwarnings("ignore:This model was trained")
def test_a_sweep(run, easy_vqa):
    arguments = ["sweep", "easy-vqa", "demo", "--data", easy_vqa, "--resolutions", "256,320", "--max-tokens", 4]
    printed = run(*arguments, "--json", "sweep.json")
    rows = [line.split() for line in printed.splitlines() if line.startswith("demo ")]
    assert [row[:2] for row in rows] == [["demo", "256"], ["demo", "320"]]
    runs = json.loads(Path("sweep.json").read_text())["runs"]
    assert [each["settings"]["options"]["resolution"] for each in runs] == [256, 320]
    assert all(each["speed"]["ttft_s"] > each["speed"]["encode_s"] > 0 for each in runs)
    assert sorted(os.listdir("sweep")) == ["easy-vqa-demo-256.jsonl", "easy-vqa-demo-320.jsonl"]
    pytest.importorskip("matplotlib")
    run(*arguments, "--plot", "sweep.png")  # nothing is asked again
    assert Path("sweep.png").read_bytes().startswith(b"\x89PNG")


def test_ctrl_c_leaves_a_file_that_the_same_command_goes_on_with(easy_vqa, tmp_path):
    eval_sets.easy_vqa(easy_vqa, pictures=15)
    command = [sys.executable, "-c", "from mlx_fastvlm.cli.eval import evaluation; evaluation()"]
    command += ["easy-vqa", "demo", "--data", str(easy_vqa), "--out", "o.jsonl", "--batch-size", "2"]
    out = tmp_path / "o.jsonl"
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 120
    while not (out.exists() and out.read_bytes().count(b"\n") > 3) and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert "The answers so far are in o.jsonl; the same command goes on from there." in said
    before = out.read_bytes()
    assert 3 < before.count(b"\n") < 46 and before.endswith(b"\n")
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=300).returncode == 0
    assert out.read_bytes().startswith(before) and out.read_bytes().count(b"\n") == 46
