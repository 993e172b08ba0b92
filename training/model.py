"""The demo FastVLM: FastViTHD tower, two-layer projector and transformers' Qwen2, under LlavaQwen2's names."""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Cache, Qwen2Config, Qwen2Model

from training.data import IGNORE
from training.fastvithd import FastViTHD
from training.packing import Packed
from training.prompts import IMAGE_TOKEN_INDEX

TOWER_PREFIX = "vision_tower.vision_tower.model."


class FastVLM(nn.Module):
    """Image features spliced between two pieces of text, decoded by a causal language model.

    `named_state` gives the checkpoint's tensors; the embedding is tied, so there is no lm_head.

    Args:
        config: a LlavaQwen2 config.json as a dict, with the demo's `vision_config`.
    """

    def __init__(self, config: dict):
        super().__init__()
        hidden = config["hidden_size"]
        self.image_size = config["vision_config"]["image_size"]
        self.tower = FastViTHD(config["vision_config"])
        self.mm_projector = nn.Sequential(
            nn.Linear(config["mm_hidden_size"], hidden), nn.GELU(), nn.Linear(hidden, hidden)
        )
        fields = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        fields += ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings")
        rope = {"rope_type": "default", "rope_theta": config["rope_theta"]}
        self.decoder = Qwen2Model(Qwen2Config(**{name: config[name] for name in fields}, rope_parameters=rope))

    def encode_images(self, features: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) tower output → (B, H*W, hidden), row-major over the map."""
        return self.mm_projector(features.flatten(2).transpose(1, 2))

    def decode(
        self,
        input_ids: torch.Tensor,
        image_features: torch.Tensor | None,
        position_ids: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        cache: Cache | None = None,
    ) -> torch.Tensor:
        """Hidden states (B, L, hidden) of token ids (B, L), with image rows (B, N, hidden) at the placeholders."""
        is_image = input_ids == IMAGE_TOKEN_INDEX
        embeds = self.decoder.embed_tokens(input_ids.masked_fill(is_image, 0))
        if image_features is not None:
            embeds = embeds.masked_scatter(is_image[..., None], image_features.to(embeds.dtype))
        output = self.decoder(
            inputs_embeds=embeds,
            position_ids=position_ids,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=cache is not None,
        )
        return output.last_hidden_state

    def answer_loss(self, packed: Packed, image_features: torch.Tensor | None) -> torch.Tensor:
        """Weighted mean cross-entropy over the answers' tokens."""
        hidden = self.decode(packed.input_ids, image_features, packed.position_ids, packed.mask)
        known = packed.labels != IGNORE
        losses = F.cross_entropy(self.logits(hidden[known]), packed.labels[known], reduction="none")
        weights = packed.weights[known]
        return (losses * weights).sum() / weights.sum()

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden, self.decoder.embed_tokens.weight)

    def named_state(self) -> dict[str, torch.Tensor]:
        """Checkpoint name → tensor, as in a LlavaQwen2 folder before reparameterization."""
        parts = ((TOWER_PREFIX, self.tower), ("mm_projector.", self.mm_projector), ("", self.decoder))
        return {f"model.{prefix}{name}": t for prefix, part in parts for name, t in part.state_dict().items()}

    def load_named_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Strictly load what `named_state` gave."""
        own = self.named_state()
        if own.keys() != tensors.keys():
            raise ValueError(f"checkpoint keys differ: {sorted(own.keys() ^ tensors.keys())[:4]} ...")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(tensors[name])
