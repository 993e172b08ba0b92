"""Task accuracy: easy-VQA's official test questions, and how many answers a model gets exactly right.

easy-VQA 1.0 (PyPI `easy-vqa`, Victor Zhou, MIT license): 64-pixel pictures of one colored shape. The demo model was
trained on its training split. Pictures are encoded in batches, once for all questions about them, and questions of
equal length are answered together, which changes nothing but the last bits of the numbers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from types import ModuleType

import mlx.core as mx

from mlx_fastvlm.generate import prefill
from mlx_fastvlm.image_decoding import ImageSource
from mlx_fastvlm.model import FastVLM
from mlx_fastvlm.processor import Processor

from .command import BenchmarkError

Asked = tuple[ImageSource, Sequence[tuple[str, str]]]  # a picture, and (question, expected answer) pairs about it

MAX_TOKENS = 64
_IMAGE_BATCH = 32
_QUESTION_BATCH = 128


def test_questions(limit: int | None = None) -> list[tuple[Path, list[tuple[str, str]]]]:
    """The official test pictures with their questions, by image id; the first `limit` of them.

    Raises:
        BenchmarkError: the easy-vqa package is missing.
    """
    easy_vqa = _data_set()
    questions: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for question, answer, image_id in zip(*easy_vqa.get_test_questions(), strict=True):
        questions[image_id].append((question, answer))
    paths = easy_vqa.get_test_image_paths()
    return [(Path(paths[image_id]), questions[image_id]) for image_id in sorted(questions)[:limit]]


test_questions.__test__ = False  # no test of pytest's, whatever its name begins with


def training_pictures(count: int) -> list[Path]:
    """The first training pictures by image id. Raises BenchmarkError if the easy-vqa package is missing."""
    paths = _data_set().get_train_image_paths()
    return [Path(paths[image_id]) for image_id in sorted(paths)[:count]]


def answers(model: FastVLM, processor: Processor, asked: Iterable[Asked]) -> Iterator[tuple[str, str, str]]:
    """Greedy answers, as (question, expected, found); a batch of pictures at a time, not in the order asked."""
    answered = answers_by_picture(model, processor, asked)
    return ((question, expected, found) for _, question, expected, found in answered)


def answers_by_picture(
    model: FastVLM, processor: Processor, asked: Iterable[Asked]
) -> Iterator[tuple[int, str, str, str]]:
    """`answers`, each behind the number of its picture."""
    asked = iter(asked)
    first = 0
    while batch := list(islice(asked, _IMAGE_BATCH)):
        pixel_values = mx.concatenate([processor.preprocess(image) for image, _ in batch])
        features = model.encode_images(pixel_values)
        by_length: dict[int, list[tuple[int, list[int], str, str]]] = defaultdict(list)
        for picture, (_, pairs) in enumerate(batch):
            for question, expected in pairs:
                input_ids = processor.tokenize(question, 1)
                by_length[len(input_ids)].append((picture, input_ids, question, expected))
        for group in by_length.values():
            for start in range(0, len(group), _QUESTION_BATCH):
                chosen = group[start : start + _QUESTION_BATCH]
                found = _answer_together(model, processor, features, [(item[0], item[1]) for item in chosen])
                for (picture, _, question, expected), text in zip(chosen, found, strict=True):
                    yield first + picture, question, expected, text
        first += len(batch)


def exact_match(answered: Iterable[tuple[str, str, str]]) -> dict[str, float | int]:
    """Share of `answers` that are exactly the expected ones, as {"exact_match": share, "questions": count}."""
    right = [found == expected for _, expected, found in answered]
    return {"exact_match": round(sum(right) / len(right), 5), "questions": len(right)}


def _data_set() -> ModuleType:
    try:
        import easy_vqa
    except ImportError:
        raise BenchmarkError("Task accuracy needs the easy-VQA data set: pip install easy-vqa.") from None
    return easy_vqa


def _answer_together(
    model: FastVLM, processor: Processor, features: mx.array, questions: Sequence[tuple[int, list[int]]]
) -> list[str]:
    """Answers to questions of equal length.

    Args:
        features: (B, N, hidden), a row of pictures.
        questions: (which picture, ids).
    """
    cache = model.make_cache()
    embeddings = mx.concatenate([model.embed(input_ids, [features[picture]]) for picture, input_ids in questions])
    decoder = model.language_model
    tokens = mx.argmax(prefill(model, embeddings, cache), axis=-1)
    drawn = [tokens.tolist()]
    ended = [token in processor.eos_token_ids for token in drawn[0]]
    while not all(ended) and len(drawn) < MAX_TOKENS:
        hidden = decoder.hidden_states(decoder.embed_tokens(tokens[:, None]), cache)
        tokens = mx.argmax(decoder.logits(hidden[:, -1]), axis=-1)
        drawn.append(tokens.tolist())
        ended = [done or token in processor.eos_token_ids for done, token in zip(ended, drawn[-1], strict=True)]
    return [processor.decode(_until_end(column, processor)) for column in zip(*drawn, strict=True)]


def _until_end(tokens: Iterable[int], processor: Processor) -> list[int]:
    kept = []
    for token in tokens:
        if token in processor.eos_token_ids:
            break
        kept.append(token)
    return kept
