"""FastVLM from other people's parts: timm's FastVit, two torch Linears, transformers' Qwen2ForCausalLM.

It reads the same hub folder as the converter and shares no code with it: timm's own `checkpoint_filter_fn` translates
Apple's tower names, every state dict is loaded strictly, and everything runs in float32 unless told otherwise.
"""

import json
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from timm.layers import LayerNorm2d
from timm.models.fastvit import FastVit, RepConditionalPosEnc, checkpoint_filter_fn
from timm.utils.model import reparameterize_model
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from .presets import Config, TowerSize, tower_size

IMAGE_TOKEN_ID = -200
TOWER_PREFIX = "model.vision_tower.vision_tower.model."
PROJECTOR_PREFIX = "model.mm_projector."
State = dict[str, torch.Tensor]
PixelValues = torch.Tensor | np.ndarray


def read_tensors(folder: Path) -> State:
    """Every tensor of a hub folder, from one file or from the shards the index names."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.exists():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    state: State = {}
    for name in names:
        with safe_open(folder / name, framework="pt") as file:
            state.update({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118 - not a dict
    return state


def build_tower(size: TowerSize, *, inference_mode: bool) -> FastVit:
    """timm's fastvit_mci3 (timm/models/fastvit.py) at any width and depth."""
    if size.head_dim != 32:
        raise ValueError(f"timm fixes head_dim at 32, not {size.head_dim}")
    position = partial(RepConditionalPosEnc, spatial_shape=(7, 7))
    return FastVit(
        layers=size.layers,
        embed_dims=size.embed_dims,
        mlp_ratios=size.mlp_ratios,
        cls_ratio=size.cls_ratio,
        num_classes=size.projection_dim,
        token_mixers=("repmixer", "repmixer", "repmixer", "attention", "attention"),
        se_downsamples=(False,) * 5,
        downsamples=(False, True, True, True, True),
        pos_embs=(None, None, None, position, position),
        lkc_use_act=True,
        stem_use_scale_branch=False,
        norm_layer=partial(LayerNorm2d, eps=1e-5),
        inference_mode=inference_mode,
    )


def load_tower(size: TowerSize, apple_state: State) -> FastVit:
    """A tower with Apple's tensors (names without the prefix), in whichever form they are.

    `checkpoint_filter_fn` was written for training form. Two names of the inference form are left to us: the large
    kernel's `lkb_reparam`, and RepCPE's `reparam_conv`, which it takes for a block. It turns `head.proj` into the
    classifier with a zero bias, so CLIP's head is loaded too and strict loading covers every tensor.
    """
    inference_mode = "patch_embed.0.reparam_conv.weight" in apple_state
    tower = build_tower(size, inference_mode=inference_mode)
    state = checkpoint_filter_fn(dict(apple_state), tower)
    if inference_mode:
        state = {_inference_name(name): tensor for name, tensor in state.items()}
    tower.load_state_dict(state, strict=True)
    return tower.eval()


def _inference_name(name: str) -> str:
    name = name.replace(".lkb_reparam.", ".reparam_conv.")
    return re.sub(r"^(stages\.\d+)\.blocks\.reparam_conv\.", r"\1.pos_emb.reparam_conv.", name)


def build_projector(config: Config) -> nn.Sequential:
    """LLaVA's mlp2x_gelu, with the exact GELU."""
    hidden = config["hidden_size"]
    return nn.Sequential(nn.Linear(config["mm_hidden_size"], hidden), nn.GELU(), nn.Linear(hidden, hidden))


def build_decoder(config: Config) -> Qwen2ForCausalLM:
    """transformers' Qwen2 for a FastVLM config.json; the head is always a tensor of its own here."""
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_hidden_layers=config["num_hidden_layers"],
            num_attention_heads=config["num_attention_heads"],
            num_key_value_heads=config["num_key_value_heads"],
            hidden_act=config["hidden_act"],
            max_position_embeddings=config["max_position_embeddings"],
            rms_norm_eps=config["rms_norm_eps"],
            rope_parameters={"rope_type": "default", "rope_theta": config["rope_theta"]},
            tie_word_embeddings=False,
            use_sliding_window=False,
            attention_dropout=0.0,
            attn_implementation="eager",
        )
    )


