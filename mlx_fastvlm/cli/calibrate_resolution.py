"""`mlx-fastvlm calibrate-resolution`: the thresholds of `--resolution auto`, from a model's own answers about pictures."""

from __future__ import annotations

import json
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlx_fastvlm.auto_resolution import FILE_NAME
from mlx_fastvlm.cli.options import ComputeDType, FitOption, MaxTokens
from mlx_fastvlm.cli.terminal import Model, Revision, load_model, progress, say
from mlx_fastvlm.errors import FastVLMWarning, OptionError
from mlx_fastvlm.loading import DEFAULT_MODEL

if TYPE_CHECKING:
    from mlx_fastvlm.resolution_calibration import Calibration

_MAX_TOKENS = 32  # of an answer: short ones are compared
_AGREEMENT = 0.995


def calibrate_resolution(
    images: Annotated[list[str], typer.Argument(help="Pictures like those to come, and folders of such; 20 or more.")],
    model: Model = DEFAULT_MODEL,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="A question with a short answer; may be given again.", show_default="three general ones"),
    ] = None,
    agreement: Annotated[float, typer.Option(help="Share of the answers that must stay the same.")] = _AGREEMENT,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File to write.", show_default="in the model")] = None,
    recursive: Annotated[bool, typer.Option("--recursive", "-r", help="Also take folders inside folders.")] = False,
    fit: FitOption = None,
    max_tokens: MaxTokens = _MAX_TOKENS,
    dtype: ComputeDType = None,
    revision: Revision = None,
) -> None:
    """Find out at which resolution the answers about a picture stay those of the full one, by how much detail it holds.

    \b
    mlx-fastvlm calibrate-resolution photos/ --model ./fastvlm-0.5b
    mlx-fastvlm calibrate-resolution scans/ --prompt "What is the total?" --out scans.json
    mlx-fastvlm describe scan.png --resolution auto:scans.json

    Every question is asked about every picture at four resolutions. No labels are needed, and none would help: what is
    kept is the model's own answer, right or wrong.
    """
    from mlx_fastvlm.captions.picture_files import find_pictures, require_paths
    from mlx_fastvlm.fidelity.output import check_writable, write_output
    from mlx_fastvlm.loading import resolve_model
    from mlx_fastvlm.resolution_calibration import DEFAULT_PROMPTS, FEWEST_IMAGES, calibrate_resolution

    require_paths(images)
    pictures = list(find_pictures(images, recursive=recursive, on_unreadable=partial(print, flush=True)))
    if len(pictures) < FEWEST_IMAGES:
        raise OptionError(f"{len(pictures)} pictures were found; {FEWEST_IMAGES} are needed, and hundreds are better.")
    if out is not None:
        check_writable(out)  # before hours of asking
    loaded, processor = load_model(model, dtype, revision)
    path = out or resolve_model(model, revision) / FILE_NAME
    check_writable(path)
    with progress() as on_progress, warnings.catch_warnings():
        warnings.simplefilter("ignore", FastVLMWarning)  # of resolutions the model was not trained on
        found = calibrate_resolution(
            loaded,
            processor,
            [picture.source for picture in pictures],
            prompt or DEFAULT_PROMPTS,
            agreement=agreement,
            fit=fit and fit.value,
            max_tokens=max_tokens,
            on_answer=partial(on_progress, "Asking"),
        )
    write_output(path, (json.dumps(found.to_dict(), indent=2) + "\n").encode())
    say(_report(found, path))


def _report(found: Calibration, path: Path) -> str:
    lines = [
        f"{resolution:>5} pixels for all: {share:.1%} of the answers stay the same"
        for resolution, share in found.fixed.items()
    ]
    steps = "; ".join(f"{side} up to a detail of {detail:.2g}" for side, detail in found.auto.steps) or "none below"
    lines += [
        f"auto: {found.agreement:.1%}, with {found.area:.0%} of the area ({found.images} pictures). {steps}; else "
        f"{found.auto.trained}.",
        f"Saved: {path}",
    ]
    return "\n".join(lines)
