"""The options that commands with answers have in common: each named, bounded and explained once.

Model and revision are in terminal.py, beside the loading that takes them.
"""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Any

import typer

from mlx_fastvlm.cli.terminal import DType


class Fit(str, Enum):
    pad = "pad"
    crop = "crop"


System = Annotated[str | None, typer.Option(help="System line in place of FastVLM's own.", show_default=False)]
FitOption = Annotated[
    Fit | None,
    typer.Option(
        "--fit", help="Make the picture square by padding (as trained) or by cropping.", show_default="as trained"
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


def answer_form(json_schema: str | None, choices: str | None) -> dict[str, Any]:
    """--json-schema and --choices as options of `generate`. Raises OptionError if the file is no schema."""
    form: dict[str, Any] = {}
    if json_schema is not None:
        from mlx_fastvlm.constraint import read_json_schema

        form["json_schema"] = read_json_schema(json_schema)
    if choices is not None:
        form["choices"] = [choice.strip() for choice in choices.split(",")]
    return form
