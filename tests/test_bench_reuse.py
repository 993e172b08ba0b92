"""The second-question benchmark: what is timed, what is proven of an answer, and who takes part. No number is a result."""

import json
import sys
import time
from contextlib import ExitStack
from types import ModuleType, SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_fastvlm.benchmarks import exported_peers, peers, random_model, second_question, second_question_runners
from mlx_fastvlm.benchmarks.command import BenchmarkError
from mlx_fastvlm.benchmarks.peer_folders import TOWER_SIZES, export_to_mlx_vlm
from mlx_fastvlm.benchmarks.report import Summary
from mlx_fastvlm.benchmarks.runner_process import Unavailable
from mlx_fastvlm.benchmarks.runners import open_mlx_vlm
from mlx_fastvlm.benchmarks.second_question_runners import FIRST, FRESH, QUESTIONS, SECOND, Step, answerer, watch
from mlx_fastvlm.safetensors_file import SafetensorsFile
from tests.benchmark_output import result_of
from tests.conftest import GOLDEN

PICTURE = GOLDEN / "images" / "landscape.png"


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(peers, "_PAUSE_SECONDS", 0)


def test_a_second_question_runs_no_encoder_and_is_answered_as_from_scratch(capsys, converted_folder):
    result, table = result_of(
        second_question, capsys, converted_folder("inference"), "--image", PICTURE, "--repeat", 2, "--max-tokens", 4,
        "--peers",
    )  # fmt: skip
    ours = result["runners"]["ours"]
    assert ours["encoder_runs"] == {FIRST: 1, SECOND: 0, FRESH: 0}
    assert set(ours["from_scratch"]) == {SECOND, FRESH}
    for comparison in ours["from_scratch"].values():
        assert comparison["same_tokens"] and comparison["scores_differ_by"] < 1e-5
    assert "encode" in ours["stages_s"][FIRST]
    assert not {"decode", "resize", "encode", "project"} & {*ours["stages_s"][SECOND], *ours["stages_s"][FRESH]}
    assert 0 < ours["cached_tokens"][FRESH] < ours["cached_tokens"][SECOND] < ours["prompt_tokens"][SECOND]
    assert {name: len(tokens) for name, tokens in ours["tokens"].items()} == dict.fromkeys(QUESTIONS, 4)
    for question in (SECOND, FRESH):
        pairs = zip(ours["ttft_s"][question]["samples"], ours["ttft_s"][FIRST]["samples"], strict=True)
        assert ours["over_first"][question]["samples"] == pytest.approx([one / first for one, first in pairs])
    for question in QUESTIONS:
        stages = sum(summary["samples"][0] for summary in ours["stages_s"][question].values())
        assert 0 < stages <= ours["ttft_s"][question]["samples"][0]
    (row,) = [line for line in table.splitlines() if line.startswith("ours  ")]
    assert "1 0 0" in row and "yes yes" in row


class ScriptedSide:
    """Says what its script says; every conversation runs the encoder once, and opening one takes a while."""

    def __init__(self, script):
        self.script, self.runs, self.forgotten = script, 0, 0

    def encoder_runs(self):
        return self.runs

    def forget(self):
        self.forgotten += 1

    def open(self, image, max_tokens):
        self.runs += 1
        time.sleep(0.02)
        return lambda question: self._steps(question, "reused")

    def from_scratch(self, image, said, max_tokens):
        self.said = said
        return self._steps(said[-1], "scratch")

    def _steps(self, question, how):
        tokens, score = self.script[question, how]
        for token in tokens:
            yield Step(token, f"<{token}>", token == 0, 9, 4, mx.array([score, 2.0]))


def test_the_stopwatch_includes_the_opening_and_answers_are_compared_once():
    side = ScriptedSide(
        {
            ("one?", "reused"): ([1, 2, 0], 1.0),
            ("two?", "reused"): ([3, 4], 1.0),
            ("two?", "scratch"): ([3, 5], 1.5),
        }
    )
    answer = answerer(lambda options: side, {})
    request = {"image": "x.png", "first": "one?", "second": "two?", "max_tokens": 3}
    reply = json.loads(json.dumps(answer(**request)))
    asked = reply["questions"]
    assert asked[FIRST]["ttft"] >= 0.02 and asked[FRESH]["ttft"] >= 0.02 > asked[SECOND]["ttft"]
    assert [asked[question]["encoder_runs"] for question in QUESTIONS] == [1, 0, 1]
    assert (reply["tokens"], asked[FIRST]["text"]) == ([1, 2], "<1><2><0>")  # what ends an answer is none of it
    assert asked[SECOND]["scratch"] == {"same_tokens": False, "scores_differ_by": 0.25}
    assert side.said == ["two?"]  # the fresh one's, which was compared last
    assert side.forgotten == 1
    assert "scratch" not in answer(**request)["questions"][SECOND]
    assert side.forgotten == 2


