"""The official files of every task: what is read of them, and what is said of those that are damaged or missing."""

import json
from pathlib import Path

import pytest

from mlx_fastvlm.errors import OptionError
from mlx_fastvlm.evaluation.annotations import check_questions
from mlx_fastvlm.evaluation.run import select
from mlx_fastvlm.evaluation.tasks import TASKS, find_task
from tests import eval_sets


def read(name, folder, images=None):
    return find_task(name).read(folder, images)


@pytest.mark.parametrize("name", TASKS)
def test_every_task_reads_its_official_files(name, tmp_path):
    eval_sets.SETS[name](tmp_path)
    questions = read(name, tmp_path)
    check_questions(questions)
    assert len({question.id for question in questions}) == len(questions) >= 1
    assert "{question}" in TASKS[name].template


def test_vqav2(tmp_path):
    eval_sets.vqav2(tmp_path)
    (question,) = read("vqav2", tmp_path)
    assert (question.id, question.text) == ("42000", "Is it red?")
    assert question.answers == ("yes",) * 7 + ("no",) * 3
    assert question.groups == {"answer type": ("yes/no",)}
    assert question.image == tmp_path / "val2014" / "COCO_val2014_000000000042.jpg"


def test_docvqa_finds_pictures_whatever_their_folder_is_called(tmp_path):
    eval_sets.docvqa(tmp_path)
    (question,) = read("docvqa", tmp_path)
    assert question.image == tmp_path / "spdocvqa_images" / "pybv0228_81.png"
    assert question.groups == {"question type": ("handwritten", "form")}
    assert question.answers == ("1/8/93", "January 8")
    (tmp_path / "spdocvqa_images").rename(tmp_path / "elsewhere")
    with pytest.raises(OptionError, match="has no spdocvqa_images or documents"):
        read("docvqa", tmp_path)
    (question,) = read("docvqa", tmp_path, tmp_path / "elsewhere")
    assert question.image.is_file()


def test_infovqa_leaves_out_empty_groups(tmp_path):
    eval_sets.infovqa(tmp_path)
    assert read("infovqa", tmp_path)[0].groups == {"answer type": ("single span",)}


def test_chartqa_has_two_halves(tmp_path):
    eval_sets.chartqa(tmp_path)
    human, augmented = read("chartqa", tmp_path)
    assert (human.id, human.groups, human.answers) == ("human-1", {"half": ("human",)}, ("14",))
    assert (augmented.id, augmented.groups) == ("augmented-1", {"half": ("augmented",)})
    assert read("chartqa", tmp_path / "ChartQA Dataset" / "test") == [human, augmented]  # or the folder itself


def test_scienceqa_asks_with_context_and_choices(tmp_path):
    eval_sets.scienceqa(tmp_path)
    shown, bare = read("scienceqa", tmp_path)
    assert shown.text == "Context: Look.\nWhich is a metal?\nA. wood\nB. iron" and shown.answers == ("B",)
    assert shown.groups == {"subject": ("social science",), "context": ("text", "image"), "grade": ("7-12",)}
    assert bare.text == "Which is a metal?\nA. wood\nB. iron" and bare.image is None
    assert bare.groups["context"] == ("none",) and bare.groups["grade"] == ("1-6",)


def test_ocrbench_takes_one_answer_or_a_list(tmp_path):
    eval_sets.ocrbench(tmp_path)
    assert [question.answers for question in read("ocrbench", tmp_path)] == [("CENTRE",), ("ab",)]


def test_pope_takes_all_three_samplings(tmp_path):
    eval_sets.pope(tmp_path)
    assert [question.id for question in read("pope", tmp_path)] == ["random-1", "popular-1", "adversarial-1"]


def test_easy_vqa_is_read_from_its_package():
    pytest.importorskip("easy_vqa")
    selection = select(find_task("easy-vqa"), None)
    assert len(selection.questions) == 9673
    kinds = {question.groups["answer"] for question in selection.questions}
    assert kinds == {("yes or no",), ("shape",), ("color",)}


