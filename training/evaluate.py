"""Measure a run's export: `python -m training.evaluate --work RUN_FOLDER --split test`.

Greedy answers, BatchNorm in eval mode, exact match of the whole answer. The test split is easy-VQA's official test set
and generated pictures of seeds that training never draws; the validation split is made of easy-VQA training images left
out of training and of other unseen seeds. Only the validation split may be looked at while training.
"""

import argparse
import json
import random
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image

from training import easy_vqa_data, prompts, scenes, text_pictures, train
from training.data import FIRST_VALIDATION_IMAGE, TEST_SEEDS, VALIDATION_SEEDS, to_pixel_values
from training.export import load
from training.generation import answer_all
from training.model import FastVLM
from training.packing import Packer
from training.preprocessing import to_square_array
from training.tokenizer import load_tokenizer

UNSEEN_NUMBER_RENDERINGS = 4


class Evaluator:
    """Asks a model about pictures and compares the answers."""

    def __init__(self, hub: Path):
        self.model = load(hub)
        self.model.tower.to(memory_format=torch.channels_last)
        self.packer = Packer(load_tokenizer(hub), (self.model.image_size // 64) ** 2)

    @torch.no_grad()
    def features(self, images: Iterable[Image.Image], batch: int = 50) -> torch.Tensor:
        """Projected image rows (B, N, hidden)."""
        arrays = [to_square_array(image, self.model.image_size) for image in images]
        rows = []
        for start in range(0, len(arrays), batch):
            pixels = torch.from_numpy(np.stack(arrays[start : start + batch])).permute(0, 3, 1, 2)
            rows.append(self.model.encode_images(self.model.tower(to_pixel_values(pixels))))
        return torch.cat(rows)

    def accuracy(self, name: str, features: torch.Tensor, asked: list[tuple[int, str, str]]) -> dict:
        """Share of (picture, prompt, expected) answered exactly; prints the first few misses."""
        answers = answer_all(self.model, self.packer, features, [(picture, prompt) for picture, prompt, _ in asked])
        misses = [(*item, got) for item, got in zip(asked, answers, strict=True) if got != item[2]]
        for _, prompt, expected, got in misses[:3]:
            print(f"{name}: {prompt!r} expected {expected!r} got {got!r}", flush=True)
        return {"exact_match": round(1 - len(misses) / len(asked), 5), "questions": len(asked)}


def evaluate(evaluator: Evaluator, split: str, count: int) -> dict[str, dict]:
    """Accuracies by task; `count` generated pictures of each kind."""
    results = {}
    if split == "test":
        questions, images = easy_vqa_data.load_questions("test"), easy_vqa_data.load_images("test")
    else:
        questions, images = easy_vqa_data.load_questions("train"), easy_vqa_data.load_images("train")
        questions = {i: asked for i, asked in questions.items() if i >= FIRST_VALIDATION_IMAGE}
    ids = sorted(questions)
    asked = [(row, *pair) for row, image_id in enumerate(ids) for pair in questions[image_id]]
    results["easy_vqa"] = evaluator.accuracy("easy_vqa", evaluator.features(images[i] for i in ids), asked)

    seed = TEST_SEEDS if split == "test" else VALIDATION_SEEDS
    drawn = [scenes.make_scene(seed + i) for i in range(count)]
    features = evaluator.features(map(scenes.render, drawn))
    rng = random.Random(seed)
    for name, prompt, answer in (
        ("scene_caption", prompts.DESCRIBE[0], scenes.caption),
        ("scene_brief", prompts.BRIEF[0], scenes.brief_caption),
        ("scene_count", prompts.COUNT[0], scenes.count_answer),
        ("scene_no_text", prompts.READ[1], lambda scene: prompts.NO_TEXT),
        ("scene_no_person", prompts.EXPRESSION[0], lambda scene: prompts.NO_PERSON),
    ):
        asked = [(row, prompt, answer(scene)) for row, scene in enumerate(drawn)]
        results[name] = evaluator.accuracy(name, features, asked)
    for name, is_square in (("scene_caption_square", True), ("scene_caption_not_square", False)):
        chosen = [(row, scene) for row, scene in enumerate(drawn) if (scene.aspect == (1.0, 1.0)) == is_square]
        asked = [(row, prompts.DESCRIBE[0], scenes.caption(scene)) for row, scene in chosen]
        results[name] = evaluator.accuracy(name, features, asked)
    asked = [(row, *scenes.ask(scene, rng)) for row, scene in enumerate(drawn)]
    results["scene_questions"] = evaluator.accuracy("scene_questions", features, asked)

    pictures = [text_pictures.make_text_picture(seed + i) for i in range(count)]
    features = evaluator.features(map(text_pictures.render, pictures))
    asked = [(row, prompts.READ[1], picture.text) for row, picture in enumerate(pictures)]
    results["read_text"] = evaluator.accuracy("read_text", features, asked)
    asked = [(row, prompts.DESCRIBE[0], text_pictures.caption(picture)) for row, picture in enumerate(pictures)]
    results["text_caption"] = evaluator.accuracy("text_caption", features, asked)
    unseen = text_pictures.HELD_OUT_NUMBERS * UNSEEN_NUMBER_RENDERINGS
    pictures = [text_pictures.make_text_picture(seed + count + i, number) for i, number in enumerate(unseen)]
    features = evaluator.features(map(text_pictures.render, pictures))
    asked = [(row, prompts.READ[1], picture.text) for row, picture in enumerate(pictures)]
    results["read_unseen_numbers"] = evaluator.accuracy("read_unseen_numbers", features, asked)
    return results


def parameter_counts(model: FastVLM) -> dict[str, int]:
    parts = {"vision_tower": model.tower, "mm_projector": model.mm_projector, "language_model": model.decoder}
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    return counts | {"total": sum(counts.values())}


def recipe() -> dict:
    """What decided the training run."""
    names = (
        "SEED",
        "BATCH",
        "PEAK_LR",
        "TOWER_LR_FACTOR",
        "WARMUP",
        "WEIGHT_DECAY",
        "DENSE_WEIGHT",
        "FROZEN_NORM_TAIL",
        "STORED_PICTURES",
    )
    return {name.lower(): getattr(train, name) for name in (*names, "MINUTES", "MIXTURE")}


def stage_summaries(log: Path) -> dict[str, dict]:
    """Stage → steps, seconds and speed of the whole stage, and its last reported losses and dense accuracies."""
    summaries, before = {}, 0
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    for stage in dict.fromkeys(line["stage"] for line in lines):
        last = [line for line in lines if line["stage"] == stage][-1]
        summaries[stage] = {name: value for name, value in last.items() if name not in ("stage", "samples")}
        summaries[stage]["images_per_second"] = round((last["samples"] - before) / last["seconds"], 1)
        before = last["samples"]
    return summaries


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="run folder of training.train")
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    parser.add_argument("--count", type=int, default=1000, help="generated pictures of each kind (default 1000)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="write the numbers and the recipe as JSON here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    started = time.perf_counter()
    evaluator = Evaluator(args.work / "hub")
    report = {"torch": torch.__version__, "transformers": transformers.__version__, "recipe": recipe()}
    report |= {"stages": stage_summaries(args.work / "log.jsonl"), "parameters": parameter_counts(evaluator.model)}
    report["split"] = args.split
    report["accuracy"] = evaluate(evaluator, args.split, args.count)
    report["evaluation_seconds"] = round(time.perf_counter() - started, 1)
    print(json.dumps(report, indent=2))
    if args.output:
        args.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
