"""The command line: `mlx-fastvlm describe | convert | info`. Parses, prints, and turns known errors into one line.

Answers go to stdout; everything else goes to stderr. Exit codes: 0 done, 1 something the user can mend, 130 Ctrl-C.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlx_fastvlm import __version__
from mlx_fastvlm.errors import FastVLMError, OptionError
from mlx_fastvlm.kernels import cpu
from mlx_fastvlm.loading import DEFAULT_MODEL, OnProgress

if TYPE_CHECKING:
    import mlx.core as mx

    from mlx_fastvlm.generate import GenerationResponse
    from mlx_fastvlm.model import FastVLM
    from mlx_fastvlm.processor import Processor

_INTERRUPTED = 130  # exit code of a program that Ctrl-C ended
# The base of every wrong-usage error. Newer typers carry a copy of click, older ones use click itself; both lead here.
_UsageErrors = typer.BadParameter.__mro__[2]

app = typer.Typer(
    name="mlx-fastvlm",
    help="Run Apple's FastVLM on MLX: describe pictures, convert checkpoints.",
    epilog="Start without any download: mlx-fastvlm describe examples/shapes-two.png --model demo",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


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


class DType(str, Enum):
    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"


class Fit(str, Enum):
    pad = "pad"
    crop = "crop"


Model = Annotated[
    str,
    typer.Option(
        "--model", "-m", help='Hub id, model folder, or "demo" (built in, knows only simple shapes and words).'
    ),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.", show_default="main")]


@app.command()
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
    }
    check_options(**sampling)
    # A wrong picture should be known before seconds of loading, and its bytes be here before the clock starts.
    picture = io.BytesIO(read_image_bytes(image))
    picture.name = image
    open_image(picture)
    picture.seek(0)
    loaded, processor = _load(model, dtype, revision)
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
            _say(response.text, end="")
    if as_json:
        last = dataclasses.asdict(response)
        del last["token"]
        _say(json.dumps({"model": model, "image": image, "prompt": question, **last, "text": text}, ensure_ascii=False))
    else:
        _say("")
    if stats:
        print(_statistics(response), file=sys.stderr)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="Checkpoint: a folder in the hub's layout, or a hub id.")],
    destination: Annotated[Path, typer.Argument(metavar="DEST", help="Folder to make.")],
    dtype: Annotated[DType | None, typer.Option(help="Type to store.", show_default="the checkpoint's")] = None,
    revision: Revision = None,
    force: Annotated[bool, typer.Option("--force", help="Replace DEST if it is a converted model.")] = False,
) -> None:
    """Convert a FastVLM checkpoint into the folder that mlx-fastvlm runs.

    BatchNorms, training branches and layer scales are folded into the weights, exactly. `describe` does this by itself
    on first use; convert by hand to choose the type or the place.

    \b
    mlx-fastvlm convert apple/FastVLM-0.5B fastvlm-0.5b
    mlx-fastvlm convert ./my-finetune ./my-model --dtype float16
    """
    from mlx_fastvlm.convert import convert as run

    with _progress() as on_progress:
        folder = run(
            source,
            destination,
            dtype=dtype and dtype.value,
            revision=revision,
            force=force,
            on_progress=on_progress,
        )
    record = json.loads((folder / "conversion.json").read_text())
    for notice in record["notices"]:
        print(f"Notice: {notice}", file=sys.stderr)
    size = (folder / "model.safetensors").stat().st_size
    _say(
        f"{folder}: {size / 1e6:,.1f} MB of {record['dtype']}; folding differs from the checkpoint by at most "
        f"{record['self_check']['max_relative_error']:.0e} (relative)."
    )


@app.command()
def info(
    model: Annotated[str, typer.Argument(help='Hub id, model folder, or "demo".')],
    revision: Revision = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what a model is: sizes, parameters by part, type, where it came from."""
    from mlx_fastvlm.loading import resolve_model
    from mlx_fastvlm.model_info import describe_model, format_model_info

    with _progress() as on_progress:
        folder = resolve_model(model, revision, on_progress)
    facts = describe_model(folder)
    _say(json.dumps(facts, indent=2) if as_json else format_model_info(facts))


