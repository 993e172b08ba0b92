"""What the demo model loses and saves at lower resolutions: `python -m training.evaluate_resolution`, needs easy-vqa.

Fixed resolutions beside `--resolution auto`, whose thresholds are found on other pictures by agreement with the answers
at the model's own resolution, for several shares of agreement: accuracy against mean encode time. The test set is
easy-VQA's official test questions and questions about generated scenes of seeds that training never draws; every question
counts once, with the encode time of its picture. Encode times are of one picture at a time, in turns, the first decile of
many, so that hardly anything is in them of what else the machine does; measuring the detail is part of auto's. Beside
that, wide and tall scenes padded and with fit native.
"""

import argparse
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import numpy as np
from PIL import Image

from mlx_fastvlm import load
from mlx_fastvlm.auto_resolution import AutoResolution, candidates, measure_detail
from mlx_fastvlm.benchmarks.easy_vqa import Asked, answers_by_picture, test_questions
from mlx_fastvlm.benchmarks.machine import describe_machine, load_average
from mlx_fastvlm.benchmarks.report import save_json
from mlx_fastvlm.model import FastVLM
from mlx_fastvlm.processor import Processor
from mlx_fastvlm.resolution_calibration import find_thresholds
from training import prompts, scenes

# As in training.data, which needs torch.
TEST_SEEDS, VALIDATION_SEEDS = 2_000_000_000, 1_000_000_000
SHIPPED = 0.998  # agreement of the thresholds in mlx_fastvlm/assets/demo
AGREEMENTS = (1.0, 0.999, 0.998, 0.995, 0.993, 0.99, 0.98)
TIMED_ROUNDS = 200


@dataclass
class Answered:
    """All answers to one set of questions at every resolution.

    Attributes:
        detail: of each picture.
        questions: how many are asked about each picture.
        right, same: resolution → of each picture, how many answers are the expected ones, and those at full resolution.
    """

    detail: list[float]
    questions: np.ndarray
    right: dict[int, np.ndarray] = field(default_factory=dict)
    same: dict[int, np.ndarray] = field(default_factory=dict)

    def accuracy(self, chosen: Sequence[int]) -> float:
        """Share of right answers if picture i is shown at resolution chosen[i]."""
        return sum(self.right[side][i] for i, side in enumerate(chosen)) / self.questions.sum()


def scenes_asked(seed: int, count: int, aspect: tuple[float, float] | None = None) -> list[Asked]:
    """Scenes, of one aspect if it is given, with a caption, a count and a random question each."""
    rng = random.Random(seed)
    drawn = [scenes.make_scene(seed + i, aspect) for i in range(count)]
    return [
        (
            scenes.render(scene),
            [
                (prompts.DESCRIBE[0], scenes.caption(scene)),
                (prompts.COUNT[0], scenes.count_answer(scene)),
                scenes.ask(scene, rng),
            ],
        )
        for scene in drawn
    ]


def easy_vqa_training(count: int) -> list[Asked]:
    """easy-VQA's last training pictures, which the demo model was validated on and not trained."""
    import easy_vqa

    questions = defaultdict(list)
    for question, answer, image_id in zip(*easy_vqa.get_train_questions(), strict=True):
        questions[image_id].append((question, answer))
    paths = easy_vqa.get_train_image_paths()
    return [(Path(paths[image_id]), questions[image_id]) for image_id in sorted(questions)[-count:]]


def ask_everywhere(model: FastVLM, processor: Processor, asked: Sequence[Asked], sides: Sequence[int]) -> Answered:
    """Every question at every resolution; the last is the full one."""
    pictures = [image if isinstance(image, Image.Image) else Image.open(image).convert("RGB") for image, _ in asked]
    result = Answered(
        [measure_detail(picture, sides[-1]) for picture in pictures], np.array([len(q) for _, q in asked])
    )
    texts: dict[int, list[dict[str, str]]] = {}
    for side in sides:
        prepared = Processor(processor.tokenizer, processor.image_processor.at(side), processor.eos_token_ids)
        result.right[side], texts[side] = np.zeros(len(asked)), [{} for _ in asked]
        for picture, question, expected, found in answers_by_picture(model, prepared, asked):
            result.right[side][picture] += found == expected
            texts[side][picture][question] = found
        print(f"  {side}: {result.right[side].sum() / result.questions.sum():.4f}", flush=True)
    for side in sides:
        pairs = zip(texts[side], texts[sides[-1]], strict=True)
        result.same[side] = np.array([np.mean([a[question] == b[question] for question in b]) for a, b in pairs])
    return result


