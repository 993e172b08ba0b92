"""What can be chosen for an answer, in one place: Python, the command line and batches all take these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mlx_fastvlm.auto_resolution import AUTO, AutoResolution
from mlx_fastvlm.cache import KV_BITS
from mlx_fastvlm.errors import OptionError
from mlx_fastvlm.logprobs import MAX_TOP
from mlx_fastvlm.resolution import Fit, check_fit, check_resolution
from mlx_fastvlm.sampling import make_sampler

DEFAULT_MAX_TOKENS = 256


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How an answer is made.

    Attributes:
        max_tokens: longest answer in tokens.
        temp, top_p, top_k, seed: see `sampling.make_sampler`.
        repetition_penalty: 1 changes nothing; above 1 discourages tokens of this answer from returning.
        stop: strings that end the answer; they are not part of it. One string stands for a list of one.
        system: system line in place of the default.
        kv_bits: 2, 3, 4, 5, 6 or 8 to hold keys and values quantized, for less memory in long contexts.
        json_schema: a JSON schema, as an object or its text, that the answer follows; True for any JSON object.
        choices: the answer is one of these.
        logprobs: None asks for none; 0 to 20 for the log-probability of each token drawn, and of so many likeliest ones.
        resolution: side of the square in which the tower sees each image, in pixels: a multiple of 64 from 256 to 2048
            (for models trained on less than 1024, from a quarter of that). None for the one of training. An image takes
            (resolution / 64)² positions. "auto" chooses for each image by its detail, with the thresholds of the
            model's folder or those given.
        fit: "pad" makes the square by padding, "crop" by cutting; "native" shows the whole image as a rectangle with
            sides in multiples of 64, the longer one the resolution or a little less (`resolution.native_size`); "tiles"
            shows it whole in one square and in parts in others (`tiling`). None for the one of training.

    Raises:
        OptionError: a value is out of range, or two exclude each other. That a schema can be followed is known only
            with a model's vocabulary (`constraint.make_constraint`).
    """

    max_tokens: int = DEFAULT_MAX_TOKENS
    temp: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: Sequence[str] = ()
    system: str | None = None
    kv_bits: int | None = None
    json_schema: Mapping[str, Any] | str | bool | None = None
    choices: Sequence[str] | None = None
    logprobs: int | None = None
    resolution: int | Literal["auto"] | AutoResolution | None = None
    fit: Fit | None = None

    def __post_init__(self) -> None:
        make_sampler(self.temp, self.top_p, self.top_k, self.seed)
        if self.max_tokens < 1:
            raise OptionError(f"max_tokens is {self.max_tokens}; expected 1 or more.")
        if not 0 < self.repetition_penalty < float("inf"):
            raise OptionError(f"repetition_penalty is {self.repetition_penalty}; expected a value above 0.")
        if self.kv_bits is not None and self.kv_bits not in KV_BITS:
            raise OptionError(f"kv_bits is {self.kv_bits}; expected one of {', '.join(map(str, KV_BITS))}.")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_TOP:
            raise OptionError(f"logprobs is {self.logprobs}; expected 0 to {MAX_TOP}.")
        if self.resolution not in (None, AUTO) and not isinstance(self.resolution, AutoResolution):
            check_resolution(self.resolution)
        if self.fit is not None:
            check_fit(self.fit)
        if self.json_schema is not None and self.choices is not None:
            raise OptionError("Both json_schema and choices are given; give one of them.")
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))

    @property
    def is_constrained(self) -> bool:
        """Whether the answer must follow a form."""
        return self.json_schema is not None or self.choices is not None
