"""FastVLM: vision tower + projector + decoder, and where image rows go among the words."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from mlx_fastvlm.cache import Cache
from mlx_fastvlm.clip_head import ClipHead
from mlx_fastvlm.config import IMAGE_TOKEN_INDEX, FastVLMConfig
from mlx_fastvlm.fastvithd import FastViTHD
from mlx_fastvlm.layers import Linear, quantize_layers
from mlx_fastvlm.qwen2 import Qwen2


class FastVLM(nn.Module):
    """The model. Build it with `mlx_fastvlm.load`, which also fills in the weights.

    Attributes:
        clip_head: maps pooled tower features into CLIP's space, where the checkpoint has it; answering does not need it.
    """

    def __init__(self, config: FastVLMConfig):
        super().__init__()
        self.config = config
        self.vision_tower = FastViTHD(config.vision_config)
        hidden_size = config.text_config.hidden_size
        # LLaVA's `mlp2x_gelu`, numbered as in the checkpoint's nn.Sequential.
        self.mm_projector = [
            Linear(config.vision_config.hidden_size, hidden_size),
            nn.GELU(),
            Linear(hidden_size, hidden_size),
        ]
        self.language_model = Qwen2(config.text_config)
        self.clip_head: ClipHead | None = None
        if config.quantization is not None:
            quantize_layers(self, config.quantization)

    @property
    def dtype(self) -> mx.Dtype:
        """Type the network computes in."""
        return self.language_model.norm.weight.dtype

    def make_cache(self, kv_bits: int | None = None) -> list[Cache]:
        """An empty KV cache for one sequence (or one batch of equally long ones).

        Args:
            kv_bits: 2, 3, 4, 5, 6 or 8 to hold keys and values quantized; None as they are computed.

        Raises:
            OptionError: the model's heads cannot be quantized so.
        """
        return self.language_model.make_cache(kv_bits)

    def encode_images(self, pixel_values: mx.array) -> mx.array:
        """Images as the decoder sees them.

        Args:
            pixel_values: (B, H, W, 3) in [0, 1], H and W multiples of 64.

        Returns:
            (B, H/64 · W/64, hidden_size of the decoder).
        """
        return self.project(self.vision_tower(pixel_values.astype(self.dtype)))

    def project(self, features: mx.array) -> mx.array:
        """Tower features (..., feature width) → decoder width: Linear → exact GELU → Linear."""
        first, _, last = self.mm_projector
        return last(first(features, gelu=True))

    def embed(self, input_ids: Sequence[int], image_features: mx.array | Sequence[mx.array] | None = None) -> mx.array:
        """Token embeddings with each image's rows in place of its placeholder.

        Args:
            input_ids: token ids of one sequence; -200 stands for an image.
            image_features: (num_images, N, hidden) or a list of (N_i, hidden), in the order of the placeholders.

        Returns:
            (1, L, hidden), where L counts text tokens plus all image rows.

        Raises:
            ValueError: the number of placeholders is not the number of images.
        """
        images = [] if image_features is None else list(image_features)
        pieces: list[mx.array] = []
        text: list[int] = []
        remaining = iter(images)
        marks = 0
        for token in input_ids:
            if token != IMAGE_TOKEN_INDEX:
                text.append(token)
                continue
            marks += 1
            if text:
                pieces.append(self.language_model.embed_tokens(mx.array(text)))
                text = []
            pieces.append(next(remaining, None))
        if marks != len(images):
            raise ValueError(f"The prompt has {marks} image placeholders, but {len(images)} images were given.")
        if text:
            pieces.append(self.language_model.embed_tokens(mx.array(text)))
        return mx.concatenate(pieces, axis=0)[None]

    def __call__(
        self,
        input_ids: Sequence[int],
        image_features: mx.array | Sequence[mx.array] | None = None,
        cache: list[Cache] | None = None,
    ) -> mx.array:
        """Logits for every position of one sequence.

        Args:
            input_ids: token ids, -200 at each image; they follow what `cache` holds.
            image_features: as `encode_images` returns them, one per placeholder.
            cache: from `make_cache`; extended in place. None starts afresh and forgets.

        Returns:
            (1, L, vocab_size), L as in `embed`.
        """
        cache = self.make_cache() if cache is None else cache
        hidden = self.language_model.hidden_states(self.embed(input_ids, image_features), cache)
        return self.language_model.logits(hidden)