class TorchReference:
    """The whole model. Attributes: config, tower, projector, decoder."""

    def __init__(self, config: Config, tower: FastVit, projector: nn.Sequential, decoder: Qwen2ForCausalLM) -> None:
        self.config = config
        self.tower = tower
        self.projector = projector
        self.decoder = decoder
        self.dtype = next(projector.parameters()).dtype

    def reparameterize(self) -> "TorchReference":
        """A copy whose training-form tower timm itself has folded."""
        return TorchReference(self.config, reparameterize_model(self.tower).eval(), self.projector, self.decoder)

    @torch.inference_mode()
    def image_features(self, pixel_values: PixelValues) -> torch.Tensor:
        """(B, 3, R, R) in [0, 1] → (B, N, C): the map before the head's pooling, row-major over (H, W)."""
        pixels = torch.as_tensor(pixel_values).to(self.dtype)
        return self.tower.forward_features(pixels).flatten(2).transpose(1, 2)

    @torch.inference_mode()
    def project(self, features: torch.Tensor) -> torch.Tensor:
        """(B, N, C) → (B, N, hidden)."""
        return self.projector(features)

    @torch.inference_mode()
    def input_embeddings(self, input_ids: Sequence[int], pixel_values: PixelValues | None) -> torch.Tensor:
        """(1, L, hidden): token rows, with image i's N rows in place of the i-th -200."""
        images = [] if pixel_values is None else list(self.project(self.image_features(pixel_values)))
        if len(images) != sum(token == IMAGE_TOKEN_ID for token in input_ids):
            raise ValueError(f"{len(images)} images for the placeholders of {list(input_ids)}")
        remaining = iter(images)
        table = self.decoder.get_input_embeddings().weight
        rows = [next(remaining) if token == IMAGE_TOKEN_ID else table[token].unsqueeze(0) for token in input_ids]
        return torch.cat(rows).unsqueeze(0)

    @torch.inference_mode()
    def logits(self, input_ids: Sequence[int], pixel_values: PixelValues | None = None) -> torch.Tensor:
        """(1, L, vocab) float32, where L counts image rows; pixel_values is (number of -200, 3, R, R)."""
        embeddings = self.input_embeddings(input_ids, pixel_values)
        return self.decoder(inputs_embeds=embeddings, use_cache=False).logits.float()

    @torch.inference_mode()
    def greedy(self, input_ids: Sequence[int], pixel_values: PixelValues | None, count: int) -> list[int]:
        """`count` tokens by argmax, each from one full pass without a cache; stop tokens do not stop it."""
        embeddings = self.input_embeddings(input_ids, pixel_values)
        table = self.decoder.get_input_embeddings().weight
        tokens: list[int] = []
        for _ in range(count):
            logits = self.decoder(inputs_embeds=embeddings, use_cache=False).logits
            tokens.append(int(logits[0, -1].argmax()))
            embeddings = torch.cat([embeddings, table[tokens[-1]].view(1, 1, -1)], dim=1)
        return tokens


def load_reference(folder: str | Path, dtype: torch.dtype = torch.float32) -> TorchReference:
    """Load a hub folder in either form; every tensor must be used and every parameter must be found.

    The decoder's head is `lm_head.weight` where the folder stores one, whatever config.json says about tying, and the
    embedding otherwise.
    """
    folder = Path(folder)
    config: Config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    parts: dict[str, State] = {TOWER_PREFIX: {}, PROJECTOR_PREFIX: {}, "": {}}
    for name, tensor in read_tensors(folder).items():
        prefix = next(prefix for prefix in parts if name.startswith(prefix))
        parts[prefix][name.removeprefix(prefix)] = tensor.to(dtype) if tensor.is_floating_point() else tensor

    tower = load_tower(tower_size(config), parts[TOWER_PREFIX])
    projector = build_projector(config)
    projector.load_state_dict(parts[PROJECTOR_PREFIX], strict=True)
    decoder = build_decoder(config)
    state = parts[""]
    state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    decoder.load_state_dict(state, strict=True)
    return TorchReference(config, tower.to(dtype), projector.to(dtype).eval(), decoder.to(dtype).eval())
