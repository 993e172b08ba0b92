"""Measure the demo model that users get: `python -m training.evaluate_embedded [--model demo]`, needs easy-vqa.

The embedded float16 weights through mlx_fastvlm's own code, greedily, exact match of the whole answer, on easy-VQA's
official test questions and on generated pictures of seeds that training never draws. (training.evaluate measures the
PyTorch network instead.)
"""

import argparse
import json
import time
from collections.abc import Iterable
from pathlib import Path

from mlx_fastvlm import load
from mlx_fastvlm.benchmarks.easy_vqa import Asked, answers, exact_match, test_questions
from mlx_fastvlm.model import FastVLM
from mlx_fastvlm.processor import Processor
from training import prompts, scenes, text_pictures

# As in training.data, which needs torch.
TEST_SEEDS = 2_000_000_000


def unseen_scenes(count: int) -> Iterable[Asked]:
    """Scenes to describe."""
    drawn = (scenes.make_scene(TEST_SEEDS + i) for i in range(count))
    return ((scenes.render(scene), [(prompts.DESCRIBE[0], scenes.caption(scene))]) for scene in drawn)


def unseen_texts(count: int) -> Iterable[Asked]:
    """Printed words and numbers to read."""
    drawn = (text_pictures.make_text_picture(TEST_SEEDS + i) for i in range(count))
    return ((text_pictures.render(picture), [(prompts.READ[1], picture.text)]) for picture in drawn)


def examine(name: str, model: FastVLM, processor: Processor, asked: Iterable[Asked]) -> dict:
    """Share of questions answered exactly; prints the first few misses."""
    started = time.perf_counter()
    answered = list(answers(model, processor, asked))
    for question, expected, found in [item for item in answered if item[1] != item[2]][:3]:
        print(f"{name}: {question!r} expected {expected!r} got {found!r}", flush=True)
    return {**exact_match(answered), "seconds": round(time.perf_counter() - started, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--count", type=int, default=1000, help="generated pictures of each kind (default 1000)")
    parser.add_argument("--output", type=Path, help="write the numbers as JSON here")
    args = parser.parse_args()
    model, processor = load(args.model)
    tasks = {
        "easy_vqa_test": test_questions(),
        "scene_captions": unseen_scenes(args.count),
        "read_text": unseen_texts(args.count),
    }
    report = {name: examine(name, model, processor, asked) for name, asked in tasks.items()}
    print(json.dumps(report, indent=2))
    if args.output:
        args.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
