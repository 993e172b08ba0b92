"""Tiling (LLaVA's AnyRes): a large picture as an overview and a grid of tiles, each as large as the tower's input.

Which grid a picture gets, where it lies in it, and how the tiles' rows become one picture's rows. Numbers and rows only:
cutting is image_processing's.
Sources: haotian-liu/LLaVA llava/mm_utils.py (select_best_resolution, resize_and_pad_image, process_anyres_image) and
llava/model/llava_arch.py (mm_patch_merge_type, unpad_image), as transformers' models/llava_next has them.
"""

from __future__ import annotations

import ast
import math
import re
from dataclasses import dataclass
from typing import Any, Literal, get_args

import mlx.core as mx
import numpy as np

from mlx_fastvlm.errors import OptionError
from mlx_fastvlm.resolution import STEP

Grid = tuple[int, int]  # columns and rows of tiles
Merge = Literal["flat", "spatial", "spatial_unpad"]

DEFAULT_GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))  # LLaVA-NeXT's
MAX_TILES = 36  # of one picture; LLaVA-OneVision goes as far

_ROUNDED_TO = 7  # digits, as transformers does: 2/3 of 3 is 2, not 1.9999999


@dataclass(frozen=True)
class Tiling:
    """How pictures are cut.

    Attributes:
        grids: what to choose from, for each picture: the one that shows most of its pixels, and of those the one with
            the least padding.
        merge: the order of the rows behind the overview's. "flat": tile by tile; "spatial": line by line across all
            tiles, as if they were one; "spatial_unpad": the same without the lines and columns of padding. A row for
            line ends (LLaVA's `image_newline`) is in no FastVLM checkpoint, and is not made up.

    Raises:
        OptionError: there is no grid, or one is empty or too large.
    """

    grids: tuple[Grid, ...] = DEFAULT_GRIDS
    merge: Merge = "flat"

    def __post_init__(self) -> None:
        if self.merge not in get_args(Merge):
            raise OptionError(f"mm_patch_merge_type is {self.merge!r}; it must be one of {', '.join(get_args(Merge))}.")
        if not self.grids or not all(min(grid) >= 1 and math.prod(grid) <= MAX_TILES for grid in self.grids):
            shown = ",".join(f"{columns}x{rows}" for columns, rows in self.grids)
            raise OptionError(f"The tile grids are {shown!r}; each must have from 1 to {MAX_TILES} tiles, such as 2x2.")

    @classmethod
    def of_model(cls, pinpoints: Any, merge: str, image_size: int) -> Tiling:
        """As a config.json has it.

        Args:
            pinpoints: image_grid_pinpoints, (width, height) in pixels, as a list or its text. Such as are for another
                tower's size, which configs carry along unused, give way to the defaults.
            merge: mm_patch_merge_type; "flat", which FastVLM's say, takes the place of an unknown one.
            image_size: of the tower.
        """
        grids = tuple((width // image_size, height // image_size) for width, height in _pairs(pinpoints))
        fit = all(side % image_size == 0 for pair in _pairs(pinpoints) for side in pair)
        fit = fit and all(1 <= math.prod(grid) <= MAX_TILES for grid in grids)
        return cls(grids if grids and fit else DEFAULT_GRIDS, merge if merge in get_args(Merge) else "flat")

    def layout(self, width: int, height: int, tile_size: int) -> TileLayout:
        """Where a picture of this size lies in the best of the grids, with tiles of so many pixels."""
        best = max(self.grids, key=lambda grid: _usefulness(width, height, grid, tile_size))  # the first of equals
        return TileLayout(best, tile_size, width, height, self.merge)

    def largest(self, tile_size: int) -> TileLayout:
        """That of a picture that takes most positions."""
        grid = max(self.grids, key=math.prod)
        return TileLayout(grid, tile_size, grid[0] * tile_size, grid[1] * tile_size, self.merge)


@dataclass(frozen=True)
class TileLayout:
    """One picture in its grid.

    Attributes:
        grid: columns and rows.
        tile_size: side of a tile in pixels.
        width, height: of the picture.
        merge: see `Tiling`.
    """

    grid: Grid
    tile_size: int
    width: int
    height: int
    merge: Merge

    @property
    def canvas(self) -> tuple[int, int]:
        """Width and height of all tiles together."""
        columns, rows = self.grid
        return columns * self.tile_size, rows * self.tile_size

    @property
    def resized(self) -> tuple[int, int]:
        """Width and height of the picture on the canvas, where it is centered; it touches two opposite edges."""
        across, down = (length / own for length, own in zip(self.canvas, (self.width, self.height), strict=True))
        if across < down:
            return self.canvas[0], min(math.ceil(self.height * across), self.canvas[1])
        return min(math.ceil(self.width * down), self.canvas[0]), self.canvas[1]

    @property
    def rows(self) -> int:
        """Positions of the decoder that the picture takes."""
        left, top, right, bottom = self._shown
        return (self.tile_size // STEP) ** 2 + (right - left) * (bottom - top)

    def merged(self, features: mx.array) -> mx.array:
        """The picture's rows.

        Args:
            features: (1 + tiles, rows of a tile, C), the overview first, then tile by tile, line by line.

        Returns:
            (`rows`, C).
        """
        overview, tiles = features[0], features[1:]
        if self.merge == "flat":
            return features.reshape(-1, features.shape[-1])
        columns, rows = self.grid
        side = self.tile_size // STEP
        whole = tiles.reshape(rows, columns, side, side, -1).transpose(0, 2, 1, 3, 4)
        whole = whole.reshape(rows * side, columns * side, -1)
        left, top, right, bottom = self._shown
        return mx.concatenate([overview, whole[top:bottom, left:right].reshape(-1, features.shape[-1])])

    @property
    def _shown(self) -> tuple[int, int, int, int]:
        """The part of all tiles' positions whose rows are taken: left, top, right, bottom."""
        across, down = (length // STEP for length in self.canvas)
        if self.merge != "spatial_unpad":
            return 0, 0, across, down
        if self.width / self.height > across / down:
            margin = (down - int(round(self.height * (across / self.width), _ROUNDED_TO))) // 2
            return 0, margin, across, down - margin
        margin = (across - int(round(self.width * (down / self.height), _ROUNDED_TO))) // 2
        return margin, 0, across - margin, down


@dataclass(frozen=True)
class TiledPixels:
    """A picture that was cut.

    Attributes:
        tiles: (1 + tiles, H, W, 3) float32, the overview first.
        layout: which grid they are of.
    """

    tiles: np.ndarray
    layout: TileLayout


def parse_grids(text: str) -> tuple[Grid, ...]:
    """Grids as people write them: columns x rows, separated by commas, such as "2x2,3x1". Raises OptionError."""
    if not re.fullmatch(r"\d+x\d+(,\d+x\d+)*", text.replace(" ", "")):
        raise OptionError(f"The tile grids are {text!r}; expected columns x rows, such as 2x2,3x1.")
    return tuple((int(columns), int(rows)) for columns, rows in re.findall(r"(\d+)x(\d+)", text.replace(" ", "")))


def _usefulness(width: int, height: int, grid: Grid, tile_size: int) -> tuple[int, int]:
    """How good a grid is for a picture: the pixels of it that are shown, enlarging not counted; less padding."""
    canvas_width, canvas_height = (count * tile_size for count in grid)
    scale = min(canvas_width / width, canvas_height / height)
    shown = min(int(width * scale) * int(height * scale), width * height)
    return shown, shown - canvas_width * canvas_height


def _pairs(pinpoints: Any) -> list[tuple[int, int]]:
    """Pairs of whole numbers; none if it is something else."""
    if isinstance(pinpoints, str):
        try:
            pinpoints = ast.literal_eval(pinpoints)
        except (ValueError, SyntaxError):
            return []
    if not isinstance(pinpoints, list | tuple):
        return []
    are_pairs = all(
        isinstance(pair, list | tuple) and len(pair) == 2 and all(type(side) is int for side in pair)
        for pair in pinpoints
    )
    return [(width, height) for width, height in pinpoints] if are_pairs else []
