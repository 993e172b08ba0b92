"""What stands between a person and the model: images → pixel values, words → ids, ids → words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
from tokenizers import Tokenizer

from mlx_fastvlm.config import FastVLMConfig
from mlx_fastvlm.errors import CheckpointError, ConfigError
from mlx_fastvlm.image_processing import ImageProcessor, ImageSource
from mlx_fastvlm.json_file import read_json_object
from mlx_fastvlm.prompt import Message, build_prompt, tokenize_prompt
from mlx_fastvlm.text_stream import TextStream

STOP_TOKENS = ("<|im_end|>", "<|endoftext|>")


class Processor:
    """Tokenizer and image preprocessing of one model.

    Args:
        tokenizer: the model's tokenizer.
        image_processor: how images become pixel values.
        eos_token_ids: ids that end an answer.
    """

    def __init__(self, tokenizer: Tokenizer, image_processor: ImageProcessor, eos_token_ids: frozenset[int]):
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.eos_token_ids = eos_token_ids

    @classmethod
    def from_folder(cls, folder: Path, config: FastVLMConfig) -> Processor:
        """Read tokenizer.json and preprocessor_config.json of a converted model.

        Raises:
            CheckpointError: a file is missing or damaged.
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
        stops = {tokenizer.token_to_id(token) for token in STOP_TOKENS} - {None}
        return cls(tokenizer, image_processor, frozenset(stops | set(config.eos_token_id)))

    def preprocess(self, image: ImageSource) -> mx.array:
        """Anything that names or holds an image → (1, R, R, 3) in [0, 1]. Raises ImageError."""
        return self.image_processor.preprocess(image)

    def tokenize(self, prompt: str | Sequence[Message], num_images: int = 0, system: str | None = None) -> list[int]:
        """A question or a conversation → ids, -200 at each image. Raises OptionError as `build_prompt` does."""
        return tokenize_prompt(self.tokenizer, build_prompt(prompt, num_images, system))

    def decode(self, token_ids: Sequence[int]) -> str:
        """Ids → text without special tokens."""
        return self.tokenizer.decode(list(token_ids))

    def text_stream(self, stop: Sequence[str] = ()) -> TextStream:
        """A fresh stream that turns one answer's tokens into text."""
        return TextStream(self.tokenizer, stop)
