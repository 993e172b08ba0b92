"""Runs of an evaluation: the answers are generate's, nothing is asked twice, and whatever ends a run it goes on."""

import dataclasses
import json

import pytest
from PIL import Image

from mlx_fastvlm import generate, load
from mlx_fastvlm.errors import ImageError, OptionError
from mlx_fastvlm.evaluation.answering import Prompt, answer_prompts
from mlx_fastvlm.evaluation.result import format_result, make_result
from mlx_fastvlm.evaluation.run import Subject, evaluate, model_name, select
from mlx_fastvlm.evaluation.run_file import Row, RunFile, Settings, read_run
from mlx_fastvlm.evaluation.tasks import find_task
from mlx_fastvlm.loading import resolve_model
from mlx_fastvlm.options import GenerationOptions
from tests import eval_sets
from tests.demo_pictures import draw

EASY = find_task("easy-vqa")


@pytest.fixture(scope="module")
def demo():
    return load("demo")


@pytest.fixture
def subject(demo):
    return Subject("demo", resolve_model("demo"), load_model=lambda folder, dtype: demo)


@pytest.fixture
def selection(tmp_path):
    eval_sets.easy_vqa(tmp_path / "set")
    return select(EASY, tmp_path / "set")


def lines(path):
    """The lines of a run's file without times, which differ from run to run."""
    values = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "timings"} for line in values]


@pytest.mark.filterwarnings("ignore:FastVLM was trained on one image")
def test_answers_are_those_of_generate_in_order(demo, tmp_path):
    pictures = [tmp_path / f"{number}.png" for number in range(3)]
    for number, picture in enumerate(pictures):
        draw(picture, number)
    asked = [
        (question, images)
        for images in ([pictures[0]], [pictures[1]], [], [pictures[2]], [pictures[0]])
        for question in ("Describe this image.", "what color is the shape?", "is there a circle?")
    ]
    asked.append(("What differs?", pictures[:2]))
    options = GenerationOptions(max_tokens=12)
    prompts = [Prompt(question, question, [str(image) for image in images], options) for question, images in asked]
    expected = [
        generate(*demo, prompt.text, image=list(prompt.images) or None, max_tokens=12).strip() for prompt in prompts
    ]
    for batch_size in (1, 4):
        assert [reply.text for reply in answer_prompts(*demo, iter(prompts), batch_size)] == expected


