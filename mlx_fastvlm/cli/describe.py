"""`mlx-fastvlm describe`: one picture, one answer."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer

from mlx_fastvlm.cli.terminal import DType, Model, Revision, load_model, say
from mlx_fastvlm.errors import OptionError
from mlx_fastvlm.loading import DEFAULT_MODEL

if TYPE_CHECKING:
    from mlx_fastvlm.generate import GenerationResponse


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


class Fit(str, Enum):
    pad = "pad"
    crop = "crop"


def describe(
    image: Annotated[str, typer.Argument(help='Picture: a file, "-" for standard input, or an http(s) URL.')],
    prompt: Annotated[str | None, typer.Argument(help="Your question.", show_default="the preset's")] = None,
    model: Model = DEFAULT_MODEL,
    preset: Annotated[
        Preset | None, typer.Option(help="A ready-made question instead of PROMPT.", show_default="describe")
    ] = None,
    system: Annotated[
        str | None, typer.Option(help="System line in place of FastVLM's own.", show_default=False)
    ] = None,
    fit: Annotated[
        Fit | None,
        typer.Option(help="Make the picture square by padding (as trained) or by cropping.", show_default="as trained"),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    temp: Annotated[float, typer.Option(min=0.0, help="Temperature; 0 always takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens that reach this probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Draw from the k likeliest tokens; 0 means all.")] = 0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 discourages repetition.")] = 1.0,
    seed: Annotated[int | None, typer.Option(min=0, help="Makes draws repeatable.", show_default="random")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="End the answer before this text; may be given again.", show_default=False)
    ] = None,
    dtype: Annotated[
        DType | None, typer.Option(help="Type to compute in.", show_default="stored type; float32 on a CPU")
    ] = None,
    kv_bits: Annotated[
        int | None,
        typer.Option(
            help="Hold keys and values in 2, 3, 4, 5, 6 or 8 bits: less memory.", show_default="no quantization"
        ),
    ] = None,
    revision: Revision = None,
    stats: Annotated[bool, typer.Option("--stats", help="Print times by stage and token rates to stderr.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of streaming.")] = False,
) -> None:
    """Describe a picture, or answer a question about it.

    \b
    mlx-fastvlm describe photo.jpg
    mlx-fastvlm describe photo.jpg "How many people are there?" --stats
    cat photo.jpg | mlx-fastvlm describe - --preset brief --json
    """
    if prompt is not None and preset is not None:
        raise OptionError("Both a prompt and --preset are given; give one of them.")
    question = PRESET_PROMPTS[preset or Preset.describe] if prompt is None else prompt

    from mlx_fastvlm.generate import check_options, stream_generate
    from mlx_fastvlm.image_processing import open_image
    from mlx_fastvlm.image_source import read_image_bytes

    sampling = {
        "max_tokens": max_tokens,
        "temp": temp,
        "top_p": top_p,
        "top_k": top_k,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "kv_bits": kv_bits,
    }
    check_options(**sampling)
    # A wrong picture should be known before seconds of loading, and its bytes be here before the clock starts.
    picture = io.BytesIO(read_image_bytes(image))
    picture.name = image
    open_image(picture)
    picture.seek(0)
    loaded, processor = load_model(model, dtype, revision)
    if fit is not None:
        processor.image_processor = dataclasses.replace(processor.image_processor, fit=fit.value)
    responses = stream_generate(
        loaded,
        processor,
        question,
        image=picture,
        stop=stop or (),
        system=system,
        **sampling,
    )
    text = ""
    for response in responses:
        text += response.text
        if not as_json:
            say(response.text, end="")
    if as_json:
        last = dataclasses.asdict(response)
        del last["token"]
        say(json.dumps({"model": model, "image": image, "prompt": question, **last, "text": text}, ensure_ascii=False))
    else:
        say("")
    if stats:
        print(_statistics(response), file=sys.stderr)


def _statistics(response: GenerationResponse) -> str:
    stages = ", ".join(f"{stage} {seconds * 1e3:.1f}" for stage, seconds in response.timings.items())
    return (
        f"Time to first token: {response.ttft * 1e3:.1f} ms ({stages})\n"
        f"Prompt: {response.prompt_tokens} tokens, {response.prompt_tps:.1f} tok/s\n"
        f"Answer: {response.generation_tokens} tokens, {response.generation_tps:.1f} tok/s ({response.finish_reason})\n"
        f"Peak memory: {response.peak_memory:.3f} GB"
    )
