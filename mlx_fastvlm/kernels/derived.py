"""Arrays that kernels derive from a weight (another layout, padding), made once and dropped with the weight."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable

import mlx.core as mx


def once_per_array(derive: Callable[[mx.array], mx.array]) -> Callable[[mx.array], mx.array]:
    """`derive`, whose result is kept for as long as its argument lives."""
    kept: dict[int, mx.array] = {}

    @functools.wraps(derive)
    def derived(array: mx.array) -> mx.array:
        key = id(array)
        if key not in kept:
            kept[key] = derive(array)
            weakref.finalize(array, kept.pop, key, None)
        return kept[key]

    return derived
