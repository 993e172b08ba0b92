"""Published measurements that the performance model is held against, and one that it is fitted to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .apple_chips import chip_named
from .layer_work import MLX_VLM, decode_step, encode_stages, prefill_stage, project_stage
from .performance_model import predict
from .random_model import random_config

# Runs of mlx-vlm, FastVLM-0.5B in bfloat16, by the owner of a 40-core M4 Max, later of a 40-core M5 Max. Counted from every
# version of src/output/results.jsonl up to commit d9538f8e; medians. Prompts are given without the 256 image rows.
_CHECK_MODELS = "https://github.com/jrp2014/check_models"
_PAPER = "https://arxiv.org/abs/2412.13303"
_IMAGE_ROWS = 256


@dataclass(frozen=True)
class Point:
    """A published figure and how to predict it.

    Attributes:
        what: chip, model and quantity.
        published: in `unit`.
        spread: of the runs behind it, as text; empty if not published.
        unit: "ms" or "tok/s".
        predict: → the prediction in `unit`.
        url: the source.
        fitted: whether a constant of the model comes from it, so that it proves nothing.
    """

    what: str
    published: float
    spread: str
    unit: str
    predict: Callable[[], float]
    url: str
    fitted: bool = False

    @property
    def error(self) -> float:
        """Predicted time over published time, less one: above zero the model is too slow."""
        predicted = self.predict()
        ratio = predicted / self.published if self.unit == "ms" else self.published / predicted
        return ratio - 1


def _decode(chip: str, context: int) -> float:
    step = decode_step(random_config("0.5b").text_config, MLX_VLM, context)
    return 1 / predict(step, chip_named(chip)).seconds


def _prefill_ms(chip: str, size: str, tokens: int) -> float:
    launches = prefill_stage(random_config(size).text_config, MLX_VLM, tokens)
    return predict(launches, chip_named(chip)).seconds * 1e3


def _first_token_ms(chip: str, text_tokens: int) -> float:
    config = random_config("0.5b")
    tower = [launch for stage in encode_stages(config.vision_config, MLX_VLM).values() for launch in stage]
    prefill = prefill_stage(config.text_config, MLX_VLM, text_tokens + _IMAGE_ROWS)
    return predict([*tower, *project_stage(config), *prefill], chip_named(chip)).seconds * 1e3


POINTS = (
    Point(
        "M4 Max, mlx-vlm 0.5B, decode at context 718",
        307.9,
        "283–316, 30 runs",
        "tok/s",
        lambda: _decode("M4 Max", 718),
        _CHECK_MODELS,
        fitted=True,
    ),
    Point(
        "M5 Max, mlx-vlm 0.5B, decode at context 825",
        346.6,
        "292–362, 65 runs",
        "tok/s",
        lambda: _decode("M5 Max", 825),
        _CHECK_MODELS,
    ),
    Point(
        "M5 Max, mlx-vlm 0.5B, encode and prefill, 26 text tokens",
        81.4,
        "71–102, 35 warm runs",
        "ms",
        lambda: _first_token_ms("M5 Max", 26),
        _CHECK_MODELS,
    ),
    Point(
        "M5 Max, mlx-vlm 0.5B, encode and prefill, 517 text tokens",
        101.6,
        "97–116, 39 warm runs",
        "ms",
        lambda: _first_token_ms("M5 Max", 517),
        _CHECK_MODELS,
    ),
    Point("M1 Max, MLX 0.5B, prefill of 256 rows", 50.5, "", "ms", lambda: _prefill_ms("M1 Max", "0.5b", 256), _PAPER),
    Point("M1 Max, MLX 1.5B, prefill of 256 rows", 116.1, "", "ms", lambda: _prefill_ms("M1 Max", "1.5b", 256), _PAPER),
    Point("M1 Max, MLX 7B, prefill of 256 rows", 524.5, "", "ms", lambda: _prefill_ms("M1 Max", "7b", 256), _PAPER),
)
