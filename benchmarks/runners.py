"""One implementation each of FastVLM behind the same face: a folder → a function that streams token ids.

Each is used as its own documentation says, without patches; libraries are imported where they are needed, so that this
file loads without them. What stops an answer is left out of it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

TokenStream = Callable[[str, str, int], Iterator[int]]  # (picture file, question, longest answer) → greedy token ids


def load_ours(folder: Path) -> TokenStream:
    """This package, on a converted folder."""
    from mlx_fastvlm import load, stream_generate

    model, processor = load(folder, dtype="float32")

    def tokens(image: str, prompt: str, max_tokens: int) -> Iterator[int]:
        for response in stream_generate(model, processor, prompt, image=image, max_tokens=max_tokens):
            if response.token not in processor.eos_token_ids:
                yield response.token

    return tokens


def load_mlx_vlm(folder: Path) -> TokenStream:
    """mlx-vlm, on a hub folder in float32 (see peer_folders)."""
    from mlx_vlm import load, stream_generate
    from mlx_vlm.prompt_utils import apply_chat_template

    model, processor = load(str(folder))

    def tokens(image: str, prompt: str, max_tokens: int) -> Iterator[int]:
        framed = apply_chat_template(processor, model.config, prompt, num_images=1)
        for response in stream_generate(model, processor, framed, [image], max_tokens=max_tokens, temperature=0.0):
            if response.finish_reason is None:  # the response that ends an answer repeats the last token
                yield response.token

    return tokens


def load_torch(folder: Path) -> TokenStream:
    """PyTorch in float32, channels last, with a KV cache: timm's tower and transformers' Qwen2 and preprocessing.

    The model is the repository's test reference, so this one needs the repository as the current folder.
    """
    import torch
    from PIL import Image
    from transformers import AutoTokenizer

    sys.path.append(os.getcwd())  # last: nothing there takes the place of an installed module
    from tests.reference.golden_images import preprocess
    from tests.reference.presets import tower_size
    from tests.reference.torch_reference import IMAGE_TOKEN_ID, load_reference

    reference = load_reference(folder)
    reference.tower.to(memory_format=torch.channels_last)
    reference.decoder.set_attn_implementation("sdpa")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    side = tower_size(reference.config).image_size

    def prompt_ids(prompt: str) -> list[int]:
        messages = [{"role": "user", "content": f"<image>\n{prompt}"}]
        before, after = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True).split(
            "<image>"
        )
        encode = partial(tokenizer.encode, add_special_tokens=False)
        return [*encode(before), IMAGE_TOKEN_ID, *encode(after)]

    @torch.inference_mode()
    def step(embeddings: torch.Tensor, cache: object) -> tuple[int, object]:
        out = reference.decoder(inputs_embeds=embeddings, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return int(out.logits[0, -1].argmax()), out.past_key_values

    def tokens(image: str, prompt: str, max_tokens: int) -> Iterator[int]:
        pixels = torch.from_numpy(preprocess(Image.open(image), side, pad=True))[None]
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        token, cache = step(reference.input_embeddings(prompt_ids(prompt), pixels), None)
        for _ in range(max_tokens - 1):
            if token == tokenizer.eos_token_id:
                return
            yield token
            token, cache = step(reference.decoder.get_input_embeddings()(torch.tensor([[token]])), cache)
        if token != tokenizer.eos_token_id:
            yield token

    return tokens


RUNNERS = {"ours": load_ours, "mlx-vlm": load_mlx_vlm, "torch": load_torch}
