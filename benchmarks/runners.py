"""One implementation each of FastVLM behind the same face: options → a function that streams token ids.

Each is used as its own documentation says, without patches; libraries are imported where they are needed, so that this
file loads without them. What stops an answer is left out of it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .command import BenchmarkError
from .machine import computes_on_cpu
from .peer_folders import TOWER_SIZES

if TYPE_CHECKING:
    import torch

TokenStream = Callable[[str, str, int], Iterator[int]]  # (picture file, question, longest answer) → greedy token ids
Options = Mapping[str, Any]  # folder, dtype, device; see `runner_process.RunnerProcess`


@dataclass(frozen=True)
class Implementation:
    """What a loader returns.

    Attributes:
        tokens: answers.
        device_peak: most bytes its library has held on the device it computes on; None where it does not count.
    """

    tokens: TokenStream
    device_peak: Callable[[], int | None]


def load_ours(options: Options) -> Implementation:
    """This package, on a converted folder."""
    import mlx.core as mx

    from mlx_fastvlm import load, stream_generate

    model, processor = load(options["folder"], dtype=options["dtype"])

    def tokens(image: str, prompt: str, max_tokens: int) -> Iterator[int]:
        for response in stream_generate(model, processor, prompt, image=image, max_tokens=max_tokens):
            if response.token not in processor.eos_token_ids:
                yield response.token

    return Implementation(tokens, mx.get_peak_memory)


def load_mlx_vlm(options: Options) -> Implementation:
    """mlx-vlm, on a hub folder in the type to compute in (see peer_folders)."""
    import mlx.core as mx
    from mlx_vlm import stream_generate
    from mlx_vlm.prompt_utils import apply_chat_template

    model, processor = open_mlx_vlm(options["folder"])

    def tokens(image: str, prompt: str, max_tokens: int) -> Iterator[int]:
        framed = apply_chat_template(processor, model.config, prompt, num_images=1)
        for response in stream_generate(model, processor, framed, [image], max_tokens=max_tokens, temperature=0.0):
            if response.finish_reason is None:  # the response that ends an answer repeats the last token
                yield response.token

    return Implementation(tokens, mx.get_peak_memory)


def open_mlx_vlm(folder: str) -> tuple[Any, Any]:
    """mlx-vlm's model and processor, from a folder of peer_folders.

    Its tower's sizes are constants; where the folder names others they are set, which is the only way to run the demo.
    """
    from mlx_vlm import load
    from mlx_vlm.models.fastvlm.config import VisionConfig

    for name, sizes in json.loads(Path(folder, "config.json").read_text()).get(TOWER_SIZES, {}).items():
        setattr(VisionConfig, name, sizes)
    return load(folder)


def torch_device(choice: str) -> str:
    """PyTorch's name for where MLX computes: "cuda" or "mps" beside MLX on a GPU, else "cpu".

    Args:
        choice: "auto" or "cpu".
    """
    import torch

    if computes_on_cpu(choice):
        return "cpu"
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def torch_device_peak(device: str) -> int | None:
    """Most bytes PyTorch has held on a CUDA device; it does not count elsewhere."""
    import torch

    return torch.cuda.max_memory_allocated() if device == "cuda" else None


def load_torch(options: Options, compiled: bool = False) -> Implementation:
    """PyTorch, channels last, with a KV cache: timm's tower and transformers' Qwen2 and preprocessing.

    The model is the repository's test reference, so this one needs the repository as the current folder.

    Args:
        options: see `Options`.
        compiled: tower and decoder through torch.compile, with a cache of fixed size, as transformers recommends; the
            first answer, which nobody counts, compiles.
    """
    import torch
    from PIL import Image
    from transformers import AutoTokenizer, DynamicCache, StaticCache

    if not Path("tests", "reference", "torch_reference.py").is_file():
        raise BenchmarkError("its model is in tests/reference: run from the root of a clone of this repository")
    sys.path.append(os.getcwd())  # last: nothing there takes the place of an installed module
    from tests.reference.golden_images import preprocess
    from tests.reference.presets import tower_size
    from tests.reference.torch_reference import IMAGE_TOKEN_ID, load_reference

    device, dtype = torch_device(options["device"]), getattr(torch, options["dtype"])
    reference = load_reference(options["folder"], dtype)
    reference.tower.to(device=device, memory_format=torch.channels_last)
    reference.projector.to(device)
    reference.decoder.to(device).set_attn_implementation("sdpa")
    tokenizer = AutoTokenizer.from_pretrained(options["folder"])
    side = tower_size(reference.config).image_size
    decode = reference.decoder
    if compiled:
        reference.tower.forward_features = torch.compile(reference.tower.forward_features)
        decode = torch.compile(reference.decoder)

    def prompt_ids(prompt: str) -> list[int]:
        messages = [{"role": "user", "content": f"<image>\n{prompt}"}]
        before, after = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True).split(
            "<image>"
        )
        encode = partial(tokenizer.encode, add_special_tokens=False)
        return [*encode(before), IMAGE_TOKEN_ID, *encode(after)]

    def make_cache(length: int) -> DynamicCache | StaticCache:
        return StaticCache(reference.decoder.config, max_cache_len=length) if compiled else DynamicCache()

    @torch.inference_mode()
    def step(embeddings: torch.Tensor, cache: DynamicCache | StaticCache) -> int:
        out = decode(inputs_embeds=embeddings, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return int(out.logits[0, -1].argmax())

    @torch.inference_mode()
    def tokens(image: str, prompt: str, max_tokens: int) -> Iterator[int]:
        pixels = torch.from_numpy(preprocess(Image.open(image), side, pad=True))[None].to(device)
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        embeddings = reference.input_embeddings(prompt_ids(prompt), pixels)
        cache = make_cache(embeddings.shape[1] + max_tokens)
        token = step(embeddings, cache)
        for _ in range(max_tokens - 1):
            if token == tokenizer.eos_token_id:
                return
            yield token
            token = step(reference.decoder.get_input_embeddings()(torch.tensor([[token]], device=device)), cache)
        if token != tokenizer.eos_token_id:
            yield token

    return Implementation(tokens, partial(torch_device_peak, device))


def load_torch_bfloat16(options: Options) -> Implementation:
    """`load_torch` in bfloat16, whatever the others compute in."""
    return load_torch({**options, "dtype": "bfloat16"})


RUNNERS: dict[str, Callable[[Options], Implementation]] = {
    "ours": load_ours,
    "mlx-vlm": load_mlx_vlm,
    "mlx-vlm-as-installed": load_mlx_vlm,
    "torch": load_torch,
    "torch-bfloat16": load_torch_bfloat16,
    "torch-compiled": partial(load_torch, compiled=True),
}
