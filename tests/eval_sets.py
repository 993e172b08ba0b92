"""Small sets in the official files' forms, as the tests of the evaluation read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.demo_pictures import draw


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write_lines(path: Path, values: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")


def picture(path: Path, number: int = 1) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(path, number)


def vqav2(folder: Path) -> None:
    answers = [{"answer": "yes" if i < 7 else "no", "answer_confidence": "yes", "answer_id": i + 1} for i in range(10)]
    write_json(
        folder / "v2_OpenEnded_mscoco_val2014_questions.json",
        {"questions": [{"image_id": 42, "question": "Is it red?", "question_id": 42000}]},
    )
    annotation = {"question_type": "is it", "answer_type": "yes/no", "image_id": 42, "question_id": 42000}
    write_json(
        folder / "v2_mscoco_val2014_annotations.json",
        {"annotations": [annotation | {"multiple_choice_answer": "yes", "answers": answers}]},
    )
    picture(folder / "val2014" / "COCO_val2014_000000000042.jpg")


def textvqa(folder: Path) -> None:
    entry = {"question_id": 34602, "question": "what brand is it?", "image_id": "003a8ae2ef43b901", "image_classes": []}
    write_json(
        folder / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": [entry | {"answers": ["dakota"] * 10}]}
    )
    picture(folder / "train_images" / "003a8ae2ef43b901.jpg")


def docvqa(folder: Path) -> None:
    entry = {
        "questionId": 49153,
        "question": "What is the date?",
        "question_types": ["handwritten", "form"],
        "docId": 14,
    }
    entry |= {"image": "documents/pybv0228_81.png", "answers": ["1/8/93", "January 8"], "data_split": "val"}
    write_json(folder / "spdocvqa_qas" / "val_v1.0_withQT.json", {"dataset_name": "SP-DocVQA", "data": [entry]})
    picture(folder / "spdocvqa_images" / "pybv0228_81.png")


def infovqa(folder: Path) -> None:
    entry = {"questionId": 98313, "question": "How many?", "image_local_name": "20471.jpeg", "answers": ["4"]}
    entry |= {"answer_type": ["single span"], "evidence": ["figure"], "operation/reasoning": []}
    write_json(folder / "infographicsvqa_qas" / "infographicsVQA_val_v1.0_withQT.json", {"data": [entry]})
    picture(folder / "infographicsvqa_images" / "20471.jpeg")


def chartqa(folder: Path) -> None:
    home = folder / "ChartQA Dataset" / "test"
    write_json(home / "test_human.json", [{"imgname": "166.png", "query": "How many bars?", "label": "14"}])
    write_json(home / "test_augmented.json", [{"imgname": "166.png", "query": "What share?", "label": "62"}])
    picture(home / "png" / "166.png")


def gqa(folder: Path) -> None:
    types = {"detailed": "existAttrC", "semantic": "attr", "structural": "verify"}
    entry = {"question": "Is the sky dark?", "imageId": "n161313", "answer": "yes", "types": types, "isBalanced": True}
    write_json(folder / "questions1.2" / "testdev_balanced_questions.json", {"201307251": entry})
    picture(folder / "images" / "n161313.jpg")


def scienceqa(folder: Path) -> None:
    problem = {"question": "Which is a metal?", "choices": ["wood", "iron"], "answer": 1, "hint": "", "image": None}
    problem |= {"subject": "natural science", "grade": "grade4"}
    shown = problem | {"hint": "Look.", "image": "image.png", "grade": "grade11", "subject": "social science"}
    write_json(folder / "problems.json", {"1": problem, "2": shown, "3": problem})
    write_json(folder / "pid_splits.json", {"train": ["3"], "test": ["2", "1"]})
    picture(folder / "images" / "test" / "2" / "image.png")


def ocrbench(folder: Path) -> None:
    entry = {"dataset_name": "IIIT5K", "type": "Regular Text Recognition", "question": "what is written?"}
    entries = [entry | {"answers": ["CENTRE"], "image_path": "IIIT5K/0.png"}]
    entries.append(entry | {"answers": "ab", "dataset_name": "HME100k", "image_path": "IIIT5K/0.png"})
    write_json(folder / "OCRBench" / "OCRBench.json", entries)
    picture(folder / "OCRBench_Images" / "IIIT5K" / "0.png")


def pope(folder: Path) -> None:
    for sampling in ("random", "popular", "adversarial"):
        entry = {"question_id": 1, "image": "COCO_val2014_000000000042.jpg", "text": "Is there a dog in the image?"}
        write_lines(folder / "coco" / f"coco_pope_{sampling}.json", [entry | {"label": "no"}])
    picture(folder / "val2014" / "COCO_val2014_000000000042.jpg")


def easy_vqa(folder: Path, pictures: int = 3) -> None:
    rows = [
        [text, answer, number]
        for number in range(pictures)
        for text, answer in (
            ("what color is the shape?", "red"),
            ("is there a circle?", "no"),
            ("what shape?", "circle"),
        )
    ]
    write_json(folder / "test" / "questions.json", rows)
    for number in range(pictures):
        picture(folder / "test" / "images" / f"{number}.png", number)


SETS = {
    "vqav2": vqav2, "textvqa": textvqa, "docvqa": docvqa, "infovqa": infovqa, "chartqa": chartqa, "gqa": gqa,
    "scienceqa": scienceqa, "ocrbench": ocrbench, "pope": pope, "easy-vqa": easy_vqa,
}  # fmt: skip
