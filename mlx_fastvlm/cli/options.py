"""The options that commands with answers have in common: each named, bounded and explained once.

Model and revision are in terminal.py, beside the loading that takes them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from enum import Enum
from typing import Annotated, Any

import typer

from mlx_fastvlm.auto_resolution import AUTO, AutoResolution
from mlx_fastvlm.cli.terminal import DType
from mlx_fastvlm.errors import OptionError
from mlx_fastvlm.tiling import parse_grids


class Fit(str, Enum):
    pad = "pad"
    crop = "crop"
    native = "native"
    tiles = "tiles"


def resolution_of(text: str) -> int | str | AutoResolution:
    """A resolution as people write it: a number, "auto" or "auto:FILE". Raises OptionError."""
    if text == AUTO:
        return AUTO
    if text.startswith(f"{AUTO}:"):
        return AutoResolution.from_file(text.removeprefix(f"{AUTO}:"))
    try:
        return int(text)
    except ValueError:
        raise OptionError(f"The resolution is {text!r}; expected a number such as 512, auto, or auto:FILE.") from None


System = Annotated[str | None, typer.Option(help="System line in place of FastVLM's own.", show_default=False)]
FitOption = Annotated[
    Fit | None,
    typer.Option(
        "--fit",
        help="Make the picture square by padding (as trained) or by cropping; native keeps it whole without padding; "
        "tiles shows a large one whole and in parts.",
        show_default="as trained",
    ),
]
ResolutionOption = Annotated[
    Any,  # of what `resolution_of` gives, or None
    typer.Option(
        "--resolution",
        metavar="N|auto",
        parser=resolution_of,
        help="Pixels on a side in which the model sees the picture, a multiple of 64 from 256 to 2048: (N/64)² tokens. "
        "auto chooses by its detail; auto:FILE with the thresholds of a file.",
        show_default="as trained",
    ),
]
TileGrid = Annotated[
    str | None,
    typer.Option(
        "--tile-grid",
        metavar="CxR,…",
        help="Columns x rows of tiles to choose from with --fit tiles, such as 2x2,3x1.",
        show_default="the model's, or 1x2,2x1,2x2,3x1,1x3",
    ),
]
ComputeDType = Annotated[
    DType | None,
    typer.Option("--dtype", help="Type to compute in.", show_default="stored type; float32 on a CPU"),
]
MaxTokens = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]
Temp = Annotated[float, typer.Option(min=0.0, help="Temperature; 0 always takes the likeliest token.")]
TopP = Annotated[float, typer.Option(help="Draw from the likeliest tokens that reach this probability.")]
TopK = Annotated[int, typer.Option(min=0, help="Draw from the k likeliest tokens; 0 means all.")]
RepetitionPenalty = Annotated[float, typer.Option(help="Above 1 discourages repetition.")]
Seed = Annotated[int | None, typer.Option(min=0, help="Makes draws repeatable.", show_default="random")]
Stop = Annotated[
    list[str] | None, typer.Option(help="End the answer before this text; may be given again.", show_default=False)
]
KvBits = Annotated[
    int | None,
    typer.Option(help="Hold keys and values in 2, 3, 4, 5, 6 or 8 bits: less memory.", show_default="no quantization"),
]
JsonSchema = Annotated[
    str | None,
    typer.Option(
        "--json-schema", metavar="FILE", help="The answer is JSON that follows this schema.", show_default=False
    ),
]
Choices = Annotated[
    str | None,
    typer.Option(metavar="A,B,…", help="The answer is one of these, separated by commas.", show_default=False),
]


def tile_grids(tile_grid: str | None, fit: Fit | None) -> tuple[tuple[int, int], ...] | None:
    """--tile-grid as `Processor.tile` takes it. Raises OptionError if it is none, or there are to be no tiles."""
    if tile_grid is None:
        return None
    if fit is not Fit.tiles:
        raise OptionError("--tile-grid is about tiles; give --fit tiles too.")
    return parse_grids(tile_grid)


def answer_form(json_schema: str | None, choices: str | None) -> dict[str, Any]:
    """--json-schema and --choices as options of `generate`. Raises OptionError if the file is no schema."""
    form: dict[str, Any] = {}
    if json_schema is not None:
        from mlx_fastvlm.constraint import read_json_schema

        form["json_schema"] = read_json_schema(json_schema)
    if choices is not None:
        form["choices"] = [choice.strip() for choice in choices.split(",")]
    return form


def given_settings(options: Mapping[str, Any], loading: Mapping[str, Any]) -> dict[str, Any]:
    """What rows say of how they were made: the options that differ from the defaults, as JSON knows them.

    Args:
        options: of `GenerationOptions`.
        loading: others; those that are None are left out.

    Raises:
        OptionError: as GenerationOptions does.
    """
    from mlx_fastvlm.options import GenerationOptions

    chosen, default = GenerationOptions(**options), GenerationOptions()
    settings = {name: value for name, value in options.items() if getattr(chosen, name) != getattr(default, name)}
    if "json_schema" in settings:  # too long for every row; its digest tells schemas apart
        text = json.dumps(settings["json_schema"], sort_keys=True)
        settings["json_schema"] = f"sha256:{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    settings |= {name: value for name, value in loading.items() if value is not None}
    return json.loads(json.dumps(settings, default=str))
