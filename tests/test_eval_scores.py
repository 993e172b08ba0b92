"""The measures of the evaluation's tasks, by vectors worked out by hand from the official scorers' rules."""

import itertools
import random
import re

import pytest

from mlx_fastvlm.evaluation.anls import anls, edit_distance
from mlx_fastvlm.evaluation.chartqa import is_relaxed_match
from mlx_fastvlm.evaluation.exact_match import EASY_VQA, GQA
from mlx_fastvlm.evaluation.ocrbench import OCRBENCH, contains_answer
from mlx_fastvlm.evaluation.pope import POPE, is_yes
from mlx_fastvlm.evaluation.result import Result, Score, format_result
from mlx_fastvlm.evaluation.run_file import Settings
from mlx_fastvlm.evaluation.scienceqa import chosen_letter
from mlx_fastvlm.evaluation.task import Judged, Question
from mlx_fastvlm.evaluation.uncertainty import estimate
from mlx_fastvlm.evaluation.vqa_accuracy import TEXTVQA, VQAV2, normalize, normalize_textvqa, vqa_accuracy


def question(*answers, **groups):
    return Question("1", "?", None, answers, {kind: (name,) for kind, name in groups.items()})


@pytest.mark.parametrize(
    ("answer", "normalized"),
    [
        ("Yes", "yes"),
        ("  a red\tball\n", "red ball"),
        ("The Two dogs.", "2 dogs"),
        ("none", "0"),
        ("ten an the a", "10"),
        ("dont", "don't"),
        ("Dont", "don't"),  # small letters come first
        ("Im", "im"),  # so that this one, with its capital, is never met
        ("somebody'd", "somebodyd"),  # as the official list has it
        ("t-shirt", "t shirt"),  # a mark within a word becomes a space
        ("black - white", "black white"),  # one that stands free goes
        ("black -white-blue", "black whiteblue"),  # and takes along those of its kind that do not
        ("1,000", "1000"),
        ("1,000 t-shirts", "1000 tshirts"),  # a comma in a number makes all marks go
        ("red,blue", "red blue"),
        ("3.5", "3.5"),
        ("5.", "5"),
        ("u.s.a.", "usa"),
        ("." * 40, "." * 8),  # at most 32 periods go
        ("what's up?", "what's up"),
        ("it's 10:30", "it's 10:30"),  # a colon stays
        ("", ""),
    ],
)
def test_vqa_normalization(answer, normalized):
    assert normalize(answer) == normalized


@pytest.mark.parametrize(
    ("answer", "normalized"),
    [
        ("McDonald's", "mcdonald 's"), ("1,000?", "1000"), ("red,blue", "redblue"), ("Bob's t-shirt", "bob 's t shirt"),
        # facebookresearch/mmf@01a5606 tests/datasets/test_processors.py
        ("two", "2"), ("a building", "building"), ("snow, mountain", "snow mountain"), ("isnt", "isn't"),
        ("the two mountain's \t \n   ", "2 mountain 's"),
    ],
)  # fmt: skip
def test_textvqa_normalizes_further(answer, normalized):
    assert normalize_textvqa(answer) == normalized


