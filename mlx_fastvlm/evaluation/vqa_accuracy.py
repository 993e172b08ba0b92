"""VQA accuracy, the measure of VQAv2 and TextVQA, and these two sets.

An answer that three of the other annotators gave is right, one that two or one gave is so in part: min(n / 3, 1), on
average over leaving out each of the ten in turn. Before that, answers are normalized as the official scorers do
(GT-Vision-Lab/VQA@a013f00 PythonEvaluationTools/vqaEvaluation/vqaEval.py; MMF's processor for TextVQA), oddities included.
The VQA script normalizes only where the annotators disagree; here it is done always, as EvalAI's users, MMF and
lmms-eval do, or "Yes" would be wrong where all ten said "yes".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from mlx_fastvlm.evaluation.annotations import Entry, find, picture_folder, read_entries
from mlx_fastvlm.evaluation.task import Question, Task

ANNOTATORS = 10
_ENOUGH = 3  # others who gave an answer make it right

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"\.(?!\d)")
_MOST_PERIODS = 32  # are taken out: the official call passes a flag of that value where the count stands
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_ARTICLES = {"a", "an", "the"}
_DIGITS = {
    word: str(value) for value, word in enumerate("zero one two three four five six seven eight nine ten".split())
}
_DIGITS["none"] = "0"
# Words that get their apostrophe back, as pairs; a few of the official list's are not what one would expect.
_CONTRACTIONS = dict(
    pair.split(">")
    for pair in (
        "aint>ain't arent>aren't cant>can't couldve>could've couldnt>couldn't couldn'tve>couldn't've "
        "couldnt've>couldn't've didnt>didn't doesnt>doesn't dont>don't hadnt>hadn't hadnt've>hadn't've "
        "hadn'tve>hadn't've hasnt>hasn't havent>haven't hed>he'd hed've>he'd've he'dve>he'd've hes>he's howd>how'd "
        "howll>how'll hows>how's Id've>I'd've I'dve>I'd've Im>I'm Ive>I've isnt>isn't itd>it'd itd've>it'd've "
        "it'dve>it'd've itll>it'll let's>let's maam>ma'am mightnt>mightn't mightnt've>mightn't've "
        "mightn'tve>mightn't've mightve>might've mustnt>mustn't mustve>must've neednt>needn't notve>not've "
        "oclock>o'clock oughtnt>oughtn't ow's'at>'ow's'at 'ows'at>'ow's'at 'ow'sat>'ow's'at shant>shan't "
        "shed've>she'd've she'dve>she'd've she's>she's shouldve>should've shouldnt>shouldn't shouldnt've>shouldn't've "
        "shouldn'tve>shouldn't've somebody'd>somebodyd somebodyd've>somebody'd've somebody'dve>somebody'd've "
        "somebodyll>somebody'll somebodys>somebody's someoned>someone'd someoned've>someone'd've "
        "someone'dve>someone'd've someonell>someone'll someones>someone's somethingd>something'd "
        "somethingd've>something'd've something'dve>something'd've somethingll>something'll thats>that's "
        "thered>there'd thered've>there'd've there'dve>there'd've therere>there're theres>there's theyd>they'd "
        "theyd've>they'd've they'dve>they'd've theyll>they'll theyre>they're theyve>they've twas>'twas wasnt>wasn't "
        "wed've>we'd've we'dve>we'd've weve>we've werent>weren't whatll>what'll whatre>what're whats>what's "
        "whatve>what've whens>when's whered>where'd wheres>where's whereve>where've whod>who'd whod've>who'd've "
        "who'dve>who'd've wholl>who'll whos>who's whove>who've whyll>why'll whyre>why're whys>why's wont>won't "
        "wouldve>would've wouldnt>wouldn't wouldnt've>wouldn't've wouldn'tve>wouldn't've yall>y'all "
        "yall'll>y'all'll y'allll>y'all'll yall'd've>y'all'd've y'alld've>y'all'd've y'all'dve>y'all'd've "
        "youd>you'd youd've>you'd've you'dve>you'd've youll>you'll youre>you're youve>you've"
    ).split()
)


def normalize(answer: str) -> str:
    """An answer as VQAv2 compares it: without case, punctuation and articles, number words as digits."""
    answer = re.sub(r"[\n\t]", " ", answer).strip()
    has_comma_in_number = _COMMA_IN_NUMBER.search(answer) is not None
    bare = answer
    for mark in _PUNCTUATION:
        stands_free = f"{mark} " in answer or f" {mark}" in answer
        bare = bare.replace(mark, "" if stands_free or has_comma_in_number else " ")
    bare = _PERIOD.sub("", bare, count=_MOST_PERIODS)
    words = [_DIGITS.get(word, word) for word in bare.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def normalize_textvqa(answer: str) -> str:
    """An answer as TextVQA compares it: before `normalize`, commas and question marks go and "'s" stands apart."""
    return normalize(answer.lower().replace(",", "").replace("?", "").replace("'s", " 's"))


def vqa_accuracy(answer: str, annotated: Sequence[str]) -> float:
    """The share of right, 0 to 1, of a normalized answer.

    Args:
        answer: the model's.
        annotated: each annotator's, as often as it was given.
    """
    same = annotated.count(answer)
    others = same * min((same - 1) / _ENOUGH, 1) + (len(annotated) - same) * min(same / _ENOUGH, 1)
    return others / len(annotated)


def read_vqav2(folder: Path, images: Path | None) -> list[Question]:
    """VQAv2's validation questions. Raises OptionError."""
    asked = find(folder, ["v2_OpenEnded_mscoco_val2014_questions.json"])
    answered = find(folder, ["v2_mscoco_val2014_annotations.json"])
    annotations = {entry.number("question_id"): entry for entry in read_entries(answered, "annotations")}
    pictures = picture_folder(folder, images, ["val2014"])
    questions = []
    for entry in read_entries(asked, "questions"):
        question_id = entry.number("question_id")
        annotation = annotations.get(question_id)
        if annotation is None:
            raise entry.refuse(f"question {question_id} has no annotation in {answered}.")
        questions.append(
            Question(
                str(question_id),
                entry.text("question"),
                pictures / f"COCO_val2014_{entry.number('image_id'):012}.jpg",
                _ten_answers(annotation),
                {"answer type": (annotation.text("answer_type"),)},
            )
        )
    return questions


