"""`mlx-fastvlm watch`: what is seen in a video, a camera or on the screen, frame by frame."""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from mlx_fastvlm.cli.describe import PRESET_PROMPTS, Preset
from mlx_fastvlm.cli.options import (
    Choices,
    ComputeDType,
    FitOption,
    JsonSchema,
    MaxTokens,
    RepetitionPenalty,
    ResolutionOption,
    Seed,
    Stop,
    System,
    Temp,
    TopK,
    TopP,
    answer_form,
)
from mlx_fastvlm.cli.terminal import DType, Model, Revision
from mlx_fastvlm.errors import OptionError
from mlx_fastvlm.loading import DEFAULT_MODEL
from mlx_fastvlm.options import DEFAULT_MAX_TOKENS

_UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
_WITH_UNITS = re.compile(r"(?:(\d+(?:\.\d+)?)(h|ms|m|s))+", re.ASCII)
_ONE_UNIT = re.compile(r"(\d+(?:\.\d+)?)(h|ms|m|s)")
_CLOCK = re.compile(r"(?:(\d+):)?(\d+):([0-5]?\d(?:\.\d+)?)", re.ASCII)
_PLAIN = re.compile(r"\d+(?:\.\d*)?|\.\d+", re.ASCII)


class OutputFormat(str, Enum):
    text = "text"
    jsonl = "jsonl"
    srt = "srt"
    vtt = "vtt"


def watch(
    source: Annotated[
        str,
        typer.Argument(
            help="A video file; a camera's number, as 0; screen; an http(s) or rtsp address; "
            "or DEVICE:NAME with one of FFmpeg's input devices."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE",
            help="Subtitles (.srt, .vtt), or a row for every frame (.jsonl) that a later run goes on with.",
            show_default="standard output",
        ),
    ] = None,
    form: Annotated[
        OutputFormat | None,
        typer.Option("--format", help="How it is written.", show_default="by --out's suffix, or text"),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Your question.", show_default="the preset's")] = None,
    preset: Annotated[
        Preset | None, typer.Option(help="A ready-made question instead of --prompt.", show_default="describe")
    ] = None,
    model: Model = DEFAULT_MODEL,
    every: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="Look at a frame so often: 1s, 500ms, 2m; 0 for every frame.",
            show_default="1s; live and with --on-change: every frame",
        ),
    ] = None,
    max_fps: Annotated[
        float | None,
        typer.Option(
            "--max-fps",
            "--fps",
            metavar="N",
            help="Look at no more frames a second, instead of --every.",
            show_default=False,
        ),
    ] = None,
    on_change: Annotated[
        bool, typer.Option("--on-change", help="Report only frames that differ from the last one described.")
    ] = False,
    threshold: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            help="How much a frame must differ from the last one described to be described anew, where it differs most: "
            "0 (always) to 1 (black to white).",
            show_default="0.02; with --on-change 0.1",
        ),
    ] = None,
    start: Annotated[
        str | None, typer.Option(metavar="TIME", help="Begin here: 90s, 1m30s, 1:30.", show_default="the beginning")
    ] = None,
    end: Annotated[
        str | None, typer.Option(metavar="TIME", help="End here; live: after this time.", show_default="the end")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what --out holds.")] = False,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Frames described together: of a file, more is faster and takes more memory; live, more frames are "
            "described and each waits longer.",
            show_default="16; live: 1",
        ),
    ] = None,
    system: System = None,
    resolution: ResolutionOption = None,
    fit: FitOption = None,
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
    revision: Revision = None,
) -> None:
    """Describe the frames of a video, a camera or the screen, with their times.

    Every frame is judged by itself: the model was not trained on video and sees no motion. Of a live source always the
    newest frame is described; those that come meanwhile are dropped. Needs the extra: pip install 'mlx-fastvlm[video]'.

    \b
    mlx-fastvlm watch talk.mp4 --every 5s --out talk.srt
    mlx-fastvlm watch clip.mov --on-change --out clip.jsonl
    mlx-fastvlm watch 0 --prompt "Is somebody at the door?" --choices yes,no
    mlx-fastvlm watch screen --max-fps 1 --end 10m --out screen.vtt
    """
    if prompt is not None and preset is not None:
        raise OptionError("Both --prompt and --preset are given; give one of them.")
    options = {
        "max_tokens": max_tokens,
        "temp": temp,
        "top_p": top_p,
        "top_k": top_k,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "stop": stop or (),
        "system": system,
        "resolution": resolution,
        "fit": fit and fit.value,
        **answer_form(json_schema, choices),
    }

    from mlx_fastvlm.cli.watch_run import Watch, run_watch

    run_watch(
        Watch(
            source=source,
            model=model,
            question=PRESET_PROMPTS[preset or Preset.describe] if prompt is None else prompt,
            options=options,
            dtype=dtype,
            revision=revision,
            out=out,
            form=form and form.value,
            overwrite=overwrite,
            every=_interval(every, max_fps),
            on_change=on_change,
            threshold=threshold,
            start=0.0 if start is None else parse_time(start, "--start"),
            end=None if end is None else parse_time(end, "--end"),
            batch_size=batch_size,
        )
    )


def describe_video(
    source: str,
    question: str,
    model: str,
    options: Mapping[str, Any],
    *,
    dtype: DType | None,
    revision: str | None,
    as_json: bool,
    stats: bool,
) -> None:
    """What `mlx-fastvlm describe` does with a video: a frame a second, with its time.

    Args:
        source: for which `video_file.is_video` holds.
        question, model, dtype, revision: as the command has them.
        options: of `GenerationOptions`.
        as_json: print a JSON object for each frame instead of time and text.
        stats: say at the end how many frames there were and how long they took.

    Raises:
        FastVLMError: what the user can mend.
    """
    from mlx_fastvlm.cli.watch_run import Watch, run_watch

    form = OutputFormat.jsonl if as_json else OutputFormat.text
    run_watch(
        Watch(
            source=source,
            model=model,
            question=question,
            options=options,
            dtype=dtype,
            revision=revision,
            form=form.value,
            summary=stats,
        )
    )


def parse_time(text: str, option: str) -> float:
    """Seconds of a time as people write it: 90, 90s, 500ms, 1m30s, 1:30, 0:01:30.5. Raises OptionError for another."""
    text = text.strip()
    if _PLAIN.fullmatch(text):
        return float(text)
    if _WITH_UNITS.fullmatch(text):
        return sum(float(number) * _UNITS[unit] for number, unit in _ONE_UNIT.findall(text))
    if clock := _CLOCK.fullmatch(text):
        hours, minutes, seconds = clock.groups()
        return 3600.0 * int(hours or 0) + 60.0 * int(minutes) + float(seconds)
    raise OptionError(f'{option} is "{text}"; expected a time as 90s, 500ms, 1m30s or 1:30.')


def _interval(every: str | None, max_fps: float | None) -> float | None:
    if every is not None and max_fps is not None:
        raise OptionError("Both --every and --max-fps are given; give one of them.")
    if every is not None:
        return parse_time(every, "--every")
    if max_fps is None:
        return None
    if not 0 < max_fps < float("inf"):
        raise OptionError(f"--max-fps is {max_fps:g}; expected a number above 0.")
    return 1 / max_fps
