"""Logits → the next token, on the device: greedy, temperature, top-k, top-p, repetition penalty.

Definitions as in transformers' logits processors, so that settings carry over.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import mlx.core as mx

from mlx_fastvlm.errors import OptionError

Sampler = Callable[[mx.array], mx.array]  # (B, vocab) logits → (B,) token ids


def make_sampler(temp: float = 0.0, top_p: float = 1.0, top_k: int = 0, seed: int | None = None) -> Sampler:
    """Choose how tokens are drawn.

    Args:
        temp: temperature; 0 takes the likeliest token and ignores the rest.
        top_p: draw from the smallest set of tokens whose probabilities reach this sum, in (0, 1].
        top_k: draw from the k likeliest tokens; 0 means all.
        seed: makes draws repeatable; None takes fresh randomness from the system.

    Raises:
        OptionError: a value is out of range.
    """
    if not 0 <= temp < float("inf"):
        raise OptionError(f"temp is {temp}; expected 0 or more.")
    if not 0 < top_p <= 1:
        raise OptionError(f"top_p is {top_p}; expected a value above 0 and at most 1.")
    if top_k < 0:
        raise OptionError(f"top_k is {top_k}; expected 0 (all tokens) or more.")
    if seed is not None and not 0 <= seed < 2**64:
        raise OptionError(f"seed is {seed}; expected a whole number from 0 to 2^64 - 1.")
    if temp == 0:
        return lambda logits: mx.argmax(logits, axis=-1)

    key = mx.random.key(int.from_bytes(os.urandom(8), "little") if seed is None else seed)

    def sample(logits: mx.array) -> mx.array:
        nonlocal key
        logits = logits.astype(mx.float32) / temp
        if 0 < top_k < logits.shape[-1]:
            logits = keep_top_k(logits, top_k)
        if top_p < 1:
            logits = keep_top_p(logits, top_p)
        key, now = mx.random.split(key)
        return mx.random.categorical(logits, key=now)

    return sample


def keep_top_k(logits: mx.array, k: int) -> mx.array:
    """(B, vocab) with all but the k largest of each row at -inf (ties with the k-th stay)."""
    smallest_kept = mx.topk(logits, k, axis=-1).min(axis=-1, keepdims=True)
    return mx.where(logits < smallest_kept, -mx.inf, logits)


def keep_top_p(logits: mx.array, p: float) -> mx.array:
    """(B, vocab) with all tokens at -inf but the likeliest ones that together reach probability p."""
    order = mx.argsort(-logits, axis=-1)
    ordered = mx.take_along_axis(logits, order, axis=-1)
    probabilities = mx.softmax(ordered, axis=-1)
    before = mx.cumsum(probabilities, axis=-1) - probabilities
    kept = mx.where(before < p, ordered, -mx.inf)
    return mx.put_along_axis(mx.zeros_like(logits), order, kept, axis=-1)


def penalize_repetition(logits: mx.array, tokens: mx.array, penalty: float) -> mx.array:
    """Make tokens less likely that were generated before (CTRL, arXiv 1909.05858, section 4.1).

    Args:
        logits: (B, vocab).
        tokens: (B, T) ids generated so far.
        penalty: above 1 discourages repetition, 1 changes nothing.
    """
    seen = mx.take_along_axis(logits, tokens, axis=-1)
    return mx.put_along_axis(logits, tokens, mx.where(seen < 0, seen * penalty, seen / penalty), axis=-1)