@pytest.mark.parametrize(("same", "accuracy"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_vqa_accuracy_is_the_mean_over_nine_of_ten(same, accuracy):
    annotated = ["cat"] * same + [f"other {i}" for i in range(10 - same)]
    assert vqa_accuracy("cat", annotated) == pytest.approx(accuracy)


def test_vqa_accuracy_equals_leaving_out_each_in_turn():
    drawn = random.Random(0)
    for _ in range(200):
        annotated = [drawn.choice("abc") for _ in range(10)]
        answer = drawn.choice("abcd")
        accuracies = [min(nine.count(answer) / 3, 1) for nine in itertools.combinations(annotated, 9)]
        assert vqa_accuracy(answer, annotated) == pytest.approx(sum(accuracies) / 10)


def test_vqa_scores_normalize_both_sides():
    assert VQAV2.score("Two.", question(*["2"] * 2, *["two"] * 2, *["a"] * 6)) == 1
    assert VQAV2.score("Yes", question(*["yes"] * 10)) == 1
    assert TEXTVQA.score("Levi's", question(*["levi 's"] * 1, *["x"] * 9)) == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("first", "second", "distance"),
    [("", "", 0), ("", "abc", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("abc", "abc", 0), ("ab", "ba", 2)],
)
def test_edit_distance(first, second, distance):
    assert edit_distance(first, second) == edit_distance(second, first) == distance


@pytest.mark.parametrize(
    ("answer", "right", "similarity"),
    [
        ("Paris", ["paris"], 1),
        ("  the   Hague ", ["The Hague"], 1),
        ("abcd", ["abxx"], 0.5),  # just enough
        ("abc", ["axx"], 0),  # a third is not
        ("12 May", ["13 May", "12 May 1999"], 5 / 6),
        ("", ["x"], 0),
        ("", [""], 1),
    ],
)
def test_anls(answer, right, similarity):
    assert anls(answer, right) == pytest.approx(similarity)


@pytest.mark.parametrize(
    ("answer", "right", "matches"),
    [
        ("104", "100", True),
        ("105", "100", True),
        ("95", "100", True),
        ("105.1", "100", False),
        ("-97", "-100", True),
        ("97", "-100", False),
        ("5%", "0.05", True),
        ("62%", "62", False),
        ("0", "0", True),
        ("0.0", "0", False),  # a right answer of zero must be met as text
        ("Yes", "yes", True),
        ("yes.", "yes", False),
        ("14 items", "14", False),
        ("nan", "3", False),
        ("2014", "2015", True),  # years too are numbers, as in the official measure
    ],
)
def test_relaxed_accuracy(answer, right, matches):
    assert is_relaxed_match(answer, right) is matches


def test_the_vectors_of_pix2struct():
    """google-research/pix2struct@67e9f30 pix2struct/metrics_test.py."""
    answers = ["abc", "abc", "Abc", "100%", "100%", "100%", "100%", "Don't"]
    right = ["abc", "Abc", "abc", "96%", "94%", "0.96", "0.94", "Won't"]
    pairs = list(zip(answers, right, strict=True))
    assert sum(is_relaxed_match(*pair) for pair in pairs) / len(pairs) == 0.625
    assert sum(anls(answer, [target]) for answer, target in pairs) / len(pairs) == pytest.approx(0.475)


@pytest.mark.parametrize(("answer", "score"), [("Red.", 1), ("red", 1), ("dark red", 0), ("red. ", 0)])
def test_gqa_takes_the_answer_as_it_stands(answer, score):
    assert GQA.score(answer, question("red")) == score


def test_easy_vqa_is_exact():
    assert [EASY_VQA.score(answer, question("blue")) for answer in ("blue", "Blue", "blue.")] == [1, 0, 0]


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("B. Iron", "B"),
        ("B. Iron\nis a metal", "B"),
        ("The answer is C.", "C"),
        ("I think. The answer is D. Because", "D"),
        ("The answer is A. The answer is B.", None),
        ("The answer is B, iron.", "B"),
        ("The answer is A, since it is the answer. The answer is B.", None),
        ("b", None),
        ("Because it is B", None),
        ("Beryllium", None),
        ("", None),
    ],
)
def test_the_letter_of_a_choice(answer, letter):
    assert chosen_letter(answer) == letter


@pytest.mark.parametrize(
    ("answer", "right", "formula", "contains"),
    [
        ('The text says "CENTRE".', "centre", False, True),
        ("cent re", "centre", False, False),
        ("12\nMay", "12 may", False, True),
        (r"\frac { a } { b } = 1", r"\frac{a}{b}", True, True),
        (r"\FRAC{a}{b}", r"\frac{a}{b}", True, False),
    ],
)
def test_ocrbench_looks_for_the_answer(answer, right, formula, contains):
    assert contains_answer(answer, right, formula=formula) is contains


def test_ocrbench_counts_right_answers():
    for right in (0, 1, 3):
        judged = [Judged(float(number < right), ("a",), {}) for number in range(5)]
        score = Score(5, estimate([each.score for each in judged]), OCRBENCH.figures(judged))
        settings = Settings("ocrbench", "", "demo", "", OCRBENCH.template)
        result = Result("OCRBench", OCRBENCH.metric, settings, score, {}, 0, None)
        assert re.search(rf"^all +{20 * right}.00% .* 5 +{right}$", format_result(result), re.MULTILINE)


def test_ocrbench_knows_formulas_by_their_data_set():
    assert OCRBENCH.score("A B", Question("1", "?", None, ("ab",), {"data set": ("HME100k",)})) == 0
    assert OCRBENCH.score("x AB", Question("1", "?", None, ("zz", "ab"), {"data set": ("svt",)})) == 1


@pytest.mark.parametrize(
    ("answer", "yes"),
    [
        ("Yes, there is a dog.", True),
        ("No, there is none.", False),
        ("no", False),
        ("There is not any", False),
        ("Yes. No doubt", True),  # the first sentence decides
        ("NO", True),  # as officially: only these spellings are looked for
        ("Nothing", True),
        ("", True),
    ],
)
def test_pope_reads_yes_and_no(answer, yes):
    assert is_yes(answer) is yes


def test_popes_figures():
    # said yes: 3 of 4 rightly; two things that are there were missed
    judged = [Judged(1, ["yes"], {})] * 3 + [Judged(0, ["no"], {})] + [Judged(0, ["yes"], {})] * 2
    judged += [Judged(1, ["no"], {})] * 4
    figures = POPE.figures(judged)
    assert figures == pytest.approx({"precision": 3 / 4, "recall": 3 / 5, "F1": 2 / 3, "yes ratio": 0.4})


def test_popes_figures_of_a_model_that_never_says_yes():
    figures = POPE.figures([Judged(0, ["yes"], {}), Judged(1, ["no"], {})])
    assert figures == {"precision": 0, "recall": 0, "F1": 0, "yes ratio": 0}
