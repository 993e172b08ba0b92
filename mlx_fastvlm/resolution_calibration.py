"""Thresholds for `--resolution auto`, found by comparing a model's answers at lower resolutions with those at its own.

No labels are needed: what counts is whether an answer stays the same. Reading pictures and writing files is the
command's.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_fastvlm.auto_resolution import AutoResolution, candidates, measure_detail
from mlx_fastvlm.captions.captioning import caption_images
from mlx_fastvlm.errors import OptionError
from mlx_fastvlm.image_decoding import ImageSource, open_image
from mlx_fastvlm.model import FastVLM
from mlx_fastvlm.processor import Processor
from mlx_fastvlm.resolution import Fit

# Short answers: two descriptions of a paragraph are never the same word by word.
DEFAULT_PROMPTS = (
    "What is the main thing in this image? Answer with one or two words.",
    "How many people are in this image? Answer with a number.",
    "What is written in this image? Output only the text in the image.",
)
DEFAULT_AGREEMENT = 0.995
FEWEST_IMAGES = 20

_CUTS = 20  # thresholds are tried at so many quantiles of the images' detail


@dataclass(frozen=True)
class Calibration:
    """What was found.

    Attributes:
        auto: the thresholds.
        images: how many images they come from.
        agreement: share of answers that stay the same with them.
        area: mean of the squares' areas with them, over that of the trained resolution.
        fixed: resolution → share of answers that stay the same if all images are shown so.
    """

    auto: AutoResolution
    images: int
    agreement: float
    area: float
    fixed: dict[int, float]

    def to_dict(self) -> dict[str, Any]:
        """What `AutoResolution.from_file` reads, with the record of how it was found."""
        fixed = {str(resolution): round(share, 5) for resolution, share in self.fixed.items()}
        record = {"images": self.images, "agreement": round(self.agreement, 5), "area": round(self.area, 5)}
        return {**self.auto.to_dict(), "calibration": {**record, "agreement_of_fixed_resolutions": fixed}}


def calibrate_resolution(
    model: FastVLM,
    processor: Processor,
    images: Sequence[ImageSource],
    prompts: Sequence[str] = DEFAULT_PROMPTS,
    *,
    agreement: float = DEFAULT_AGREEMENT,
    fit: Fit | None = None,
    max_tokens: int = 32,
    on_answer: Callable[[int, int], None] | None = None,
) -> Calibration:
    """Ask every question about every image at every resolution, and find the cheapest thresholds that keep the answers.

    Args:
        model, processor: from `load`.
        images: like those that the model will see; each is read several times.
        prompts: questions with short answers.
        agreement: share of all answers that must stay the same, letter case and punctuation aside.
        fit, max_tokens: as `generate` takes them.
        on_answer: told how many answers are done, and of how many.

    Raises:
        OptionError: there are too few images or no prompts, or the agreement is no share.
        ImageError: an image cannot be read.
    """
    if len(images) < FEWEST_IMAGES:
        raise OptionError(
            f"{len(images)} images are given; at least {FEWEST_IMAGES} are needed, and hundreds are better."
        )
    if not prompts or not 0 < agreement <= 1:
        raise OptionError(f"Expected a prompt and an agreement above 0 up to 1; got {len(prompts)} and {agreement}.")
    trained = processor.image_processor.image_size
    background = processor.image_processor.background
    detail = [measure_detail(open_image(image, background=background), trained) for image in images]
    sides = [*candidates(trained), trained]
    runs = list(itertools.product(sides, prompts))
    answers: dict[int, list[list[str]]] = {side: [] for side in sides}
    for number, (side, prompt) in enumerate(runs):
        captions = caption_images(model, processor, images, prompt, resolution=side, fit=fit, max_tokens=max_tokens)
        texts = []
        for caption in captions:
            if caption.error is not None:
                raise OptionError(caption.error)
            texts.append(_plain(caption.text))
            if on_answer is not None:
                on_answer(number * len(images) + len(texts), len(runs) * len(images))
        answers[side].append(texts)
    wanted = np.array(answers[trained])
    same = {side: (np.array(answers[side]) == wanted).mean(axis=0) for side in sides}
    return find_thresholds(trained, detail, same, agreement)


def find_thresholds(
    trained: int, detail: Sequence[float], same: dict[int, np.ndarray], agreement: float
) -> Calibration:
    """The thresholds with the least mean area among those that keep enough answers.

    Args:
        trained: resolution.
        detail: of each image.
        same: resolution → for each image, the share of answers that stay the same.
        agreement: mean share wanted.
    """
    order = np.argsort(detail)
    levels, count = np.asarray(detail)[order], len(detail)
    sides = sorted(same)
    kept = {side: np.concatenate([[0.0], np.cumsum(same[side][order])]) for side in sides}
    # Between different levels only: a threshold takes in all that are equal to it.
    apart = [0, *(i for i in range(1, count) if levels[i - 1] < levels[i]), count]
    cuts = sorted({min(apart, key=lambda cut: abs(cut - count * step / _CUTS)) for step in range(_CUTS + 1)})
    best = (trained**2 * count, float(kept[trained][-1]), [(trained, 0, count)])
    for ends in itertools.combinations_with_replacement(cuts, len(sides) - 1):
        parts = [part for part in zip(sides, (0, *ends), (*ends, count), strict=True) if part[1] < part[2]]
        area = sum(side**2 * (stop - start) for side, start, stop in parts)
        total = sum(kept[side][stop] - kept[side][start] for side, start, stop in parts)
        if total >= agreement * count - 1e-9 and area < best[0]:
            best = (area, float(total), parts)
    area, total, parts = best
    steps = tuple((side, float(levels[stop - 1])) for side, _, stop in parts if side < trained)
    return Calibration(
        AutoResolution(trained, steps),
        images=count,
        agreement=total / count,
        area=area / (trained**2 * count),
        fixed={side: float(np.mean(same[side])) for side in sides},
    )


def _plain(text: str) -> str:
    """An answer without what does not change its meaning."""
    return " ".join(re.sub(r"[^\w\s]", " ", text.casefold()).split())