def read_textvqa(folder: Path, images: Path | None) -> list[Question]:
    """TextVQA's validation questions. Raises OptionError."""
    entries = read_entries(find(folder, ["TextVQA_0.5.1_val.json"]), "data")
    pictures = picture_folder(folder, images, ["train_images"])
    return [
        Question(
            entry.text("question_id"),
            entry.text("question"),
            pictures / f"{entry.text('image_id')}.jpg",
            entry.texts("answers", ANNOTATORS),
        )
        for entry in entries
    ]


def _ten_answers(annotation: Entry) -> tuple[str, ...]:
    answers = annotation.entries("answers")
    if len(answers) != ANNOTATORS:
        raise annotation.refuse(f'"answers" has {len(answers)} entries; expected {ANNOTATORS}.')
    return tuple(answer.text("answer") for answer in answers)


def _score_vqav2(answer: str, question: Question) -> float:
    return vqa_accuracy(normalize(answer), [normalize(each) for each in question.answers])


def _score_textvqa(answer: str, question: Question) -> float:
    return vqa_accuracy(normalize_textvqa(answer), [normalize_textvqa(each) for each in question.answers])


VQAV2 = Task(
    name="vqav2",
    title="VQAv2 validation",
    metric="VQA accuracy",
    files="v2_OpenEnded_mscoco_val2014_questions.json, v2_mscoco_val2014_annotations.json, val2014/",
    read=read_vqav2,
    score=_score_vqav2,
)
TEXTVQA = Task(
    name="textvqa",
    title="TextVQA validation",
    metric="VQA accuracy",
    files="TextVQA_0.5.1_val.json, train_images/",
    read=read_textvqa,
    score=_score_textvqa,
)
