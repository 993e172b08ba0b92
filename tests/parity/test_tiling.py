"""Tiles, their grid and their merging, against transformers' LLaVA-NeXT: select_best_resolution, its image processor,
unpad_image and pack_image_features."""

from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch", reason="install the extra 'parity'")
pytest.importorskip("transformers.models.llava_next", reason="install the extra 'parity'")

from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.modeling_llava_next import (
    LlavaNextModel,
    get_anyres_image_grid_shape,
    select_best_resolution,
    unpad_image,
)

from mlx_fastvlm.image_processing import ImageProcessor
from mlx_fastvlm.tiling import DEFAULT_GRIDS, Tiling

TILE = 256
SIDE = TILE // 64
GRIDS = [DEFAULT_GRIDS, ((2, 2), (4, 1), (1, 4), (3, 2), (2, 3)), ((1, 1), (6, 6))]
SIZES = [(640, 480), (480, 640), (1000, 1000), (3000, 200), (200, 3000), (257, 255), (64, 64), (1921, 1079), (5000, 7)]


def pinpoints(grids):
    """Transformers' (height, width) in pixels."""
    return [[rows * TILE, columns * TILE] for columns, rows in grids]


@pytest.mark.parametrize("grids", GRIDS)
def test_the_grid_of_any_picture(grids):
    rng = np.random.default_rng(0)
    sizes = SIZES + [tuple(int(side) for side in rng.integers(1, 3000, 2)) for _ in range(400)]
    for width, height in sizes:
        layout = Tiling(grids).layout(width, height, TILE)
        assert layout.canvas[::-1] == tuple(select_best_resolution((height, width), pinpoints(grids))), (width, height)
        shape = get_anyres_image_grid_shape((height, width), pinpoints(grids), TILE)
        assert layout.grid[::-1] == shape, (width, height)


@pytest.mark.parametrize("size", [size for size in SIZES if max(size) < 4000])
def test_the_pixels_of_overview_and_tiles(size):
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), np.uint8))
    reference = LlavaNextImageProcessorPil(
        size={"shortest_edge": TILE},
        crop_size={"height": TILE, "width": TILE},
        image_grid_pinpoints=pinpoints(DEFAULT_GRIDS),
        do_normalize=False,
        resample=Image.Resampling.BICUBIC,
    )
    wanted = reference(picture, return_tensors="np")["pixel_values"][0].transpose(0, 2, 3, 1)
    found = ImageProcessor(TILE, fit="tiles").tiles(picture).tiles
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() < 1e-6


@pytest.mark.parametrize("grids", GRIDS)
@pytest.mark.parametrize("size", SIZES)
def test_rows_merge_as_in_llava(grids, size):
    layouts = {merge: Tiling(grids, merge).layout(*size, TILE) for merge in ("flat", "spatial", "spatial_unpad")}
    columns, rows = layouts["flat"].grid
    features = np.random.default_rng(2).random((1 + columns * rows, SIDE * SIDE, 5), dtype=np.float32)
    tensor = torch.from_numpy(features)
    model = SimpleNamespace(
        config=SimpleNamespace(
            vision_config=SimpleNamespace(image_size=TILE, patch_size=64), image_grid_pinpoints=pinpoints(grids)
        )
    )
    (unpadded,), lengths = LlavaNextModel.pack_image_features(
        model, [tensor], [(size[1], size[0])], vision_feature_select_strategy="full", image_newline=None
    )
    # What llava_arch.py does for the two merges that transformers leaves out.
    whole = tensor[1:].view(rows, columns, SIDE, SIDE, -1).permute(0, 2, 1, 3, 4)
    wanted = {
        "flat": tensor.flatten(0, 1),
        "spatial": torch.cat([tensor[0], whole.flatten(0, 3)]),
        "spatial_unpad": unpadded,
    }
    for merge, layout in layouts.items():
        found = layout.merged(mx.array(features))
        assert np.array_equal(np.array(found), wanted[merge].numpy()), merge
        assert layout.rows == len(wanted[merge]), merge
    assert layouts["spatial_unpad"].rows == int(lengths[0])


def test_rows_of_padding_are_those_that_unpad_image_takes():
    for size in SIZES:
        layout = Tiling(merge="spatial_unpad").layout(*size, TILE)
        columns, rows = layout.grid
        left = unpad_image(torch.zeros(1, rows * SIDE, columns * SIDE), (size[1], size[0]))
        assert layout.rows == SIDE * SIDE + left.shape[1] * left.shape[2], size
