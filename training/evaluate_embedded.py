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

from PIL import Image

from mlx_fastvlm import generate_step, load
from mlx_fastvlm.generate import prefill
from mlx_fastvlm.sampling import make_sampler
from training import easy_vqa_data, prompts, scenes, text_pictures

# As in training.data, which needs torch.
TEST_SEEDS = 2_000_000_000
MAX_TOKENS = 64

Asked = tuple[Image.Image, list[tuple[str, str]]]  # a picture, and (prompt, expected answer) pairs about it


def easy_vqa_test() -> Iterable[Asked]:
    """The official test set."""
    images = easy_vqa_data.load_images("test")
    return ((images[i], pairs) for i, pairs in sorted(easy_vqa_data.load_questions("test").items()))


def unseen_scenes(count: int) -> Iterable[Asked]:
    """Scenes to describe."""
    drawn = (scenes.make_scene(TEST_SEEDS + i) for i in range(count))
    return ((scenes.render(scene), [(prompts.DESCRIBE[0], scenes.caption(scene))]) for scene in drawn)


def unseen_texts(count: int) -> Iterable[Asked]:
    """Printed words and numbers to read."""
    drawn = (text_pictures.make_text_picture(TEST_SEEDS + i) for i in range(count))
    return ((text_pictures.render(picture), [(prompts.READ[1], picture.text)]) for picture in drawn)


class Examiner:
    """Asks a model and compares; an image is encoded once for all questions about it."""

    def __init__(self, name: str):
        self.model, self.processor = load(name)

    def answer(self, rows, prompt: str) -> str:
        cache = self.model.make_cache()
        logits = prefill(self.model, self.model.embed(self.processor.tokenize(prompt, 1), rows), cache)
        tokens = []
        for token in generate_step(logits, self.model, cache, max_tokens=MAX_TOKENS, sampler=make_sampler()):
            if token in self.processor.eos_token_ids:
                break
            tokens.append(token)
        return self.processor.decode(tokens)

    def exact_match(self, name: str, asked: Iterable[Asked]) -> dict:
        """Share of questions answered exactly; prints the first few misses."""
        right = total = 0
        started = time.perf_counter()
        for image, pairs in asked:
            rows = self.model.encode_images(self.processor.preprocess(image))
            for prompt, expected in pairs:
                found = self.answer(rows, prompt)
                right, total = right + (found == expected), total + 1
                if found != expected and total - right <= 3:
                    print(f"{name}: {prompt!r} expected {expected!r} got {found!r}", flush=True)
        return {
            "exact_match": round(right / total, 5),
            "questions": total,
            "seconds": round(time.perf_counter() - started, 1),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--count", type=int, default=1000, help="generated pictures of each kind (default 1000)")
    parser.add_argument("--output", type=Path, help="write the numbers as JSON here")
    args = parser.parse_args()
    examiner = Examiner(args.model)
    report = {
        "easy_vqa_test": examiner.exact_match("easy_vqa_test", easy_vqa_test()),
        "scene_captions": examiner.exact_match("scene_captions", unseen_scenes(args.count)),
        "read_text": examiner.exact_match("read_text", unseen_texts(args.count)),
    }
    print(json.dumps(report, indent=2))
    if args.output:
        args.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