def summary_of(second=0.1, runs=0, same=True):
    comparison = {"same_tokens": same, "scores_differ_by": 0.0}
    return {
        "over_first": {SECOND: Summary.of([second])},
        "encoder_runs": {SECOND: runs},
        "from_scratch": {SECOND: comparison},
    }


@pytest.mark.parametrize(
    ("changes", "within"), [({}, True), ({"second": 0.16}, False), ({"runs": 1}, False), ({"same": False}, False)]
)
def test_the_limit_takes_time_encoder_and_answer(changes, within):
    assert second_question.is_within_limit(summary_of(**changes)) is within


def test_rounds_are_summarized_as_they_were_asked():
    def answer(first, second):
        asked = {
            question: {
                "ttft": ttft, "ttft_cpu": 2 * ttft, "timings": None, "encoder_runs": 1, "prompt_tokens": 9,
                "cached_tokens": 0, "tokens": [1], "scratch": {"same_tokens": True, "scores_differ_by": 0.0},
            }
            for question, ttft in ((FIRST, first), (SECOND, second), (FRESH, second))
        }  # fmt: skip
        return {"questions": asked, "peak_rss": 10, "device_peak": 5}

    rounds = [{"ours": answer(9.0, 9.0)}, {"ours": answer(2.0, 1.0), "mlx-vlm": answer(4.0, 8.0)}]
    rounds.append({"ours": answer(4.0, 1.0)})
    result = second_question.summarize("ours", {"ready": "ours", "blas": "none"}, rounds)
    assert result["ttft_s"][FIRST].samples == (2.0, 4.0)  # the 9 of the first round is not counted
    assert result["over_first"][SECOND].samples == (0.5, 0.25)
    assert result["stages_s"][FIRST] is None
    assert result["blas"] == "none"
    assert second_question.summarize("mlx-vlm", {}, rounds)["over_first"][SECOND].samples == (2.0,)


def test_a_method_is_watched_on_one_module_only():
    watched_one, other = nn.Linear(2, 3), nn.Linear(2, 3)
    calls = watch(watched_one, "__call__")
    result = watched_one(mx.ones((1, 2)))
    other(mx.ones((1, 2)))
    assert calls.calls == 1
    assert calls.result is result
    assert type(other) is nn.Linear


def test_every_token_is_a_word_that_is_read_back():
    config = random_model.random_config("0.5b")
    tokenizer = random_model.word_processor(config).tokenizer
    ids = [1, 26, 27, 702, 703, 5000, 100000, config.text_config.vocab_size - 4]
    assert tokenizer.encode(tokenizer.decode(ids), add_special_tokens=False).ids == ids
    prompt = tokenizer.encode("<|im_start|>user\nWhat is it?<|im_end|>", add_special_tokens=False)
    assert len(prompt.ids) == 8  # two specials, four words, a line break, a question mark
    assert max(prompt.ids) < config.text_config.vocab_size


def test_words_are_tokens_of_ours_only_if_asked(capsys, converted_folder):
    tokens = {}
    for words in ([], ["--words"]):
        result, _ = result_of(
            second_question, capsys, converted_folder("inference"), "--image", PICTURE, "--repeat", 1, "--max-tokens",
            2, "--peers", *words,
        )  # fmt: skip
        ours = result["runners"]["ours"]
        tokens[bool(words)] = ours["prompt_tokens"][SECOND] - ours["cached_tokens"][SECOND]
        assert ours["from_scratch"][SECOND]["same_tokens"]
    assert tokens[True] == 24 < tokens[False]  # the question's words, the template around them, the answer's last token


def arguments(**changes):
    values = {"peers": [], "dtype": "float32", "device": "auto", "blas": "auto", "peer_python": sys.executable}
    return SimpleNamespace(**{**values, **changes})


