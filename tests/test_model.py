"""The decoder's bookkeeping: cached decoding, splice positions, cache growth."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_fastvlm.cache import STEP, KVCache
from tests.tolerances import LOGITS, relative_error


def test_decoding_with_a_cache_equals_one_pass(tiny):
    model, _ = tiny
    ids = [5, 17, 200, 41, 3, 99, 250, 7]
    whole = model(ids)
    cache = model.make_cache()
    pieces = [model(ids[:3], cache=cache), *(model([token], cache=cache) for token in ids[3:])]
    assert cache[0].offset == len(ids)
    assert relative_error(mx.concatenate(pieces, axis=1), whole) < LOGITS["float32"]


def test_a_second_chunk_after_the_first_equals_one_pass(tiny):
    model, _ = tiny
    ids = list(range(40, 60))
    cache = model.make_cache()
    pieces = [model(ids[:12], cache=cache), model(ids[12:], cache=cache)]
    assert relative_error(mx.concatenate(pieces, axis=1), model(ids)) < LOGITS["float32"]


@pytest.mark.parametrize("num_images", [1, 2, 3])
def test_image_rows_land_at_their_placeholders(tiny, num_images):
    model, _ = tiny
    hidden = model.config.text_config.hidden_size
    images = [mx.full((4 + k, hidden), 100.0 + k) for k in range(num_images)]  # of different lengths
    text = [[1, 2, 3], [4], [5, 6], [7, 8]]
    ids = list(text[0])
    for k in range(num_images):
        ids += [-200, *text[k + 1]]
    rows = np.array(model.embed(ids, images)[0])

    position = 0
    table = np.array(model.language_model.embed_tokens.weight)
    for k in range(num_images + 1):
        np.testing.assert_array_equal(rows[position : position + len(text[k])], table[text[k]])
        position += len(text[k])
        if k < num_images:
            np.testing.assert_array_equal(rows[position : position + 4 + k], np.array(images[k]))
            position += 4 + k
    assert position == len(rows)


@pytest.mark.parametrize("ids", [[1, 2], [-200, -200, 1], [-200]])
def test_a_wrong_number_of_images_is_refused(tiny, ids):
    model, _ = tiny
    images = [] if ids == [-200] else [mx.zeros((4, model.config.text_config.hidden_size))]
    with pytest.raises(ValueError, match="placeholders"):
        model.embed(ids, images)


def test_images_in_a_batch_equal_images_alone(tiny, golden_pixels):
    model, _ = tiny
    together = model.encode_images(mx.array(golden_pixels))
    for k in range(2):
        alone = model.encode_images(mx.array(golden_pixels[k : k + 1]))
        assert relative_error(together[k : k + 1], alone) < LOGITS["float32"]


def test_cache_grows_past_its_step_and_keeps_what_it_holds():
    cache = KVCache()
    written = [mx.random.normal((1, 2, length, 4)) for length in (200, 100, 1, 300)]
    for part in written:
        keys, values = cache.update_and_fetch(part, -part)
    assert cache.offset == 601
    assert mx.array_equal(keys, mx.concatenate(written, axis=2))
    assert mx.array_equal(values, -keys)
    assert cache.keys.shape[2] % STEP == 0
