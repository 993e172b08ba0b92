"""Prompts that begin alike, with a picture: the beginning is run through the decoder once, the rests are run together.

Unlike `reuse.Reuse` this knows all prompts beforehand. It needs no search for what was seen, and many short rests take
little longer than one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_fastvlm.cache import KVCache
from mlx_fastvlm.config import IMAGE_TOKEN_INDEX
from mlx_fastvlm.generate import Prefilled
from mlx_fastvlm.model import FastVLM

_PADDING = 0  # the token behind a shorter rest; nothing that counts sees it


@dataclass(frozen=True)
class Beginning:
    """What the decoder has seen of a prompt up to its last picture.

    Attributes:
        length: its positions.
        cache: its keys and values, one a layer.
    """

    length: int
    cache: Sequence[KVCache]


def split(input_ids: Sequence[int]) -> tuple[list[int], list[int]]:
    """The ids up to the last picture, that included, and the rest. Without a picture all are the rest."""
    count = max((index + 1 for index, token in enumerate(input_ids) if token == IMAGE_TOKEN_INDEX), default=0)
    return list(input_ids[:count]), list(input_ids[count:])


def beginning_of(prompt: Prefilled, rest: Sequence[int]) -> Beginning:
    """What a prompt's beginning has left in its caches, copied.

    Args:
        prompt: as `prefill_prompt` returns it.
        rest: the ids behind the beginning.
    """
    length = prompt.prompt_tokens - len(rest)
    cache = [layer.copy(length) for layer in prompt.cache]
    mx.eval([layer.arrays() for layer in cache])
    return Beginning(length, cache)


def prefill_rests(model: FastVLM, prompts: Sequence[tuple[Beginning, Sequence[int]]]) -> list[Prefilled]:
    """Run the rests of prompts through the decoder, those with equally long beginnings together.

    Args:
        prompts: beginning and ids of each, one id or more.
    """
    by_length: dict[int, list[int]] = {}
    for index, (beginning, _) in enumerate(prompts):
        by_length.setdefault(beginning.length, []).append(index)
    prefilled: dict[int, Prefilled] = {}
    for indices in by_length.values():
        prefilled |= zip(indices, _prefill_together(model, [prompts[index] for index in indices]), strict=True)
    return [prefilled[index] for index in range(len(prompts))]


def _prefill_together(model: FastVLM, prompts: Sequence[tuple[Beginning, Sequence[int]]]) -> list[Prefilled]:
    """See `prefill_rests`; all beginnings are equally long. Shorter rests are padded behind, where no position that
    counts attends to the padding."""
    beginnings, rests = zip(*prompts, strict=True)
    start, longest = beginnings[0].length, max(map(len, rests))
    padded = [[*rest, *[_PADDING] * (longest - len(rest))] for rest in rests]
    cache = [_joined(layers, start) for layers in zip(*(beginning.cache for beginning in beginnings), strict=True)]
    hidden = model.language_model.hidden_states(mx.concatenate([model.embed(ids) for ids in padded]), cache)
    last = hidden[mx.arange(len(rests)), mx.array([len(rest) - 1 for rest in rests])]
    logits = model.language_model.logits(last)
    mx.eval(logits)
    return [
        Prefilled(logits[row : row + 1], [_row(layer, row, start + len(rest)) for layer in cache], start + len(rest))
        for row, rest in enumerate(rests)
    ]


def _joined(layers: Sequence[KVCache], length: int) -> KVCache:
    """One layer's caches of several sequences as one cache; each holds just so many positions."""
    cache = KVCache()
    cache.offset = length
    cache.keys = mx.concatenate([layer.keys for layer in layers])
    cache.values = mx.concatenate([layer.values for layer in layers])
    return cache


def _row(layer: KVCache, row: int, length: int) -> KVCache:
    """The first positions of one sequence."""
    cache = KVCache()
    cache.offset = length
    cache.keys, cache.values = (array[row : row + 1, :, :length] for array in layer.arrays())
    return cache
