"""Prefixes held for later prompts stay few enough to be looked through for every prompt."""

import mlx.core as mx

from mlx_fastvlm import prefix_cache as module
from mlx_fastvlm.cache import KVCache
from mlx_fastvlm.prefix_cache import PrefixCache


def caches(positions):
    cache = KVCache()
    cache.keys, cache.values = mx.zeros((1, 1, positions, 4)), mx.zeros((1, 1, positions, 4))
    cache.offset = positions
    return [cache]


def test_of_many_the_least_recently_used_goes_first_whatever_room_there_is(monkeypatch):
    monkeypatch.setattr(module, "_MOST", 3)
    cache = PrefixCache(2**30)
    cache.keep([0, 0], caches(2), pinned=True)
    for first in (1, 2, 3):
        cache.keep([first] * 2, caches(2))
    cache.longest([1, 1, 1])
    cache.keep([4, 4], caches(2))
    assert [cache.longest([first] * 3)[1] for first in range(5)] == [2, 2, 0, 2, 2]
    assert cache.nbytes == 4 * caches(2)[0].nbytes
