"""The same answers through the scorers of lmms-eval and of the PyPI package anls, where these are installed."""

import random

import pytest

from mlx_fastvlm.evaluation.anls import anls, edit_distance
from mlx_fastvlm.evaluation.chartqa import is_relaxed_match
from mlx_fastvlm.evaluation.ocrbench import OCRBENCH
from mlx_fastvlm.evaluation.scienceqa import SCIENCEQA
from mlx_fastvlm.evaluation.task import Question
from mlx_fastvlm.evaluation.vqa_accuracy import _CONTRACTIONS, TEXTVQA, VQAV2, normalize, normalize_textvqa

_PIECES = (
    "a the two None t-shirt 1,000 5. u.s.a. dont Im somebody'd it's red/blue (left) \"no\" McDonald's x_y @home 3.5 50% "
    "yes? no! , . - ; & : é ß 12:30 couldn'tve"
).split()


def drawn_texts(count, seed=0):
    """Short texts of words and marks that the normalizations treat in some special way."""
    drawn = random.Random(seed)
    for _ in range(count):
        yield "".join(drawn.choice(_PIECES) + drawn.choice(["", " ", "  ", "\n"]) for _ in range(drawn.randint(0, 5)))


@pytest.fixture(scope="module")
def lmms():
    return pytest.importorskip("lmms_eval.tasks", reason="the extra eval is not installed")


def test_normalization(lmms):
    from lmms_eval.tasks._task_utils.vqa_eval_metric import EvalAIAnswerProcessor

    official = EvalAIAnswerProcessor()
    assert official.CONTRACTIONS == _CONTRACTIONS
    for text in [*drawn_texts(5000), *_CONTRACTIONS, *_CONTRACTIONS.values()]:
        flat = text.replace("\n", " ").replace("\t", " ").strip()
        assert normalize(text) == official.process_digit_article(official.process_punctuation(flat)), repr(text)
        assert normalize_textvqa(text) == official(text), repr(text)


def test_vqa_accuracy(lmms):
    from lmms_eval.tasks.textvqa.utils import textvqa_process_results
    from lmms_eval.tasks.vqav2.utils import vqav2_process_results

    texts, drawn = list(drawn_texts(40)), random.Random(1)
    for number in range(500):
        few = drawn.sample(texts, 3)
        answers, answer = tuple(drawn.choice(few) for _ in range(10)), drawn.choice(few)
        question = Question(str(number), "?", None, answers)
        document = {"question_id": number, "answers": list(answers)}
        assert TEXTVQA.score(answer, question) == pytest.approx(
            textvqa_process_results(document, [answer])["exact_match"]
        )
        document["answers"] = [{"answer": each, "answer_id": i} for i, each in enumerate(answers)]
        assert VQAV2.score(answer, question) == pytest.approx(vqav2_process_results(document, [answer])["exact_match"])


def test_anls_of_the_harness(lmms):
    from lmms_eval.api.metrics import anls as official

    texts, drawn = [text for text in drawn_texts(300, seed=2) if text.strip()], random.Random(2)
    for _ in range(1000):
        right, answer = drawn.sample(texts, drawn.randint(1, 3)), drawn.choice(texts)
        assert anls(answer, right) == pytest.approx(official(right, [answer])["anls"]), (answer, right)


def test_anls_of_the_package():
    anls_score = pytest.importorskip("anls").anls_score
    drawn = random.Random(3)
    for _ in range(1000):
        right = ["".join(drawn.choice("ABcd") for _ in range(drawn.randint(1, 8))) for _ in range(2)]
        answer = "".join(drawn.choice("abCD") for _ in range(drawn.randint(1, 8)))
        # That package has just one half count as 0, as the paper's formula; the challenge's own script lets it count.
        assert anls(answer, right) == pytest.approx(anls_score(answer, right, threshold=0.5 + 1e-9))


def test_edit_distance_of_the_package():
    editdistance = pytest.importorskip("editdistance")
    drawn = random.Random(4)
    for _ in range(1000):
        first, second = ("".join(drawn.choice("abcd") for _ in range(drawn.randint(0, 12))) for _ in range(2))
        assert edit_distance(first, second) == editdistance.eval(first, second)


def test_relaxed_accuracy(lmms):
    from lmms_eval.tasks.chartqa.utils import relaxed_correctness

    drawn = random.Random(5)
    texts = ["Yes", "yes", "0", "0.0", "-3", "nan", "12%", "0.12", "", "%", "1e3", "1,000"]
    texts += [f"{drawn.uniform(-10, 10):.1f}" for _ in range(60)]
    for answer in texts:
        for right in texts:
            assert is_relaxed_match(answer, right) == relaxed_correctness(answer, right), (answer, right)


def test_ocrbench(lmms):
    from lmms_eval.tasks.ocrbench.utils import ocrbench_process_results

    texts, drawn = list(drawn_texts(200, seed=6)), random.Random(6)
    for data_set in ("HME100k", "svt"):
        for _ in range(500):
            answer, right = drawn.choice(texts), drawn.sample(texts, 2)
            question = Question("1", "?", None, tuple(right), {"data set": (data_set,)})
            document = {"answer": right, "dataset": data_set, "question_type": "-"}
            judged = ocrbench_process_results(document, [answer])
            assert OCRBENCH.score(answer, question) == judged["ocrbench_accuracy"]["score"]


def test_scienceqa_letters(lmms):
    from lmms_eval.tasks.scienceqa.utils import sqa_process_results

    for answer in ("A", "B", "B.", "B. Iron", "C. A", "Iron", "BA", "", "because B"):
        document = {"choices": ["x", "y", "z"], "answer": 1}
        assert (
            SCIENCEQA.score(answer, Question("1", "?", None, ("B",)))
            == (sqa_process_results(document, [answer])["exact_match"])
        )
