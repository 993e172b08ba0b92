"""The sides of the captioning comparison: options → a function that captions many picture files.

Libraries are imported where they are needed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import mlx.core as mx

from .machine import peak_rss
from .runners import Options, open_mlx_vlm

Caption = Callable[[Sequence[str], str, int, int], list[str]]  # picture files, prompt, longest answer, batch → texts
Answer = Callable[..., dict[str, Any]]


def answerer(load: Callable[[Options], Caption], options: Options) -> Answer:
    """A runner that captions all pictures of a request; the clock stops when the last caption is there."""
    caption = load(options)

    def answer(images: list[str], prompt: str, max_tokens: int, batch_size: int) -> dict[str, Any]:
        start, start_cpu = time.perf_counter(), time.process_time()
        texts = caption(images, prompt, max_tokens, batch_size)
        return {
            "seconds": time.perf_counter() - start,
            "cpu_seconds": time.process_time() - start_cpu,
            "texts": texts,
            "peak_rss": peak_rss(),
            "device_peak": mx.get_peak_memory(),
        }

    return answer


def load_ours(options: Options) -> Caption:
    """`caption_images`."""
    from mlx_fastvlm import caption_images, load

    model, processor = load(options["folder"], dtype=options["dtype"])

    def caption(images: Sequence[str], prompt: str, max_tokens: int, batch_size: int) -> list[str]:
        captions = caption_images(model, processor, images, prompt, batch_size=batch_size, max_tokens=max_tokens)
        return [caption.text for caption in captions]

    return caption


def load_our_loop(options: Options, after_batch: bool = False) -> Caption:
    """A loop over `generate`.

    Args:
        options: see `Options`.
        after_batch: whether the first request, which nobody counts, is captioned as a batch. On a Linux CPU that loads
            the compiled loops, which a small model does not load for one picture at a time and then uses for it too.
    """
    from mlx_fastvlm import caption_images, generate, load

    model, processor = load(options["folder"], dtype=options["dtype"])

    def caption(images: Sequence[str], prompt: str, max_tokens: int, batch_size: int) -> list[str]:
        nonlocal after_batch
        if after_batch:
            after_batch = False
            return [caption.text for caption in caption_images(model, processor, images, prompt, max_tokens=max_tokens)]
        return [generate(model, processor, prompt, image, max_tokens=max_tokens) for image in images]

    return caption


def load_mlx_vlm_loop(options: Options) -> Caption:
    """A loop over mlx-vlm's generate."""
    from mlx_vlm import generate
    from mlx_vlm.prompt_utils import apply_chat_template

    model, processor = open_mlx_vlm(options["folder"])

    def caption(images: Sequence[str], prompt: str, max_tokens: int, batch_size: int) -> list[str]:
        framed = apply_chat_template(processor, model.config, prompt, num_images=1)
        return [
            generate(model, processor, framed, [image], max_tokens=max_tokens, temperature=0.0).text for image in images
        ]

    return caption


def load_mlx_vlm_batch(options: Options) -> Caption:
    """mlx-vlm's batch_generate, one batch after the other.

    Pictures are not grouped by their size, which its processor makes the same for all: with pictures of many sizes that
    is its faster way. Greedy is its default here.
    """
    from mlx_vlm import batch_generate

    model, processor = open_mlx_vlm(options["folder"])

    def caption(images: Sequence[str], prompt: str, max_tokens: int, batch_size: int) -> list[str]:
        texts: list[str] = []
        for start in range(0, len(images), batch_size):
            batch = list(images[start : start + batch_size])
            prompts = [prompt] * len(batch)
            response = batch_generate(
                model, processor, images=batch, prompts=prompts, max_tokens=max_tokens, group_by_shape=False
            )
            texts += response.texts
        return texts

    return caption


CAPTIONING_RUNNERS: dict[str, Callable[[Options], Answer]] = {
    "captioning-ours": partial(answerer, load_ours),
    "captioning-ours-loop": partial(answerer, load_our_loop),
    "captioning-ours-loop-loaded": partial(answerer, partial(load_our_loop, after_batch=True)),
    "captioning-mlx-vlm": partial(answerer, load_mlx_vlm_loop),
    "captioning-mlx-vlm-batch": partial(answerer, load_mlx_vlm_batch),
}
