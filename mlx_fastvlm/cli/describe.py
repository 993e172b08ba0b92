"""`mlx-fastvlm describe`: one picture, one answer."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer

from mlx_fastvlm.cache_folder import cache_home
from mlx_fastvlm.cli.options import (
    Choices,
    ComputeDType,
    FitOption,
    JsonSchema,
    KvBits,
    MaxTokens,
    RepetitionPenalty,
    ResolutionOption,
    Seed,
    Stop,
    System,
    Temp,
    TileGrid,
    TopK,
    TopP,
    answer_form,
    tile_grids,
)
from mlx_fastvlm.cli.statistics import statistics
from mlx_fastvlm.cli.terminal import Model, Revision, load_model, say
from mlx_fastvlm.errors import OptionError
from mlx_fastvlm.image_decoding import open_image
from mlx_fastvlm.image_source import read_image_bytes
from mlx_fastvlm.loading import DEFAULT_MODEL
from mlx_fastvlm.options import DEFAULT_MAX_TOKENS
from mlx_fastvlm.video_file import is_video

if TYPE_CHECKING:
    from mlx_fastvlm.model import FastVLM
    from mlx_fastvlm.processor import Processor
    from mlx_fastvlm.reuse import Reuse


class Preset(str, Enum):
    """Ready-made prompts, worded as in Apple's demo app."""

    describe = "describe"
    brief = "brief"
    read = "read"
    expression = "expression"


PRESET_PROMPTS = {
    Preset.describe: "Describe this image.",
    Preset.brief: "Describe the image in English. Output should be brief, about 15 words or less.",
    Preset.read: "What is written in this image? Output only the text in the image.",
    Preset.expression: "What is this person's facial expression? Output only one or two words.",
}


def describe(
    image: Annotated[str, typer.Argument(help='Picture: a file, "-" for standard input, or an http(s) URL.')],
    prompt: Annotated[str | None, typer.Argument(help="Your question.", show_default="the preset's")] = None,
    model: Model = DEFAULT_MODEL,
    preset: Annotated[
        Preset | None, typer.Option(help="A ready-made question instead of PROMPT.", show_default="describe")
    ] = None,
    more_images: Annotated[
        list[str] | None,
        typer.Option("--image", help="A further picture; <image> in PROMPT marks where each goes.", show_default=False),
    ] = None,
    system: System = None,
    resolution: ResolutionOption = None,
    fit: FitOption = None,
    tile_grid: TileGrid = None,
    max_tokens: MaxTokens = DEFAULT_MAX_TOKENS,
    temp: Temp = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Seed = None,
    stop: Stop = None,
    json_schema: JsonSchema = None,
    choices: Choices = None,
    dtype: ComputeDType = None,
    kv_bits: KvBits = None,
    revision: Revision = None,
    image_cache: Annotated[
        bool,
        typer.Option(
            "--image-cache", help="Keep what the encoder made of a picture, so that it never encodes it again."
        ),
    ] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Print times by stage and token rates to stderr.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of streaming.")] = False,
) -> None:
    """Describe a picture, or answer a question about it.

    \b
    mlx-fastvlm describe photo.jpg
    mlx-fastvlm describe photo.jpg "How many people are there?" --stats
    mlx-fastvlm describe photo.jpg "Is it day or night?" --choices day,night
    mlx-fastvlm describe before.png "What changed?" --image after.png
    mlx-fastvlm describe clip.mp4 (frame by frame; mlx-fastvlm watch --help has more)
    cat photo.jpg | mlx-fastvlm describe - --preset brief --json
    """
    if prompt is not None and preset is not None:
        raise OptionError("Both a prompt and --preset are given; give one of them.")
    question = PRESET_PROMPTS[preset or Preset.describe] if prompt is None else prompt

    from mlx_fastvlm.cli.watch import describe_video
    from mlx_fastvlm.generate import stream_generate
    from mlx_fastvlm.options import GenerationOptions

    options = {
        "max_tokens": max_tokens,
        "temp": temp,
        "top_p": top_p,
        "top_k": top_k,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "stop": stop or (),
        "system": system,
        "kv_bits": kv_bits,
        "resolution": resolution,
        "fit": fit and fit.value,
        **answer_form(json_schema, choices),
    }
    GenerationOptions(**options)
    grids = tile_grids(tile_grid, fit)
    if is_video(image):
        if more_images or grids is not None or image_cache:
            raise OptionError("A video is described by itself: leave out --image, --tile-grid and --image-cache.")
        describe_video(image, question, model, options, dtype=dtype, revision=revision, as_json=as_json, stats=stats)
        return
    pictures = [_read_picture(name) for name in (image, *(more_images or ()))]
    loaded, processor = load_model(model, dtype, revision)
    if grids is not None:
        processor.tile(grids)
    reuse = _kept_rows(loaded, processor) if image_cache else None
    responses = stream_generate(loaded, processor, question, image=pictures, reuse=reuse, **options)
    text = ""
    for response in responses:
        text += response.text
        if not as_json:
            say(response.text, end="")
    if as_json:
        last = dataclasses.asdict(response)
        del last["token"]
        images = {"images": [image, *more_images]} if more_images else {"image": image}
        say(json.dumps({"model": model, **images, "prompt": question, **last, "text": text}, ensure_ascii=False))
    else:
        say("")
    if stats:
        print(statistics(response), file=sys.stderr)
    if response.finish_reason == "length" and json_schema is not None:
        _check_complete(text, max_tokens)


def _read_picture(name: str) -> io.BytesIO:
    """A picture's bytes. A wrong one should be known before seconds of loading, and the rest be here before the clock starts."""
    picture = io.BytesIO(read_image_bytes(name))
    picture.name = name
    open_image(picture)
    picture.seek(0)
    return picture


def _kept_rows(model: FastVLM, processor: Processor) -> Reuse:
    from mlx_fastvlm.reuse import Reuse

    return Reuse(model, processor, folder=cache_home() / "image-rows")


def _check_complete(text: str, max_tokens: int) -> None:
    """Raise OptionError if an answer in JSON was cut off."""
    try:
        json.loads(text)
    except ValueError:
        raise OptionError(f"The answer in JSON did not end within {max_tokens} tokens; raise --max-tokens.") from None