@pytest.mark.filterwarnings("ignore:This model was trained mainly on square images")
def test_beginnings_that_differ_in_length_or_words_do_not_mix(demo, tmp_path):
    draw(tmp_path / "square.png", 1)
    with Image.open(tmp_path / "square.png") as picture:
        picture.crop((0, 0, picture.width, picture.height // 2)).save(tmp_path / "wide.png")
    asked = [
        Prompt(text, text, [str(tmp_path / f"{name}.png")], GenerationOptions(max_tokens=6, fit=fit))
        for name, fit in (("square", "native"), ("wide", "native"), ("wide", "pad"))
        for text in ("what color is it?", "what is it?", "is it red?\n<image>", "is it blue?\n<image>")
    ]
    expected = [
        generate(*demo, prompt.text, image=prompt.images[0], max_tokens=6, fit=prompt.options.fit).strip()
        for prompt in asked
    ]
    assert [reply.text for reply in answer_prompts(*demo, asked, 8)] == expected


def test_each_picture_is_encoded_once(subject, selection, tmp_path):
    evaluate(selection, subject, tmp_path / "run.jsonl", max_tokens=2)
    rows = list(read_run(tmp_path / "run.jsonl")[1].values())
    assert ["encode" in row.timings for row in rows] == [True, False, False] * 3
    stages = ["recognize", "tokenize", "decode", "resize", "encode", "project", "prefill"]
    assert [list(row.timings) for row in rows] == [stages, [], []] * 3


def test_a_run_that_is_interrupted_goes_on_where_it_was(subject, selection, tmp_path):
    whole = evaluate(selection, subject, tmp_path / "whole.jsonl")
    seen = []

    def interrupt(done, total, mean):
        seen.append((done, total))
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(selection, subject, tmp_path / "cut.jsonl", on_answer=interrupt)
    assert seen == [(done, 9) for done in range(5)]
    assert lines(tmp_path / "cut.jsonl") == lines(tmp_path / "whole.jsonl")[:5]  # with the header
    steps = []
    result = evaluate(selection, subject, tmp_path / "cut.jsonl", on_answer=lambda *step: steps.append(step))
    assert [step[:2] for step in steps] == [(done, 5) for done in range(6)]
    assert steps[-1][2] == pytest.approx(whole.score.mean.value)  # earlier answers count into the mean
    assert lines(tmp_path / "cut.jsonl") == lines(tmp_path / "whole.jsonl")
    assert result.score == whole.score and result.groups == whole.groups


def test_a_finished_run_needs_no_model(selection, subject, tmp_path):
    result = evaluate(selection, subject, tmp_path / "run.jsonl")

    def refuse(*args):
        raise AssertionError("the model was loaded")

    idle = Subject("demo", resolve_model("demo"), load_model=refuse)
    assert evaluate(selection, idle, tmp_path / "run.jsonl").to_dict() == result.to_dict()


def test_more_questions_of_the_set_go_into_the_same_file(subject, tmp_path):
    eval_sets.easy_vqa(tmp_path / "set")
    out = tmp_path / "run.jsonl"
    assert evaluate(select(EASY, tmp_path / "set", limit=4), subject, out).score.questions == 4
    assert evaluate(select(EASY, tmp_path / "set"), subject, out).score.questions == 9
    assert evaluate(select(EASY, tmp_path / "set", limit=2), subject, out).score.questions == 2
    assert len(lines(out)) == 10


def test_a_line_torn_at_any_byte_is_cut_off(selection, tmp_path):
    path = tmp_path / "run.jsonl"
    settings = Settings("easy-vqa", "d", "demo", "w", "{question}", {"max_tokens": 8})
    rows = [_row(str(number)) for number in range(3)]
    with RunFile(path, settings) as file:
        for row in rows:
            file.add(row)
    content = path.read_bytes()
    ends = [index + 1 for index, byte in enumerate(content) if byte == ord("\n")]
    for length in range(len(content) + 1):
        path.write_bytes(content[:length])
        kept = max(sum(end <= length for end in ends) - 1, 0)
        with RunFile(path, settings) as file:
            assert list(file.rows.values()) == rows[:kept]
            for row in rows[kept:]:
                file.add(row)
        assert path.read_bytes() == content


def _row(name, score=1.0, **changes):
    row = Row(name, "Q", "a.png", ("é",), {"kind": ("a", "b")}, "é", score, 2, "stop", {"prefill": 0.5})
    return dataclasses.replace(row, **changes)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"max_tokens": 9}, "answers made with --max-tokens 8"),
        ({"resolution": 320}, "answers made with --max-tokens 8"),
        ({"template": "{question} "}, 'answers made with the template "{question}"'),
    ],
)
def test_other_settings_do_not_mix(changed, message, subject, selection, tmp_path):
    out = tmp_path / "run.jsonl"
    evaluate(selection, subject, out, max_tokens=8)
    before = out.read_bytes()
    with pytest.raises(OptionError, match=message):
        evaluate(selection, subject, out, **({"max_tokens": 8} | changed))
    assert out.read_bytes() == before


def test_other_questions_and_other_models_do_not_mix(subject, selection, tmp_path):
    out = tmp_path / "run.jsonl"
    evaluate(selection, subject, out, max_tokens=2)
    with pytest.raises(
        OptionError, match="other questions or other right answers: use the same, or give another --out"
    ):
        evaluate(dataclasses.replace(selection, data="x"), subject, out, max_tokens=2)
    other = Subject("other", resolve_model("demo"))
    with pytest.raises(OptionError, match="the model demo"):
        evaluate(selection, other, out, max_tokens=2)
    with (
        RunFile(out, dataclasses.replace(read_run(out)[0])),
        pytest.raises(OptionError, match="written by another run"),
    ):
        evaluate(selection, subject, out, max_tokens=2)


@pytest.mark.parametrize(
    "content", [b"hello\n", b"{}\n", b'{"path": "a.png"}\n', b'{"mlx_fastvlm_eval": 2}\n', b"half"]
)
def test_a_file_of_something_else_is_left_alone(content, subject, selection, tmp_path):
    out = tmp_path / "notes.jsonl"
    out.write_bytes(content)
    with pytest.raises(OptionError, match="notes.jsonl"):
        evaluate(selection, subject, out)
    assert out.read_bytes() == content


