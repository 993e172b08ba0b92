"""The maps of every stage of the tower: their shapes, and that they are what the feature rows are made of."""

import mlx.core as mx
import pytest

from mlx_fastvlm.kernels.choice import plain_ops
from tests.tolerances import FEATURES, relative_error

SIZES = [(256, 256), (128, 320)]
NAMES = ["stem", "stages.0", "stages.1", "stages.2", "stages.3", "stages.4", "final_conv"]


def pixels(height, width):
    return mx.random.uniform(shape=(2, height, width, 3), key=mx.random.key(0))


@pytest.mark.parametrize("size", SIZES)
def test_a_map_for_every_stage_channels_last(size, tiny):
    tower, config = tiny[0].vision_tower, tiny[0].config.vision_config
    maps = tower(pixels(*size), return_stages=True)
    assert list(maps) == NAMES
    strides = (4, 4, 8, 16, 32, 64, 64)
    widths = (config.embed_dims[0], *config.embed_dims, config.hidden_size)
    for name, stride, channels in zip(NAMES, strides, widths, strict=True):
        assert maps[name].shape == (2, size[0] // stride, size[1] // stride, channels), name


@pytest.mark.parametrize("size", SIZES)
def test_the_last_map_is_the_rows_bit_by_bit(size, tiny):
    tower, x = tiny[0].vision_tower, pixels(*size)
    rows = tower(x)
    assert mx.array_equal(tower(x, return_stages=True)["final_conv"].reshape(rows.shape), rows).item()


def test_each_map_leads_to_the_next(tiny):
    """What stands between two maps in the checkpoint's list makes the second of the first: no map is another's."""
    tower = tiny[0].vision_tower
    maps = tower(pixels(128, 320), return_stages=True)
    between = {"stages.0": [0], "stages.1": [1, 2], "stages.2": [3, 4], "stages.3": [5, 6, 7], "stages.4": [8, 9, 10]}
    before = "stem"
    for name, places in between.items():
        x = maps[before]
        for place in places:
            element = tower.network[place]
            for block in element if isinstance(element, list) else [element]:
                x = block(x)
        assert mx.array_equal(x, maps[name]).item(), name
        before = name


def test_plain_operations_give_the_same_maps(tiny):
    tower, x = tiny[0].vision_tower, pixels(128, 320)
    fast = tower(x, return_stages=True)
    with plain_ops():
        plain = tower(x, return_stages=True)
    for name in NAMES:
        assert relative_error(fast[name], plain[name]) < FEATURES["float32"], name
