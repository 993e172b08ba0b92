"""`mlx-fastvlm caption`: a caption for every picture in files and folders, in a run that can be stopped and goes on."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
    TileGrid,
    TopK,
    TopP,
    answer_form,
    given_settings,
    tile_grids,
)
from mlx_fastvlm.cli.terminal import Model, Revision, load_model, tell
from mlx_fastvlm.errors import OptionError
from mlx_fastvlm.loading import DEFAULT_MODEL
from mlx_fastvlm.options import DEFAULT_MAX_TOKENS

if TYPE_CHECKING:
    from mlx_fastvlm.captions.picture_files import Picture
    from mlx_fastvlm.cli.caption_run import CaptionRun, Output

SIDECARS = "txt"  # what --out is given for a text file beside each picture


def caption(
    paths: Annotated[
        list[str] | None, typer.Argument(help="Pictures and folders of pictures, PDF documents, http(s) URLs.")
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE|txt",
            help='File of captions, .jsonl or .csv, that a later run goes on with; "txt" writes photo.txt beside photo.jpg.',
            show_default="standard output",
        ),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Your question.", show_default="the preset's")] = None,
    preset: Annotated[
        Preset | None, typer.Option(help="A ready-made question instead of --prompt.", show_default="describe")
    ] = None,
    model: Model = DEFAULT_MODEL,
    recursive: Annotated[bool, typer.Option("--recursive", "-r", help="Also take folders inside folders.")] = False,
    files_from: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help='Take more paths from a file, one a line, or separated by null bytes; "-" for standard input.',
            show_default=False,
        ),
    ] = None,
    metadata: Annotated[
        bool,
        typer.Option("--metadata", help="Also write captions into the pictures' own files, as alternative text."),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Caption all pictures anew and replace what is there.")
    ] = False,
    fail_on_bad: Annotated[
        bool, typer.Option("--fail-on-bad", help="Exit with 1 if a picture could not be read.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON objects, one a line, instead of path and caption.")
    ] = False,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Pictures at once: more is faster and takes more memory.")
    ] = 16,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads that read pictures.", show_default="as many as cores, up to 4")
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
    revision: Revision = None,
) -> None:
    """Caption many pictures. A run that was stopped, in whatever way, goes on when the same command is given again.

    \b
    mlx-fastvlm caption photos/                             # prints path and caption
    mlx-fastvlm caption photos/ --recursive --out captions.jsonl
    mlx-fastvlm caption *.jpg scan.pdf --out captions.csv --preset brief
    mlx-fastvlm caption photos/ --out txt --prompt "Describe the clothes."
    mlx-fastvlm caption photos/ --metadata                  # into the pictures' own files
    find . -name '*.png' -print0 | mlx-fastvlm caption --files-from - --choices day,night
    """
    if prompt is not None and preset is not None:
        raise OptionError("Both --prompt and --preset are given; give one of them.")
    if as_json and out is not None:
        raise OptionError("--json is about what is printed; give --out captions.jsonl for a file of such objects.")
    question = PRESET_PROMPTS[preset or Preset.describe] if prompt is None else prompt
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
    grids = tile_grids(tile_grid, fit)
    loading = {"dtype": dtype and dtype.value, "revision": revision, "tile_grid": tile_grid}

    from mlx_fastvlm.captions.captioning import caption_images
    from mlx_fastvlm.captions.rows import Recipe
    from mlx_fastvlm.cli.caption_run import CaptionRun, Embedder

    recipe = Recipe(model, question, given_settings(options, loading))
    run = CaptionRun(recipe, Embedder(overwrite) if metadata else None)
    pictures = named_pictures(paths or [], files_from, recursive, run.report_bad)
    output = _open_output(out, run, pictures, as_json, overwrite)
    try:
        todo = [picture for picture in pictures if not output.is_finished(picture)]
        run.finished_before = len(pictures) - len(todo)
        if todo:
            loaded, processor = load_model(model, dtype, revision)
            if grids is not None:
                processor.tile(grids)
            captions = caption_images(
                loaded,
                processor,
                (picture.source for picture in todo),
                question,
                batch_size=batch_size,
                threads=threads,
                **options,
            )
            run.work(todo, captions, output, shows_bar=out is not None or not sys.stdout.isatty())
        output.finish()
    except KeyboardInterrupt:
        left = len(pictures) - run.finished_before - run.captioned
        command = "The same command without --overwrite" if overwrite else "The same command"
        goes_on = "" if out is None and not metadata else f" {command} goes on from there."
        tell(f"\n{run.captioned} captioned, {left} not.{goes_on}")
        raise
    finally:
        output.close()
    tell(run.summary())
    if fail_on_bad and run.bad:
        raise typer.Exit(1)


def named_pictures(
    paths: list[str], files_from: str | None, recursive: bool, on_unreadable: Callable[[str], None]
) -> list[Picture]:
    """All pictures, in order. Raises OptionError if there are none, ImageError if a named path does not exist."""
    from mlx_fastvlm.captions.picture_files import find_pictures, read_list, require_paths

    if "-" in paths:
        raise OptionError(
            '"-" is no picture here: try `mlx-fastvlm describe -`, or --files-from - for a list of paths.'
        )
    require_paths(paths)
    if files_from == "-":
        paths = paths + read_list(sys.stdin.buffer, "Standard input")
    elif files_from is not None:
        try:
            with open(files_from, "rb") as file:
                paths = paths + read_list(file, files_from)
        except OSError as error:
            raise OptionError(f"The list {files_from} cannot be read ({error.strerror or error}).") from None
    if not paths:
        raise OptionError("No picture is given: name pictures or folders, or a list of them with --files-from.")
    pictures = list(find_pictures(paths, recursive=recursive, on_unreadable=on_unreadable))
    if not pictures:
        advice = "" if recursive else ": --recursive also looks into the folders inside"
        raise OptionError(f"No picture was found in {' '.join(paths[:3])}{' …' if len(paths) > 3 else ''}{advice}.")
    return pictures


def _open_output(out: str | None, run: CaptionRun, pictures: list[Picture], as_json: bool, overwrite: bool) -> Output:
    from mlx_fastvlm.captions.output import CaptionFile, Sidecars
    from mlx_fastvlm.cli.caption_run import Printed

    if out is None:
        return Printed(as_json, run.embedder)
    if out == SIDECARS:
        return Sidecars(pictures, overwrite=overwrite)
    return CaptionFile(Path(out), run.recipe, pictures, overwrite=overwrite)