def test_a_peer_that_cannot_run_is_named_and_one_of_ours_ends_it(converted_folder, monkeypatch, tmp_path):
    model, skipped = converted_folder("inference"), {}
    args = arguments(peers=["mlx-vlm"], peer_python=str(tmp_path / "no-python"))
    with ExitStack() as stack:
        runners = exported_peers.start_all(
            "second-question", ("ours",), model, tmp_path, stack, args, skipped, words=False
        )
        assert list(runners) == ["ours"]
    assert "cannot be started" in skipped["mlx-vlm"]

    def missing(name, python, options):
        raise Unavailable("not there")

    monkeypatch.setattr(exported_peers, "RunnerProcess", missing)
    with ExitStack() as stack, pytest.raises(BenchmarkError, match="not there"):
        exported_peers.start_all("second-question", ("ours",), model, tmp_path, stack, arguments(), {})


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_mlx_vlm_gets_our_weights_with_the_sizes_it_cannot_read(dtype, converted_folder, tmp_path):
    folder = export_to_mlx_vlm(converted_folder("inference"), tmp_path / "copy", dtype)
    config = json.loads((folder / "config.json").read_text())
    stored = SafetensorsFile(folder / "model.safetensors")
    stem = "model.vision_tower.vision_tower.model.patch_embed.0.reparam_conv.weight"
    assert stored.shape(stem)[0] == config[TOWER_SIZES]["embed_dims"][0]
    assert {stored.dtype(name) for name in stored.names()} - {"I64"} == {{"float32": "F32", "float16": "F16"}[dtype]}
    assert "vision_config" not in config  # which mlx-vlm would take for its own and refuse
    head = SafetensorsFile(folder / "clip-head.safetensors")
    (name,) = head.names()
    assert name.endswith(".head.proj")
    assert head.shape(name) == (config["mm_hidden_size"], 768)
    assert export_to_mlx_vlm(converted_folder("inference"), tmp_path / "copy", dtype) == folder
    assert [entry.name for entry in tmp_path.iterdir()] == ["copy"]


@pytest.fixture
def fake_mlx_vlm(monkeypatch):
    """A package that loads nothing, and answers any number of pictures with what it was asked."""
    package = ModuleType("mlx_vlm")
    package.load = lambda folder: (SimpleNamespace(config="config", vision_tower=nn.Linear(1, 1)), "processor")
    package.asked = []

    def batch_generate(model, processor, images, prompts, **options):
        package.asked.append((images, prompts, options))
        return SimpleNamespace(texts=[f"{image}!" for image in images])

    def stream_generate(model, processor, framed, images, **options):
        package.asked.append((framed, options))
        fields = {"token": 7, "text": "yes", "prompt_tokens": 5, "cached_tokens": 0, "logprobs": mx.ones(3)}
        yield SimpleNamespace(**fields, finish_reason=None)
        yield SimpleNamespace(**{**fields, "text": "."}, finish_reason="length")

    package.batch_generate, package.stream_generate = batch_generate, stream_generate
    parts = {
        "models.fastvlm.config": {"VisionConfig": type("VisionConfig", (), {"layers": [9], "embed_dims": [9]})},
        "prompt_utils": {"apply_chat_template": lambda processor, config, messages, num_images: messages},
        "vision_cache": {"VisionFeatureCache": type("VisionFeatureCache", (), {})},
        "generate": {"PromptCacheState": type("PromptCacheState", (), {})},
    }
    monkeypatch.setitem(sys.modules, "mlx_vlm", package)
    for name in ("models", "models.fastvlm"):
        monkeypatch.setitem(sys.modules, f"mlx_vlm.{name}", ModuleType(name))
    for name, content in parts.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, f"mlx_vlm.{name}", module)
    return package


def test_mlx_vlm_s_constants_are_set_to_the_tower_s_sizes(fake_mlx_vlm, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({TOWER_SIZES: {"layers": [1, 2], "embed_dims": [3, 4]}}))
    open_mlx_vlm(str(tmp_path))
    config = sys.modules["mlx_vlm.models.fastvlm.config"].VisionConfig
    assert (config.layers, config.embed_dims) == ([1, 2], [3, 4])


@pytest.mark.parametrize("marked", [False, True])
def test_mlx_vlm_is_asked_with_the_history_and_its_caches(marked, fake_mlx_vlm, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    side = second_question_runners.MlxVlmSide({"folder": str(tmp_path)}, marked)
    ask = side.open("x.png", 2)
    assert [(step.token, step.ends) for step in ask("one?")] == [(7, False), (7, True)]
    list(ask("two?"))
    (_, first), (history, second) = fake_mlx_vlm.asked
    assert first["vision_cache"] is second["vision_cache"]
    assert first["prompt_cache_state"] is second["prompt_cache_state"]
    texts = [part["text"] for message in history for part in message["content"] if part["type"] == "text"]
    assert texts == ["one?", "yes.", "two?"]
    assert [message["role"] for message in history] == ["user", "assistant", "user"]
    pictures = [part["type"] for message in history for part in message["content"]].count("image")
    assert (pictures, history[0]["content"][0]["type"] == "image") == (int(marked), marked)
    list(side.from_scratch("x.png", ["two?"], 2))
    assert "prompt_cache_state" not in fake_mlx_vlm.asked[-1][1]
