"""The sides of the headline comparison, each with random weights: options → a function that times one picture.

What is timed is the paper's definition: the vision encoder with the projector ("encode"), then the decoder over the
image's tokens alone up to the first token ("prefill"). Pixels are ready before. Libraries are imported where they are
needed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlx_fastvlm.generate import prefill
from mlx_fastvlm.loading import DTYPES

from .machine import peak_rss
from .random_model import load_random, random_config
from .runners import Options, torch_device, torch_device_peak

if TYPE_CHECKING:
    import torch

Answer = Callable[[], dict[str, Any]]

RESOLUTION = 1024
TILE = 384  # pixels: SigLIP-SO400M/14's input
TILE_TOKENS = 27 * 27
_MLX_VLM_PREFILL_STEP = 2048


def load_ours(options: Options) -> Answer:
    """FastVLM-0.5B through this package."""
    model = load_random(random_config("0.5b"), options["dtype"])
    pixel_values = mx.random.uniform(shape=(1, RESOLUTION, RESOLUTION, 3)).astype(model.dtype)
    mx.eval(pixel_values)

    def encode() -> mx.array:
        features = model.encode_images(pixel_values)
        mx.eval(features)
        return features

    def first_token(features: mx.array) -> int:
        return mx.argmax(prefill(model, features, model.make_cache()), axis=-1).item()

    return lambda: _time_stages(encode, first_token, mx.get_peak_memory)


def load_fastvlm_torch(options: Options) -> Answer:
    """FastVLM-0.5B as transformers has it (timm's tower in inference form)."""
    import torch
    from transformers import FastVlmConfig, FastVlmForConditionalGeneration

    config = FastVlmConfig(text_config=_qwen2("0.5b"))
    device, dtype = torch_device(options["device"]), getattr(torch, options["dtype"])
    model = FastVlmForConditionalGeneration(config)
    # Random depthwise kernels would fade the picture into denormal numbers, which CPUs are slow with.
    for module in model.model.vision_tower.modules():
        if isinstance(module, torch.nn.Conv2d) and 1 < module.groups == module.in_channels:
            torch.nn.init.zeros_(module.weight)
            module.weight.data[:, :, module.kernel_size[0] // 2, module.kernel_size[1] // 2] = 1
    model = model.to(device=device, dtype=dtype).eval()
    model.model.vision_tower.to(memory_format=torch.channels_last)
    pixel_values = torch.rand(1, 3, RESOLUTION, RESOLUTION, dtype=dtype, device=device)
    pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
    return _torch_answer(model, device, lambda: model.get_image_features(pixel_values).pooler_output)


def load_onevision_torch(options: Options) -> Answer:
    """LLaVA-OneVision-0.5B's shape as transformers has it.

    Its "tiles" are an overview and a grid of `grid_side` squared: 10 make the paper's 7,290 tokens, to which this
    implementation, as LLaVA's own, adds one that ends each row of the grid.
    """
    import torch
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

    config = LlavaOnevisionConfig(text_config=_qwen2("0.5b"))  # its default tower is SigLIP-SO400M/14 at 384 pixels
    device, dtype = torch_device(options["device"]), getattr(torch, options["dtype"])
    model = LlavaOnevisionForConditionalGeneration(config).to(device=device, dtype=dtype).eval()
    side = TILE * grid_side(options["tiles"])
    pixel_values = torch.rand(1, options["tiles"], 3, TILE, TILE, dtype=dtype, device=device)
    sizes = torch.tensor([[side, side]])
    return _torch_answer(model, device, lambda: model.get_image_features(pixel_values, sizes).pooler_output[0][None])


def load_onevision_mlx_vlm(options: Options) -> Answer:
    """LLaVA-OneVision-0.5B's shape as mlx-vlm has it, its prefill in steps of the size that its generate takes."""
    from mlx_vlm.models.cache import make_prompt_cache
    from mlx_vlm.models.llava_onevision import Model, ModelConfig, TextConfig, VisionConfig

    sides = [TILE * n for n in range(1, 7)]
    config = ModelConfig(
        text_config=TextConfig(tie_word_embeddings=True),  # its defaults are the 0.5B's and SigLIP-SO400M/14's
        vision_config=VisionConfig(),
        image_grid_pinpoints=[[height, width] for height in sides for width in sides],
    )
    model, dtype = Model(config), DTYPES[options["dtype"]]
    model.set_dtype(dtype)
    side = TILE * grid_side(options["tiles"])
    pixel_values = mx.random.uniform(shape=(1, options["tiles"], 3, TILE, TILE)).astype(dtype)
    mx.eval(model.parameters(), pixel_values)
    decoder = model.language_model.model

    def encode() -> mx.array:
        features = model.get_image_features(pixel_values, [[side, side]])[None]
        mx.eval(features)
        return features

    def first_token(features: mx.array) -> int:
        cache = make_prompt_cache(model.language_model)
        for start in range(0, features.shape[1], _MLX_VLM_PREFILL_STEP):
            rows = features[:, start : start + _MLX_VLM_PREFILL_STEP]
            hidden = decoder(mx.zeros(rows.shape[:2], mx.int32), cache=cache, input_embeddings=rows)
            mx.eval(hidden, [layer.state for layer in cache])
        return mx.argmax(decoder.embed_tokens.as_linear(hidden[:, -1]), axis=-1).item()

    return lambda: _time_stages(encode, first_token, mx.get_peak_memory)


def grid_side(tiles: int) -> int:
    """Tiles along one side of the grid beside the overview: 10 → 3, 5 → 2, 2 → 1."""
    return round((tiles - 1) ** 0.5)


def _torch_answer(model: torch.nn.Module, device: str, features: Callable[[], torch.Tensor]) -> Answer:
    """Times one of transformers' models; `features` gives (1, N, hidden)."""
    import torch

    def encode() -> torch.Tensor:
        rows = features()
        if device != "cpu":
            rows[0, 0, 0].item()  # a GPU computes by itself until someone asks
        return rows

    def first_token(rows: torch.Tensor) -> int:
        out = model.model.language_model(inputs_embeds=rows, use_cache=True)
        return int(model.lm_head(out.last_hidden_state[:, -1]).argmax())

    def answer() -> dict[str, Any]:
        with torch.inference_mode():
            return _time_stages(encode, first_token, lambda: torch_device_peak(device))

    return answer


def _qwen2(size: str) -> Any:
    """transformers' config of the same decoder as `random_config`'s."""
    from transformers import Qwen2Config

    config = random_config(size).text_config
    return Qwen2Config(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=config.tie_word_embeddings,
    )


def _time_stages(
    encode: Callable[[], Any], first_token: Callable[[Any], int], device_peak: Callable[[], int | None]
) -> dict[str, Any]:
    """One picture; both functions come back when their result is there."""
    start, start_cpu = time.perf_counter(), time.process_time()
    features = encode()
    encoded = time.perf_counter()
    token = first_token(features)
    end, end_cpu = time.perf_counter(), time.process_time()
    return {
        "ttft": end - start,
        "ttft_cpu": end_cpu - start_cpu,
        "encode": encoded - start,
        "prefill": end - encoded,
        "visual_tokens": features.shape[1],
        "tokens": [token],
        "peak_rss": peak_rss(),
        "device_peak": device_peak(),
    }


HEADLINE_RUNNERS: dict[str, Callable[[Options], Answer]] = {
    "headline-ours": load_ours,
    "headline-fastvlm-torch": load_fastvlm_torch,
    "headline-onevision-torch": load_onevision_torch,
    "headline-onevision-mlx-vlm": load_onevision_mlx_vlm,
}
