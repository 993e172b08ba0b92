"""Our models in lmms-eval: one small local task through the whole harness, and what it hands to a model."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("lmms_eval", reason="the extra eval is not installed")

from lmms_eval import evaluator
from lmms_eval.tasks import TaskManager

from mlx_fastvlm import generate, load
from mlx_fastvlm.errors import OptionError
from mlx_fastvlm.evaluation.lmms_adapter import MlxFastVlm, _options, _pictures
from tests.demo_pictures import draw

QUESTIONS = ("what color is the shape?", "Describe this image.", "is there a circle?")

TASK = """\
task: tiny_local
dataset_path: json
dataset_kwargs: {data_files: {test: QUESTIONS}}
test_split: test
output_type: generate_until
doc_to_visual: !function tiny.pictures
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {max_new_tokens: 32, temperature: 0, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
PICTURES = """\
from PIL import Image


def pictures(doc):
    return [Image.open(doc["image"]).convert("RGB")]
"""


@pytest.fixture(scope="module")
def demo():
    return load("demo")


@pytest.fixture
def documents(tmp_path, demo):
    """Six questions with the answers that the model gives, but for the first."""
    documents = []
    for number in range(6):
        picture = tmp_path / f"{number // 2}.png"
        draw(picture, number // 2)
        question = QUESTIONS[number % len(QUESTIONS)]
        right = generate(*demo, question, image=str(picture), max_tokens=32).strip()
        documents.append({"image": str(picture), "question": question, "answer": right if number else "not this"})
    return documents


@pytest.fixture
def tasks(tmp_path, documents):
    """A folder with a task of these questions."""
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps(document) + "\n" for document in documents))
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "tiny.yaml").write_text(TASK.replace("QUESTIONS", str(questions)))
    (folder / "tiny.py").write_text(PICTURES)
    return folder


def test_a_local_task_runs_through_the_harness(tasks, documents, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    found = evaluator.simple_evaluate(
        model="mlx_fastvlm",
        model_args="pretrained=demo",
        tasks=["tiny_local"],
        task_manager=TaskManager(include_path=str(tasks)),
        batch_size=4,
        log_samples=True,
    )
    assert found["results"]["tiny_local"]["exact_match,none"] == pytest.approx(5 / 6)
    answers = {sample["doc_id"]: sample["filtered_resps"][0] for sample in found["samples"]["tiny_local"]}
    assert answers[1] == documents[1]["answer"]


def test_the_command_knows_the_model(tasks, tmp_path):
    """By the entry point of the installed package."""
    command = [sys.executable, "-m", "lmms_eval", "--model", "mlx_fastvlm", "--model_args", "pretrained=demo"]
    command += ["--tasks", "tiny_local", "--include_path", tasks, "--output_path", tmp_path / "results"]
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "datasets"), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    (result,) = (tmp_path / "results").rglob("*_results.json")
    found = json.loads(result.read_text())["results"]["tiny_local"]
    assert found["exact_match,none"] == pytest.approx(5 / 6)


def test_generation_settings_become_options():
    assert _options({}) == {"max_tokens": 1024, "temp": 0.0, "top_p": 1.0, "stop": []}
    given = {"max_new_tokens": 16, "temperature": 0.7, "top_p": None, "num_beams": 1, "until": "\n\n"}
    assert _options(given) == {"max_tokens": 16, "temp": 0.7, "top_p": 1.0, "stop": ["\n\n"]}
    assert _options(given | {"do_sample": False})["temp"] == 0.0


def test_what_is_no_picture_is_refused():
    with pytest.raises(OptionError, match="tiny, document 3 shows str; FastVLM takes pictures only"):
        list(_pictures(["clip.mp4"], "tiny, document 3"))


def test_what_cannot_be_had_is_said():
    with pytest.raises(NotImplementedError, match="generate_until only"):
        MlxFastVlm("demo").loglikelihood([])