def edit(path, change):
    """Change what a JSON file holds."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("name", "file", "change", "message"),
    [
        ("textvqa", "TextVQA_0.5.1_val.json", lambda c: c.pop("data"), r'json: "data" is missing'),
        ("textvqa", "TextVQA_0.5.1_val.json", lambda c: c["data"][0].pop("question"), r'entry 1: "question" is missing'),
        (
            "textvqa", "TextVQA_0.5.1_val.json", lambda c: c["data"][0]["answers"].pop(),
            r'entry 1: "answers" is \[.*; expected a list of 10 texts',
        ),
        (
            "textvqa", "TextVQA_0.5.1_val.json", lambda c: c["data"].append("x"),
            'entry 2: a JSON object is expected, not "x"',
        ),
        (
            "vqav2", "v2_mscoco_val2014_annotations.json", lambda c: c["annotations"][0].update(question_id=7),
            "entry 1: question 42000 has no annotation in",
        ),
        (
            "vqav2", "v2_mscoco_val2014_annotations.json", lambda c: c["annotations"][0]["answers"].pop(),
            '"answers" has 9 entries; expected 10',
        ),
        (
            "docvqa", "spdocvqa_qas/val_v1.0_withQT.json", lambda c: c["data"][0].update(answers=[]),
            r'"answers" is \[\]; expected a list of one or more',
        ),
        (
            "gqa", "questions1.2/testdev_balanced_questions.json", lambda c: c["201307251"].update(answer=None),
            'entry "201307251": "answer" is null; expected text',
        ),
        (
            "scienceqa", "problems.json", lambda c: c["2"].update(answer=2),
            'entry "2": 2 choices and the answer 2 do not go together',
        ),
        ("scienceqa", "pid_splits.json", lambda c: c["test"].append("9"), "problem 9 is not in problems.json"),
        ("ocrbench", "OCRBench/OCRBench.json", lambda c: c.clear(), r"is \[\]; expected a list of one or more entries"),
        ("easy-vqa", "test/questions.json", lambda c: c[1].pop(), "entry 2: expected a question, its answer and"),
    ],
)  # fmt: skip
def test_a_damaged_entry_is_named_with_its_place(name, file, change, message, tmp_path):
    eval_sets.SETS[name](tmp_path)
    edit(tmp_path / file, change)
    with pytest.raises(OptionError, match=message):
        read(name, tmp_path)


def test_a_set_without_questions_is_refused(tmp_path):
    eval_sets.easy_vqa(tmp_path / "a")
    edit(tmp_path / "a" / "test" / "questions.json", list.clear)
    with pytest.raises(OptionError, match="The files of easy-VQA test in .*a hold no question"):
        select(find_task("easy-vqa"), tmp_path / "a")
    eval_sets.pope(tmp_path / "b")
    (tmp_path / "b" / "coco" / "coco_pope_popular.json").write_text("\n")  # as a download that broke off leaves it
    with pytest.raises(OptionError, match="coco_pope_popular.json is empty"):
        read("pope", tmp_path / "b")


def test_what_is_no_json_is_named_with_its_line(tmp_path):
    eval_sets.pope(tmp_path)
    path = tmp_path / "coco" / "coco_pope_popular.json"
    path.write_text(path.read_text() * 2 + '\n{"question_id": 3,\n')
    with pytest.raises(OptionError, match=r"coco_pope_popular.json, line 4, column \d+: Expecting"):
        read("pope", tmp_path)
    path.write_text(
        path.read_text().splitlines()[0] + '\n{"question_id": 2, "image": "x", "text": "?", "label": "maybe"}'
    )
    with pytest.raises(OptionError, match='line 2: "label" is "maybe"; expected "yes" or "no"'):
        read("pope", tmp_path)
    eval_sets.textvqa(tmp_path)
    path = tmp_path / "TextVQA_0.5.1_val.json"
    path.write_text('{\n"data": [\n{"question" "x"}]}')
    with pytest.raises(OptionError, match=r"TextVQA_0.5.1_val.json, line 3, column 13: Expecting ':'"):
        read("textvqa", tmp_path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(OptionError, match="is no JSON"):
        read("textvqa", tmp_path)


def test_missing_files_and_pictures_are_named(tmp_path):
    with pytest.raises(OptionError, match=r"has no TextVQA_0\.5\.1_val\.json, nor has a folder in it"):
        read("textvqa", tmp_path)
    with pytest.raises(OptionError, match="There is no folder"):
        read("textvqa", tmp_path / "gone")
    eval_sets.easy_vqa(tmp_path, pictures=7)
    for number in range(2, 7):
        (tmp_path / "test" / "images" / f"{number}.png").unlink()
    with pytest.raises(OptionError, match=r"5 of 7 pictures are missing: \S+2.png, \S+3.png, \S+4.png, …\. Finish"):
        select(find_task("easy-vqa"), tmp_path)
    assert len(select(find_task("easy-vqa"), tmp_path, limit=6).questions) == 6  # the others are not asked about
    with pytest.raises(OptionError, match="There is no folder"):
        read("easy-vqa", tmp_path, Path(tmp_path, "nowhere"))


def test_two_questions_with_one_id(tmp_path):
    eval_sets.textvqa(tmp_path)
    edit(tmp_path / "TextVQA_0.5.1_val.json", lambda content: content["data"].append(content["data"][0]))
    with pytest.raises(OptionError, match="two questions with the id 34602"):
        select(find_task("textvqa"), tmp_path)


def test_a_set_that_needs_a_folder_says_so():
    with pytest.raises(OptionError, match="TextVQA validation needs --data: a folder with TextVQA_0.5.1_val.json"):
        select(find_task("textvqa"), None)
    with pytest.raises(OptionError, match="There is no task nope; choose of vqav2, textvqa"):
        find_task("nope")


def test_a_shuffled_choice_is_the_same_every_time_and_keeps_pictures_together(tmp_path):
    eval_sets.easy_vqa(tmp_path, pictures=20)
    task = find_task("easy-vqa")
    first, again, other = (select(task, tmp_path, limit=30, shuffle=seed) for seed in (1, 1, 2))
    assert first == again and {q.id for q in first.questions} != {q.id for q in other.questions}
    assert first.data == other.data == select(task, tmp_path).data
    pictures = [question.image for question in first.questions]
    assert sum(a != b for a, b in zip(pictures, pictures[1:], strict=False)) == len(set(pictures)) - 1
    with pytest.raises(OptionError, match="limit is 0"):
        select(task, tmp_path, limit=0)