def wide_and_tall(model: FastVLM, processor: Processor, count: int) -> dict[str, dict]:
    """Fit → share of right answers about scenes of 4:3 and 3:4, and positions that each takes."""
    found = {}
    for fit in ("pad", "native"):
        prepared = Processor(processor.tokenizer, processor.image_processor.at(fit=fit), processor.eos_token_ids)
        right = total = 0
        for aspect in ((1.0, 0.75), (0.75, 1.0)):  # pictures of one size are encoded together
            asked = scenes_asked(TEST_SEEDS, count // 2, aspect)
            given = list(answers_by_picture(model, prepared, asked))
            right += sum(answer == expected for *_, expected, answer in given)
            total += len(given)
        rows = prepared.image_processor.count_rows(*asked[0][0].size)
        found[fit] = {"accuracy": round(right / total, 5), "questions": total, "image_tokens": rows}
    return found


def joined(*parts: Answered) -> Answered:
    """Several sets as one."""
    sides = parts[0].right
    return Answered(
        [detail for part in parts for detail in part.detail],
        np.concatenate([part.questions for part in parts]),
        {side: np.concatenate([part.right[side] for part in parts]) for side in sides},
        {side: np.concatenate([part.same[side] for part in parts]) for side in sides},
    )


def encode_seconds(model: FastVLM, processor: Processor, sides: Sequence[int]) -> tuple[dict[int, float], float]:
    """Seconds to encode a picture of each resolution, and to measure one's detail: the first decile, taken in turns."""
    picture = scenes.render(scenes.make_scene(0))
    pixels = {side: processor.image_processor.at(side).preprocess(picture) for side in sides}
    times: dict[int, list[float]] = {side: [] for side in (0, *sides)}
    for _ in range(TIMED_ROUNDS):
        for side in sides:
            start = time.perf_counter()
            mx.eval(model.encode_images(pixels[side]))
            times[side].append(time.perf_counter() - start)
        start = time.perf_counter()
        measure_detail(picture, sides[-1])
        times[0].append(time.perf_counter() - start)
    deciles = {side: statistics.quantiles(samples, n=10)[0] for side, samples in times.items()}
    return {side: deciles[side] for side in sides}, deciles[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, help="easy-VQA test pictures (default: all 1,000)")
    parser.add_argument("--scenes", type=int, default=333, help="test scenes, three questions each (default 333)")
    parser.add_argument(
        "--calibration", type=int, default=200, help="easy-VQA pictures to calibrate with (default 200)"
    )
    parser.add_argument("--output", type=Path, help="write the numbers as JSON here")
    parser.add_argument("--thresholds", type=Path, help=f"only calibrate, and write the thresholds of {SHIPPED} here")
    args = parser.parse_args()
    machine = describe_machine()
    model, processor = load("demo")
    trained = processor.image_processor.image_size
    sides = [*candidates(trained), trained]
    # First, as in a process that answers one question: large batches load the CPU's compiled loops for good.
    seconds, measuring = encode_seconds(model, processor, sides)
    print(f"Encode: {', '.join(f'{side} in {value * 1e3:.1f} ms' for side, value in seconds.items())}", flush=True)
    print("Calibration: easy-VQA training pictures, scenes")
    known = joined(
        ask_everywhere(model, processor, easy_vqa_training(args.calibration), sides),
        ask_everywhere(model, processor, scenes_asked(VALIDATION_SEEDS, args.calibration // 5), sides),
    )
    if args.thresholds:
        save_json(args.thresholds, find_thresholds(trained, known.detail, known.same, SHIPPED).to_dict())
        return
    print("Test: easy-VQA, scenes")
    sets = {
        "easy_vqa": ask_everywhere(model, processor, test_questions(args.pictures), sides),
        "scenes": ask_everywhere(model, processor, scenes_asked(TEST_SEEDS, args.scenes), sides),
    }
    sets["mixed"] = joined(*sets.values())
    fits = wide_and_tall(model, processor, args.scenes)
    machine["load_average_after"] = load_average()

    def row(name: str, choose: AutoResolution | int) -> dict:
        result = {"name": name}
        for label, answered in sets.items():
            if isinstance(choose, int):
                chosen, extra = [choose] * len(answered.detail), 0.0
            else:
                chosen, extra = [choose.choose_for(detail) for detail in answered.detail], measuring
            mean = np.average([seconds[side] + extra for side in chosen], weights=answered.questions)
            shares = {side: chosen.count(side) / len(chosen) for side in sides}
            result[label] = {
                "accuracy": round(float(answered.accuracy(chosen)), 5),
                "encode_over_full": round(float(mean / seconds[trained]), 4),
                "pictures_by_resolution": {str(side): round(share, 4) for side, share in shares.items() if share},
            }
        return result

    rows = [row(f"fixed {side}", side) for side in sides]
    for agreement in AGREEMENTS:
        found = find_thresholds(trained, known.detail, known.same, agreement)
        rows.append({**row(f"auto {agreement}", found.auto), "steps": found.auto.to_dict()["steps"]})
    report = {
        "benchmark": "auto-resolution",
        "machine": machine,
        "model": "demo",
        "trained": trained,
        "questions": {label: int(answered.questions.sum()) for label, answered in sets.items()},
        "calibration_pictures": len(known.detail),
        "encode_s": {str(side): value for side, value in seconds.items()},
        "measure_detail_s": measuring,
        "limit": {"accuracy_lost": 0.005, "encode_over_full": 0.6},
        "rows": rows,
        "wide_and_tall_scenes": fits,
    }
    for fit, result in fits.items():
        print(f"Wide and tall scenes, {fit}: {result['accuracy']:.4f} with {result['image_tokens']} image tokens")
    for each in rows:
        cells = (f"{label} {each[label]['accuracy']:.4f} at {each[label]['encode_over_full']:.0%}" for label in sets)
        print(f"{each['name']:<12} {'; '.join(cells)}")
    if args.output:
        save_json(args.output, report)


if __name__ == "__main__":
    main()
