"""What stands between a person and the model: images → pixel values, words → ids, ids → words."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
from tokenizers import Tokenizer

from mlx_fastvlm.auto_resolution import AUTO, FILE_NAME, AutoResolution
from mlx_fastvlm.config import FastVLMConfig
from mlx_fastvlm.errors import CheckpointError, ConfigError, FastVLMWarning, OptionError
from mlx_fastvlm.image_decoding import ImageSource
from mlx_fastvlm.image_processing import ImageProcessor
from mlx_fastvlm.json_file import read_json_object
from mlx_fastvlm.prompt import Message, build_prompt, tokenize_prompt
from mlx_fastvlm.resolution import Fit, check_resolution
from mlx_fastvlm.text_stream import TextStream
from mlx_fastvlm.tiling import Grid, Tiling

STOP_TOKENS = ("<|im_end|>", "<|endoftext|>")


class Processor:
    """Tokenizer and image preprocessing of one model.

    Args:
        tokenizer: the model's tokenizer.
        image_processor: how images become pixel values, as the model was trained.
        eos_token_ids: ids that end an answer.
        auto_resolution: the thresholds of resolution "auto"; None for guessed ones.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        image_processor: ImageProcessor,
        eos_token_ids: frozenset[int],
        auto_resolution: AutoResolution | None = None,
    ):
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.eos_token_ids = eos_token_ids
        self.auto_resolution = auto_resolution
        self._noticed: set[ImageProcessor] = set()

    @classmethod
    def from_folder(cls, folder: Path, config: FastVLMConfig) -> Processor:
        """Read tokenizer.json and preprocessor_config.json of a converted model, and auto_resolution.json if it is there.

        Raises:
            CheckpointError, OptionError: a file is missing or damaged.
        """
        path = folder / "tokenizer.json"
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception, for a missing file too
            raise CheckpointError(f"{path} cannot be read ({error}); convert the model again.") from None
        path = folder / "preprocessor_config.json"
        try:
            image_processor = ImageProcessor.from_config(read_json_object(path, ConfigError))
        except (ValueError, TypeError, AttributeError, ConfigError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}); convert the model again.") from None
        image_processor = replace(image_processor, tiling=_tiling_of(config))
        stops = {tokenizer.token_to_id(token) for token in STOP_TOKENS} - {None}
        path = folder / FILE_NAME
        auto_resolution = AutoResolution.from_file(path) if path.exists() else None
        return cls(tokenizer, image_processor, frozenset(stops | set(config.eos_token_id)), auto_resolution)

    def tile(self, grids: Sequence[Grid]) -> None:
        """Have fit "tiles" choose from these grids, (columns, rows) each. Raises OptionError if they cannot be had."""
        tiling = replace(self.image_processor.tiling, grids=tuple(grids))
        self.image_processor = replace(self.image_processor, tiling=tiling)

    def preprocess(self, image: ImageSource) -> mx.array:
        """Anything that names or holds an image → (1, R, R, 3) in [0, 1]. Raises ImageError."""
        return self.image_processor.preprocess(image)

    def images_at(self, resolution: int | str | AutoResolution | None, fit: Fit | None) -> ImageProcessor:
        """`image_processor` at another resolution or fit; warns, once for each, of what the model was not trained on.

        Args:
            resolution, fit: see `GenerationOptions`.

        Raises:
            OptionError: they cannot be had.
        """
        trained = self.image_processor
        if resolution == AUTO:
            resolution = self.auto_resolution or AutoResolution.guessed(trained.image_size)
        if isinstance(resolution, AutoResolution):
            if resolution.trained != trained.image_size:
                raise OptionError(
                    f"The thresholds are for a model trained on {resolution.trained} pixels, this one was on "
                    f"{trained.image_size}: run mlx-fastvlm calibrate-resolution with this one."
                )
            for side, _ in resolution.steps:
                check_resolution(side, trained.resolutions)
            chosen = replace(trained.at(fit=fit), auto=resolution)
        else:
            chosen = trained.at(resolution, fit)
        notices = _notices(trained, chosen)
        if notices and chosen not in self._noticed:
            self._noticed.add(chosen)
            warnings.warn(" ".join(notices), FastVLMWarning, stacklevel=3)
        return chosen

    def tokenize(self, prompt: str | Sequence[Message], num_images: int = 0, system: str | None = None) -> list[int]:
        """A question or a conversation → ids, -200 at each image. Raises OptionError as `build_prompt` does."""
        return tokenize_prompt(self.tokenizer, build_prompt(prompt, num_images, system))

    def decode(self, token_ids: Sequence[int]) -> str:
        """Ids → text without special tokens."""
        return self.tokenizer.decode(list(token_ids))

    def text_stream(self, stop: Sequence[str] = ()) -> TextStream:
        """A fresh stream that turns one answer's tokens into text."""
        return TextStream(self.tokenizer, stop)


def _tiling_of(config: FastVLMConfig) -> Tiling:
    """How tiles are cut and merged as the checkpoint's config.json has it."""
    return Tiling.of_model(config.image_grid_pinpoints, config.mm_patch_merge_type, config.vision_config.image_size)


def _notices(trained: ImageProcessor, chosen: ImageProcessor) -> list[str]:
    """What people should know who choose other images than a model was trained on."""
    notices = []
    if chosen.image_size != trained.image_size:
        notices.append(
            f"This model was trained mainly on images of {trained.image_size}x{trained.image_size} pixels; "
            f"at {chosen.image_size} its answers may be worse."
        )
    if chosen.auto is not None and not chosen.auto.calibrated:
        notices.append(
            "The thresholds of resolution auto are guessed for this model: mlx-fastvlm calibrate-resolution finds better ones."
        )
    if chosen.fit == "native" != trained.fit:
        notices.append("This model was trained mainly on square images; of rectangles (fit native) it may say less.")
    if chosen.fit == "tiles" != trained.fit:
        notices.append(
            "This model was trained on whole pictures; of one in tiles it may say less, or take its parts apart."
        )
    return notices
