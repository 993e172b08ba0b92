"""The cache of a batch: every row attends as it would alone, whoever comes and goes; nothing is kept for rows that left."""

import random

import mlx.core as mx
import numpy as np
import pytest

from mlx_fastvlm.batch_cache import STEP, BatchCache
from mlx_fastvlm.cache import KVCache
from tests.tolerances import KERNELS, LOGITS, relative_error

LAYERS, HEADS, KV_HEADS, WIDTH = 2, 4, 2, 32


def positions(seed, length, batch=1):
    """Queries, keys and values of `length` positions."""
    shapes = ((batch, heads, length, WIDTH) for heads in (HEADS, KV_HEADS, KV_HEADS))
    return [mx.random.normal(shape, key=mx.random.key(10 * seed + index)) for index, shape in enumerate(shapes)]


def prefilled(seed, length, batch=1):
    caches = [KVCache() for _ in range(LAYERS)]
    for layer, cache in enumerate(caches):
        cache.attend(*positions(seed + layer, length, batch), 0.3)
    return caches


class Rows:
    """A batch beside the same sequences alone."""

    def __init__(self):
        self.batch, self.alone, self.seed = BatchCache(LAYERS), [], 0

    def regroup(self, stay, lengths=()):
        self.seed += 100
        joining = [prefilled(self.seed + 7 * index, length) for index, length in enumerate(lengths)]
        self.batch.regroup(stay, joining)
        self.alone = [self.alone[row] for row in stay] + joining

    def check_step(self, length=1):
        self.seed += 100
        for layer in range(LAYERS):
            offset = self.batch.layers[layer].offset
            wanted_offsets = [caches[layer].offset for caches in self.alone]
            if isinstance(offset, int):
                assert set(wanted_offsets) == {offset}
            else:
                assert offset.tolist() == wanted_offsets and offset.dtype == mx.int32
            new = positions(self.seed + layer, length, len(self.alone))
            found = self.batch.layers[layer].attend(*new, 0.3)
            for row, caches in enumerate(self.alone):
                wanted = caches[layer].attend(*(array[row : row + 1] for array in new), 0.3)
                assert relative_error(found[row : row + 1], wanted) < KERNELS["float32"]
        assert self.batch.lengths == [caches[0].offset for caches in self.alone]


@pytest.mark.parametrize("lengths", [[5], [5, 5], [3, 9, 1], [STEP - 1, STEP, 2 * STEP + 3]])
def test_rows_of_any_lengths_attend_as_they_would_alone(lengths):
    rows = Rows()
    rows.regroup([], lengths)
    for _ in range(3):
        rows.check_step()
    rows.check_step(length=4)


def test_several_sequences_that_were_prefilled_together_join_as_rows():
    batch, together, alone = BatchCache(LAYERS), prefilled(1, 6, batch=3), prefilled(2, 4)
    batch.regroup([], [together, alone])
    assert batch.lengths == [6, 6, 6, 4]
    for row in range(3):
        np.testing.assert_array_equal(batch.row(row)[1].keys, together[1].keys[row : row + 1, :, :6])


@pytest.mark.parametrize("seed", range(6))
def test_rows_come_go_and_change_places_in_any_order(seed):
    chance, rows = random.Random(seed), Rows()
    for _ in range(12):
        stay = [row for row in range(len(rows.alone)) if chance.random() < 0.7]
        chance.shuffle(stay)
        rows.regroup(stay, [chance.randint(1, 40) for _ in range(chance.randint(0 if stay else 1, 3))])
        for _ in range(chance.randint(1, 4)):
            rows.check_step()


def test_the_decoders_logits_are_those_of_each_row_alone(tiny):
    model, _ = tiny
    decoder, lengths = model.language_model, [5, 40, 17]
    alone = [model.make_cache() for _ in lengths]
    for row, (caches, length) in enumerate(zip(alone, lengths, strict=True)):
        decoder.hidden_states(decoder.embed_tokens(mx.arange(row, row + length)[None]), caches)
    batch = BatchCache(len(decoder.layers))
    batch.regroup([], [[cache.copy(cache.offset) for cache in caches] for caches in alone])
    for tokens in ([3, 1, 4], [1, 5, 9]):
        embeds = decoder.embed_tokens(mx.array(tokens)[:, None])
        found = decoder.logits(decoder.hidden_states(embeds, batch.layers))
        for row, caches in enumerate(alone):
            wanted = decoder.logits(decoder.hidden_states(embeds[row : row + 1], caches))
            assert relative_error(found[row : row + 1], wanted) < LOGITS["float32"]


def test_newcomers_caches_are_not_written():
    batch, caches = BatchCache(LAYERS), prefilled(1, 6)
    before = [np.array(array) for cache in caches for array in cache.arrays()]
    batch.regroup([], [caches])
    for layer in batch.layers:
        mx.eval(layer.attend(*positions(5, 1), 0.3))
    assert [cache.offset for cache in caches] == [6] * LAYERS
    for array, held in zip((array for cache in caches for array in cache.arrays()), before, strict=True):
        np.testing.assert_array_equal(array, held)


def test_a_row_taken_out_goes_on_as_if_it_had_been_alone():
    rows = Rows()
    rows.regroup([], [9, 3])
    rows.check_step()
    taken, alone = rows.batch.row(1), rows.alone[1]
    assert [cache.offset for cache in taken] == [4] * LAYERS
    for layer in range(LAYERS):
        new = positions(77, 2)
        found, wanted = (caches[layer].attend(*new, 0.3) for caches in (taken, alone))
        assert relative_error(found, wanted) < KERNELS["float32"]
    rows.alone[1] = rows.batch.row(1)
    rows.check_step()  # and the batch has not seen those positions


def test_columns_and_rows_that_nobody_needs_are_given_up():
    rows = Rows()
    rows.regroup([], [3 * STEP, 2, 2])
    wide = rows.batch.nbytes
    rows.regroup([1, 2])
    assert rows.batch.nbytes == wide * 2 // 3 // 4  # one step of columns instead of four, for two rows of three
    rows.check_step()
    rows.regroup([])
    assert rows.batch.nbytes == 0 and rows.batch.lengths == []
    rows.regroup([], [4])
    rows.check_step()


def test_a_long_run_of_short_sequences_does_not_grow():
    rows, most = Rows(), 0
    rows.regroup([], [4, 4])
    for _ in range(40):
        for _ in range(3):
            rows.check_step()
        rows.regroup([1], [4])
        most = max(most, rows.batch.nbytes)
    assert most == rows.batch.nbytes == BYTES_OF_TWO_ROWS


BYTES_OF_TWO_ROWS = LAYERS * 2 * 2 * KV_HEADS * STEP * WIDTH * 4
