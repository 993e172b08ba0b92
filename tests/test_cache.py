"""Key/value caches: trimming, copies that share nothing written, memory."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_fastvlm.cache import STEP, KVCache, QuantizedKVCache

KINDS = {"plain": KVCache, "quantized": lambda: QuantizedKVCache(8, 32)}


@pytest.fixture(params=KINDS)
def make(request):
    return KINDS[request.param]


def rows(length, seed, batch=1):
    """Queries, keys and values of `length` new positions."""
    return [mx.random.normal((batch, heads, length, 32), key=mx.random.key(seed + heads)) for heads in (4, 2, 2)]


def attended(cache, length, seed):
    return np.asarray(cache.attend(*rows(length, seed), 0.3))


@pytest.mark.parametrize("kept", [0, 3, 7])
def test_positions_that_were_trimmed_are_as_if_they_had_never_been(make, kept):
    cache, fresh = make(), make()
    for seed, length in enumerate((kept, 9 - kept)):
        if length:
            cache.attend(*rows(length, seed), 0.3)
    if kept:
        fresh.attend(*rows(kept, 0), 0.3)
    cache.trim(kept)
    assert cache.offset == kept
    np.testing.assert_array_equal(attended(cache, 2, 5), attended(fresh, 2, 5))


@pytest.mark.parametrize("kept", [0, 3, 7, STEP, STEP + 2])
def test_a_copy_and_its_source_go_separate_ways(make, kept):
    cache, fresh = make(), make()
    for one in (cache, fresh):
        if kept:
            one.attend(*rows(kept, 0), 0.3)
    cache.attend(*rows(2, 1), 0.3)
    copied, twice = cache.copy(kept), cache.copy(kept + 2).copy(kept)
    cache.trim(kept)
    found = [attended(one, 2, seed) for seed, one in ((7, cache), (8, copied), (9, twice))]
    for seed, result in zip((7, 8, 9), found, strict=True):
        np.testing.assert_array_equal(result, attended(fresh.copy(kept), 2, seed))
    # What each wrote is still its own.
    for seed, one in ((7, cache), (8, copied), (9, twice)):
        wanted = fresh.copy(kept)
        wanted.attend(*rows(2, seed), 0.3)
        np.testing.assert_array_equal(attended(one, 1, 3), attended(wanted, 1, 3))


def test_a_copy_of_evaluated_arrays_is_written_apart_too(make):
    cache = make()
    cache.attend(*rows(5, 0), 0.3)
    mx.eval(cache.arrays())
    copied = cache.copy(5)
    mx.eval(copied.arrays())
    copied.trim(2)
    copied.attend(*rows(2, 1), 0.3)
    mx.eval(copied.arrays())
    fresh = make()
    fresh.attend(*rows(5, 0), 0.3)
    np.testing.assert_array_equal(attended(cache, 1, 4), attended(fresh, 1, 4))


def test_a_copy_holds_no_room_for_more(make):
    cache = make()
    assert cache.nbytes == 0
    cache.attend(*rows(STEP + 1, 0), 0.3)
    assert cache.nbytes == 2 * cache.copy(STEP).nbytes  # a second step for one position
    assert cache.copy(10).nbytes * STEP == cache.copy(STEP).nbytes * 10
    assert cache.copy(0).nbytes == 0


def test_a_copy_does_not_keep_its_sources_memory(make):
    cache = make()
    cache.attend(*rows(40 * STEP, 0), 0.3)
    mx.eval(cache.arrays())
    copied, whole = cache.copy(3), cache.nbytes
    mx.eval(copied.arrays())
    before = mx.get_active_memory()
    del cache
    assert mx.get_active_memory() <= before - whole


@pytest.mark.parametrize("length", [-1, 6])
def test_lengths_it_does_not_hold_are_refused(make, length):
    cache = make()
    cache.attend(*rows(5, 0), 0.3)
    with pytest.raises(ValueError, match=f"length is {length}; this cache holds 5"):
        cache.trim(length)
    with pytest.raises(ValueError, match=f"length is {length}; this cache holds 5"):
        cache.copy(length)