def _show_version(asked: bool) -> None:
    if asked:
        _say(f"mlx-fastvlm {__version__}")
        raise typer.Exit()


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        _say(context.get_help())


def main() -> None:
    """Entry point: run the command line, with known errors as one line on stderr."""
    signal.signal(signal.SIGTERM, _interrupt)  # clean up as on Ctrl-C
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal that cannot show a character shows "?"
    try:
        code = app(standalone_mode=False) or 0
        sys.stdout.flush()
        if code == _INTERRUPTED:  # typer has caught the Ctrl-C
            raise KeyboardInterrupt
    except FastVLMError as error:
        code = _fail(str(error))
    except _UsageErrors as error:
        message = error.format_message().replace("Value error, ", "").rstrip(".")  # pydantic's words, typer's message
        code = _fail(f"{message}. See: mlx-fastvlm --help")
    except (KeyboardInterrupt, typer.Abort):
        print("\nStopped.", file=sys.stderr)
        code = _INTERRUPTED
    except OSError as error:
        code = _fail(f"The output cannot be written: {error.strerror or error}.")
    sys.exit(code)


def _say(text: str, end: str = "\n") -> None:
    """Print to stdout now; end quietly, as done, when its reader has left (`| head -1`)."""
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout once more at its exit
        raise typer.Exit(0) from None


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _fail(message: str) -> int:
    print(f"mlx-fastvlm: {' '.join(message.split())}", file=sys.stderr)
    return 1


def _load(model: str, dtype: DType | None, revision: str | None) -> tuple[FastVLM, Processor]:
    from mlx_fastvlm.loading import LARGE_MODEL_BYTES, load, on_slow_cpu, resolve_model

    with _progress() as on_progress:
        folder = resolve_model(model, revision, on_progress)
    loaded, processor = load(folder, dtype=dtype and dtype.value)
    size = (folder / "model.safetensors").stat().st_size
    if size > LARGE_MODEL_BYTES and on_slow_cpu():
        _advise_on_speed(loaded.dtype)
    return loaded, processor


def _advise_on_speed(dtype: mx.Dtype) -> None:
    """One line on what would make a large model many times faster on a Linux CPU, if anything would."""
    from mlx.core import float32

    if dtype != float32:
        print("Many times faster on this CPU: --dtype float32", file=sys.stderr)
    elif cpu.missing() is not None:
        advice = "pip install scipy-openblas32 numba, see docs/cpu.md"
        print(f"Many times faster on this CPU: {advice} (now: {cpu.missing()})", file=sys.stderr)


@contextmanager
def _progress() -> Iterator[OnProgress]:
    """A progress line on stderr that appears when there is something to report."""
    bar = task = None

    def report(what: str, done: int, total: int) -> None:
        nonlocal bar, task
        if bar is None:
            # Imported on first use: most commands report nothing, and rich takes 50 ms.
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
            bar = Progress(*columns, console=Console(stderr=True))
            bar.start()
            task = bar.add_task(what, total=total)
        bar.update(task, completed=done)

    try:
        yield report
    finally:
        if bar is not None:
            bar.stop()


def _statistics(response: GenerationResponse) -> str:
    stages = ", ".join(f"{stage} {seconds * 1e3:.1f}" for stage, seconds in response.timings.items())
    return (
        f"Time to first token: {response.ttft * 1e3:.1f} ms ({stages})\n"
        f"Prompt: {response.prompt_tokens} tokens, {response.prompt_tps:.1f} tok/s\n"
        f"Answer: {response.generation_tokens} tokens, {response.generation_tps:.1f} tok/s ({response.finish_reason})\n"
        f"Peak memory: {response.peak_memory:.3f} GB"
    )
