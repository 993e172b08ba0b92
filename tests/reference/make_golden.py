"""Writes tests/golden: run `python -m tests.reference.make_golden` from the repository root.

Needs torch, timm, transformers, pillow and regex. Checkpoints are not stored: hub_checkpoint makes the same bytes from
the seed everywhere, and their SHA-256 is kept with the results. Arrays are .npz without pickle, text is JSON.
"""

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen2Tokenizer

from .golden_images import PREPROCESSED_SIZE, SHAPES, draw, preprocess
from .golden_text import CONVERSATIONS, STRINGS
from .hub_checkpoint import write_hub_checkpoint
from .python_bpe import PythonBPE
from .tensor_layout import FORMS
from .torch_reference import IMAGE_TOKEN_ID, TorchReference, load_reference

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
# Found by trying: the prompts give varied tokens that depend on the image, and no greedy step is nearly a tie.
SEEDS = {"inference": 102, "training": 3}
GREEDY_TOKENS = 16
SMALLEST_MARGIN = 0.04  # between the best and the second logit at every greedy step
TINY_SIZE = 256


def pixel_images() -> np.ndarray:
    """(2, 256, 256, 3) uint8 in blocks of 4 × 4, which compress well; the model's inputs are these over 255."""
    small = [draw(TINY_SIZE // 4, TINY_SIZE // 4, "RGB", phase) for phase in (0.0, 0.37)]
    return np.stack([np.asarray(image).repeat(4, axis=0).repeat(4, axis=1) for image in small])


def pixel_values() -> np.ndarray:
    """(2, 3, 256, 256) float32 in [0, 1]."""
    return (pixel_images().astype(np.float32) / np.float32(255)).transpose(0, 3, 1, 2)


def prompt_ids(tokenizer: Qwen2Tokenizer, prompt: str) -> list[int]:
    """The text around each <image> tokenized on its own, with -200 between (ml-fastvlm mm_utils.py)."""
    first, *rest = [tokenizer(piece).input_ids for piece in prompt.split("<image>")]
    return [*first, *(token for piece in rest for token in (IMAGE_TOKEN_ID, *piece))]


def greedy(reference: TorchReference, ids: list[int], images: np.ndarray | None) -> np.ndarray:
    """(16,) int32, checked to be far enough from a tie that rounding cannot change them."""
    tokens = reference.greedy(ids, images, GREEDY_TOKENS)
    logits = reference.logits([*ids, *tokens[:-1]], images)[0, -GREEDY_TOKENS:]
    best, second = logits.topk(2).values.unbind(-1)
    if logits.argmax(-1).tolist() != tokens or (best - second).min() < SMALLEST_MARGIN:
        raise AssertionError(f"choose another seed: a greedy step is within {float((best - second).min())} of a tie")
    return np.array(tokens, dtype=np.int32)


def model_golden(form: str) -> dict[str, np.ndarray]:
    """Features, logits and greedy tokens of the tiny checkpoint in one form."""
    with tempfile.TemporaryDirectory() as name:
        folder = write_hub_checkpoint(name, config="tiny", form=form, seed=SEEDS[form])
        digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        reference = load_reference(folder)
        tokenizer = Qwen2Tokenizer.from_pretrained(folder)
    pixels = pixel_values()
    ids = {key: prompt_ids(tokenizer, chat_prompt(tokenizer, key)) for key in ("one_image", "two_images", "text_only")}
    features = reference.image_features(pixels)
    result: dict[str, Any] = {
        "seed": np.int64(SEEDS[form]),
        "model_sha256": np.array(digest),
        "features": features.numpy(),
        "projected": reference.project(features).numpy(),
    }
    for key, images in (("one_image", pixels[:1]), ("two_images", pixels), ("text_only", None)):
        result[f"{key}_ids"] = np.array(ids[key], dtype=np.int32)
        result[f"{key}_logits"] = reference.logits(ids[key], images)[0].numpy()
        result[f"{key}_greedy"] = greedy(reference, ids[key], images)
    result["other_image_greedy"] = greedy(reference, ids["one_image"], pixels[1:])
    return result


def chat_prompt(tokenizer: Qwen2Tokenizer, conversation: str) -> str:
    return tokenizer.apply_chat_template(CONVERSATIONS[conversation], tokenize=False, add_generation_prompt=True)


def tokenization_golden() -> dict[str, Any]:
    """Ids, decoded text and prompts of the tiny vocabulary; plain Python must agree with transformers."""
    with tempfile.TemporaryDirectory() as name:
        folder = write_hub_checkpoint(name, config="tiny")
        tokenizer = Qwen2Tokenizer.from_pretrained(folder)
        python = PythonBPE(folder)
    strings = []
    for text in STRINGS:
        ids = tokenizer(text).input_ids
        if ids != python.encode(text):
            raise AssertionError(f"transformers and plain Python tokenize {text!r} differently")
        decoded = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        strings.append({"text": text, "ids": ids, "decoded": decoded})
    prompts = {}
    for key, messages in CONVERSATIONS.items():
        prompt = chat_prompt(tokenizer, key)
        prompts[key] = {"messages": messages, "prompt": prompt, "ids": prompt_ids(tokenizer, prompt)}
    return {"strings": strings, "prompts": prompts}


def preprocessing_golden(images: Path) -> dict[str, np.ndarray]:
    """Saves the inputs as PNG; returns (128, 128, 3) uint8 results by image and policy, and how far x 255 was off."""
    images.mkdir(parents=True, exist_ok=True)
    result: dict[str, np.ndarray] = {}
    error = 0.0
    for name, shape in SHAPES.items():
        image = draw(*shape)
        image.save(images / f"{name}.png", optimize=True)
        for policy in ("pad", "crop"):
            values = preprocess(image, PREPROCESSED_SIZE, pad=policy == "pad")
            pixels = np.rint(values * 255).astype(np.uint8)
            error = max(error, float(np.abs(values - pixels.astype(np.float32) / np.float32(255)).max()))
            result[f"{name}_{policy}"] = pixels.transpose(1, 2, 0)
    result["float_error"] = np.float64(error)
    return result


def main() -> None:
    torch.manual_seed(0)
    GOLDEN.mkdir(exist_ok=True)
    np.savez_compressed(GOLDEN / "pixels.npz", pixels=pixel_images())
    for form in FORMS:
        np.savez_compressed(GOLDEN / f"tiny_{form}.npz", **model_golden(form))
    np.savez_compressed(GOLDEN / "preprocessing.npz", **preprocessing_golden(GOLDEN / "images"))
    text = json.dumps(tokenization_golden(), ensure_ascii=False, indent=1)
    (GOLDEN / "tokenization.json").write_text(text + "\n", encoding="utf-8")
    for path in sorted(GOLDEN.rglob("*.*")):
        print(f"{path.stat().st_size:8d}  {path.relative_to(GOLDEN)}")


if __name__ == "__main__":
    main()
