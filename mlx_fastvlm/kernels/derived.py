"""Arrays that kernels derive from a weight (another layout, padding), made once and dropped with the weight."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable

import mlx.core as mx


def once_per_array(derive: Callable[[mx.array], mx.array]) -> Callable[[mx.array], mx.array]:
    """`derive`, whose result is kept for as long as its argument lives.

    It is evaluated at once: threads share it, and a function under mx.compile would make it at every call.
    """
    kept: dict[int, mx.array] = {}
    deriving = threading.Lock()

    @functools.wraps(derive)
    def derived(array: mx.array) -> mx.array:
        key = id(array)
        with deriving:
            if key not in kept:
                made = derive(array)
                try:
                    mx.eval(made)
                except ValueError:  # an argument of a function under mx.compile has no value
                    return made
                kept[key] = made
                weakref.finalize(array, kept.pop, key, None)
            return kept[key]

    return derived