def test_a_damaged_answer_is_named_with_its_line(selection, subject, tmp_path):
    out = tmp_path / "run.jsonl"
    evaluate(selection, subject, out, max_tokens=2)
    good = out.read_text().splitlines(keepends=True)
    out.write_text("".join([*good[:3], '{"id": "9"}\n', *good[3:]]))
    with pytest.raises(OptionError, match="run.jsonl, line 4 is not an answer of an evaluation"):
        read_run(out)
    out.write_text("".join([*good[:3], "oops\n", *good[3:]]))
    with pytest.raises(OptionError, match="run.jsonl, line 4 is no JSON object"):
        read_run(out)


def test_a_damaged_picture_ends_the_run_with_the_question_named(subject, selection, tmp_path):
    (tmp_path / "set" / "test" / "images" / "1.png").write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"Question 4: .*1\.png"):
        evaluate(selection, subject, tmp_path / "run.jsonl", batch_size=1)
    ids = [line["id"] for line in lines(tmp_path / "run.jsonl")[1:]]
    assert ids and ids == ["1", "2", "3"][: len(ids)]
    draw(tmp_path / "set" / "test" / "images" / "1.png", 1)
    assert evaluate(selection, subject, tmp_path / "run.jsonl").score.questions == len(selection.questions)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"template": "Say yes."}, "The template has no {question} in it"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"resolution": 300}, "The resolution is 300"),
    ],
)
def test_options_out_of_range(options, message, subject, selection, tmp_path):
    with pytest.raises(OptionError, match=message):
        evaluate(selection, subject, tmp_path / "run.jsonl", **options)
    assert not (tmp_path / "run.jsonl").exists()


def test_the_template_is_what_is_asked(demo, subject, selection, tmp_path):
    evaluate(selection, subject, tmp_path / "run.jsonl", template="Describe this image.{question}"[:20] + "{question}")
    row = read_run(tmp_path / "run.jsonl")[1]["1"]
    asked = f"Describe this image.{row.question}"
    assert row.answer == generate(*demo, asked, image=row.image, max_tokens=128).strip()


def test_a_result_counts_a_question_in_each_of_its_groups():
    rows = [
        _row("1", score=0.5, groups={"kind": ("a", "b")}, finish_reason="length"),
        _row("2", score=1.0, groups={"kind": ("b",)}, timings={"encode": 1.0, "project": 0.5, "prefill": 2.0}),
        _row("3", score=0.0, groups={}, timings={"encode": 3.0, "project": 0.5, "prefill": 4.0}),
    ]
    settings = Settings("docvqa", "d", "demo", "w", "{question}", {"max_tokens": 8, "resolution": 512})
    result = make_result(find_task("docvqa"), settings, rows)
    assert result.score.mean.value == 0.5 and result.cut == 1
    kinds = result.groups["kind"]
    assert [(kinds[name].questions, kinds[name].mean.value) for name in "ab"] == [(1, 0.5), (2, 0.75)]
    assert (result.speed.pictures, result.speed.encode_s, result.speed.ttft_s) == (1, 3.5, 7.5)  # not the first
    text = format_result(result)
    assert "DocVQA (single page) validation: demo (max_tokens 8, resolution 512)" in text
    assert "kind: b" in text and "75.00%" in text and "1 answers were cut" in text
    assert json.loads(json.dumps(result.to_dict()))["score"]["questions"] == 3


def test_a_models_name_is_never_a_path(tmp_path):
    (tmp_path / "my-model").mkdir()
    assert model_name(str(tmp_path / "my-model")) == "my-model"
    assert model_name(f"{tmp_path}/my-model/") == "my-model"
    assert (model_name("apple/FastVLM-0.5B"), model_name("demo")) == ("FastVLM-0.5B", "demo")


def test_the_demo_knows_easy_vqa(subject, tmp_path):
    """Of all 9,673 questions it answers 99.62% rightly (benchmarks/results/quantization.json); these are the first."""
    pytest.importorskip("easy_vqa")
    result = evaluate(select(EASY, None, limit=200), subject, tmp_path / "run.jsonl")
    assert result.score.mean.value >= 0.99 and result.cut == 0
