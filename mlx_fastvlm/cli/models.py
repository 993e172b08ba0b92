"""`mlx-fastvlm convert | quantize | fidelity | verify | info`: making models and looking at them."""

from __future__ import annotations

import json
import sys
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from mlx_fastvlm.cli.terminal import DType, Revision, progress, say
from mlx_fastvlm.errors import CheckpointError, OptionError

_MEASURED_ANSWERS = 3  # of each resolution, after one that is not counted


class Layout(str, Enum):
    """What `convert --to` makes."""

    mlx_fastvlm = "mlx-fastvlm"
    hub = "hub"
    mlx_vlm = "mlx-vlm"


Destination = Annotated[Path, typer.Argument(metavar="DEST", help="Folder to make.")]
Force = Annotated[bool, typer.Option("--force", help="Replace DEST if it is a converted model.")]


def _part(option: str, what: str) -> object:
    return typer.Option(option, help=f"Bits of {what}, e.g. 4 or 4:32.", metavar="BITS", show_default="the recipe's")


Decoder = Annotated[str | None, _part("--decoder", "the decoder")]
Embeddings = Annotated[str | None, _part("--embeddings", "embeddings and head")]
Projector = Annotated[str | None, _part("--projector", "the projector")]
Vision = Annotated[str | None, _part("--vision", "the vision tower's Linear layers")]


def convert(
    source: Annotated[
        str, typer.Argument(help="Checkpoint in any layout (folder or zip), LoRA adapter's folder, or hub id.")
    ],
    destination: Destination,
    dtype: Annotated[DType | None, typer.Option(help="Type to store.", show_default="the checkpoint's")] = None,
    quantize: Annotated[
        str | None,
        typer.Option("--quantize", "-q", metavar="RECIPE", help="Quantize: see mlx-fastvlm quantize --help."),
    ] = None,
    decoder: Decoder = None,
    embeddings: Embeddings = None,
    projector: Projector = None,
    vision: Vision = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="Model that an adapter (or mm_projector.bin) is merged into.", show_default="the one it names"
        ),
    ] = None,
    vision_tower: Annotated[
        str | None,
        typer.Option(
            help="File or folder with a FastViTHD (MobileCLIP's or timm's) in place of the checkpoint's.",
            show_default=False,
        ),
    ] = None,
    to: Annotated[
        Layout, typer.Option(help="Layout to make: ours, the hub's (LlavaQwen2, for PyTorch), or mlx-vlm's.")
    ] = Layout.mlx_fastvlm,
    revision: Revision = None,
    force: Force = False,
) -> None:
    """Convert a checkpoint into a folder to run, or back.

    Reads LlavaQwen2 (the hub's and Apple's zips, unpacked or not), transformers' fast_vlm, mlx-vlm's, Apple's exports,
    training checkpoints, and LoRA adapters. BatchNorms, training branches and layer scales are folded into the weights,
    exactly. `describe` does this by itself on first use; convert by hand to choose the type, the bits or the place.

    \b
    mlx-fastvlm convert apple/FastVLM-0.5B fastvlm-0.5b
    mlx-fastvlm convert llava-fastvithd_1.5b_stage3.zip fastvlm-1.5b -q int4
    mlx-fastvlm convert ./my-lora ./my-model --base apple/FastVLM-0.5B --dtype float16
    mlx-fastvlm convert ./my-model ./for-pytorch --to hub
    """
    from mlx_fastvlm.convert import convert as run
    from mlx_fastvlm.convert.exchange import convert_to
    from mlx_fastvlm.convert.recipes import choose

    parts = {"decoder": decoder, "embeddings": embeddings, "projector": projector, "vision_tower": vision}
    if quantize is None and any(parts.values()):
        raise OptionError(
            "--decoder, --embeddings, --projector and --vision change a recipe; give one with --quantize."
        )
    recipe = None if quantize is None else choose(quantize, **parts)
    if revision is not None and Path(source).exists():
        raise OptionError(f"A revision is given, but {source} is no hub id.")
    origin = {"revision": revision, "base": base, "vision_tower": vision_tower, "dtype": dtype and dtype.value}
    with progress() as on_progress:
        if to is not Layout.mlx_fastvlm:
            if recipe is not None:
                raise OptionError(f"--quantize is for mlx-fastvlm's own layout; leave it away with --to {to.value}.")
            folder = convert_to(to.value, source, destination, **origin, force=force, on_progress=on_progress)
        else:
            folder = run(source, destination, **origin, recipe=recipe, force=force, on_progress=on_progress)
    _report(folder)


def quantize(
    model: Annotated[str, typer.Argument(help='Converted folder, hub id, or "demo".')],
    destination: Destination,
    recipe: Annotated[str, typer.Option("--recipe", "-q", help="One of the recipes above.")] = "int4",
    decoder: Decoder = None,
    embeddings: Embeddings = None,
    projector: Projector = None,
    vision: Vision = None,
    images: Annotated[
        Path | None,
        typer.Option(
            help="Folder of pictures to calibrate the decoder on (GPTQ): slower, needs memory for the whole model, and "
            "loses less at 4 bits and below.",
            show_default=False,
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            help="Question to calibrate on; may be given again. Best those you will ask.",
            show_default="Describe this image.",
        ),
    ] = None,
    max_images: Annotated[int, typer.Option(min=1, help="Use at most so many pictures.")] = 32,
    revision: Revision = None,
    force: Force = False,
) -> None:
    """Make a model smaller: fewer bits per weight, by recipe and part.

    What a recipe costs in quality is measured by `mlx-fastvlm fidelity`; docs/quantization.md has a table. BITS is a
    number of 2, 3, 4, 5, 6, 8, with the group of weights that share a scale behind a colon if not 64 (4:32, 4:128), or
    mxfp8, mxfp4, nvfp4, none. Recipes:

    \b
    int8       8 bits everywhere but the projector
    int6       6 bits in the decoder, 8 in embeddings and tower
    int5       5 bits in the decoder, 8 in embeddings and tower
    int4       4 bits in the decoder, 8 in embeddings and tower
    mixed-4-8  int4 with the decoder's sensitive layers at 8 bits
    int4-all   4 bits everywhere but the projector
    int3       3 bits in the decoder, groups of 32; 6 in the embeddings
    int2       2 bits in the decoder, groups of 32; for experiments
    mxfp8      microscaling float of 8 bits in the decoder, int8 elsewhere
    mxfp4      microscaling float of 4 bits in the decoder, int8 elsewhere
    nvfp4      NVIDIA's float of 4 bits in the decoder, int8 elsewhere

    \b
    mlx-fastvlm quantize apple/FastVLM-0.5B fastvlm-0.5b-int4
    mlx-fastvlm quantize ./my-model ./my-model-int8 --recipe int8 --vision none
    mlx-fastvlm quantize ./my-model ./my-model-int4 --images ./my-photos
    """
    from mlx_fastvlm.convert.calibrate import PROMPTS
    from mlx_fastvlm.convert.quantize import choose
    from mlx_fastvlm.convert.quantize import quantize as run
    from mlx_fastvlm.fidelity.pictures import find_images
    from mlx_fastvlm.loading import resolve_model

    chosen = choose(recipe, decoder=decoder, embeddings=embeddings, projector=projector, vision_tower=vision)
    pictures = [] if images is None else find_images(images, max_images, _skipped)
    with progress() as on_progress:
        folder = resolve_model(model, revision, on_progress)
    with progress() as on_progress:
        run(
            folder,
            destination,
            chosen,
            images=pictures,
            prompts=prompt or PROMPTS,
            force=force,
            on_progress=on_progress,
        )
    _report(destination)


def fidelity(
    reference: Annotated[str, typer.Argument(help='The better model: folder, hub id, or "demo".')],
    candidate: Annotated[str, typer.Argument(help="The model to judge by it, e.g. a quantized one.")],
    images: Annotated[
        Path | None, typer.Option(help="Folder of pictures to ask about; best your own.", show_default="generated ones")
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Question; may be given again.", show_default="Describe this image.")
    ] = None,
    max_images: Annotated[int, typer.Option(min=1, help="Use at most so many of the folder's pictures.")] = 16,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 64,
    dtype: Annotated[
        DType | None, typer.Option(help="Type to compute in.", show_default="stored type; float32 on a CPU")
    ] = None,
    kv_bits: Annotated[
        int | None,
        typer.Option(help="Hold CANDIDATE's keys and values in so many bits.", show_default="no quantization"),
    ] = None,
    speed_rounds: Annotated[int, typer.Option(min=0, help="How often to time each model; 0 leaves speed out.")] = 3,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the result as JSON.", show_default=False)
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw size against agreement as a PNG.", show_default=False)
    ] = None,
    save_to_model: Annotated[
        bool, typer.Option("--save-to-model", help="Keep the result in CANDIDATE's folder and its model card.")
    ] = False,
) -> None:
    """Measure what a smaller model costs in quality.

    That is: features, next-token agreement, perplexity, answers, size, memory and speed. Both models answer the same
    questions; the candidate is then led along the reference's answers and compared token by token.

    \b
    mlx-fastvlm fidelity ./fastvlm-0.5b ./fastvlm-0.5b-int4 --images ./my-photos
    mlx-fastvlm fidelity demo ./demo-int4 --plot size.png --save-to-model
    """
    from mlx_fastvlm.fidelity.command import run
    from mlx_fastvlm.fidelity.report import format_fidelity

    with progress() as on_progress:
        result = run(
            reference,
            candidate,
            images,
            prompt,
            max_images=max_images,
            max_tokens=max_tokens,
            dtype=dtype and dtype.value,
            kv_bits=kv_bits,
            speed_rounds=speed_rounds,
            json_path=json_file,
            plot_path=plot,
            save_to_model=save_to_model,
            on_skip=_skipped,
            on_progress=on_progress,
        )
    say(format_fidelity(result))


def verify(
    model: Annotated[str, typer.Argument(help='Converted folder, hub id, or "demo".')],
    source: Annotated[
        str | None,
        typer.Option(
            help="Checkpoint it was made from: fold it again and compare.", show_default="as recorded, if here"
        ),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="What an adapter was merged into.", show_default="as recorded, if here")
    ] = None,
    vision_tower: Annotated[
        str | None, typer.Option(help="The tower that was put in.", show_default="as recorded, if here")
    ] = None,
    revision: Revision = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check that a converted model is sound.

    Its files have the checksums of the conversion, its weights are finite, this machine's fast kernels equal plain
    operations on it, and what it holds is what its checkpoint folds (and rounds) to, if that is at hand.

    \b
    mlx-fastvlm verify ./my-model
    mlx-fastvlm verify ./my-model --source ./my-checkpoint
    """
    from mlx_fastvlm.convert.verify import verify as run
    from mlx_fastvlm.loading import as_path, resolve_model

    with progress() as on_progress:
        # A folder is taken as it is: a checkpoint's converted copy in the cache is not what was asked about.
        path = as_path(model)
        folder = path if path.is_dir() else resolve_model(model, revision, on_progress)
    with progress() as on_progress:
        found = run(folder, source, base=base, vision_tower=vision_tower, on_progress=on_progress)
    if as_json:
        say(json.dumps(found.to_dict(), indent=2))
    else:
        width = max(map(len, found.checks))
        say("\n".join(f"{name:<{width}}  {result}" for name, result in found.checks.items()))
    if found.problems:
        raise CheckpointError(" ".join(found.problems))


def _skipped(path: Path, reason: str) -> None:
    """A picture that is left out; the reason names it."""
    print(f"Notice: left out: {reason}", file=sys.stderr)


def _report(folder: Path) -> None:
    """Say what was made, and what its user should know."""
    from mlx_fastvlm.convert.aside import read_notes

    notes = read_notes(folder)
    assert notes is not None
    for notice in notes["notices"]:
        print(f"Notice: {notice}", file=sys.stderr)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    line = f"{folder}: {size / 1e6:,.1f} MB of {notes['dtype']}"
    quantization = notes.get("quantization")
    if quantization:
        line += f", {quantization['recipe']}: {quantization['bits_per_weight']:.2f} bits per weight"
        errors = ", ".join(f"{part} {error:.1%}" for part, error in quantization["relative_weight_error"].items())
        line += f"; rounding moved the weights by {errors} (root mean square)"
    elif "self_check" in notes:
        error = notes["self_check"]["max_relative_error"]
        line += (
            f"; folding differs from the checkpoint by at most {error:.0e} (relative)"
            if error
            else "; folding is exact"
        )
    say(f"{line}.")


def info(
    model: Annotated[str, typer.Argument(help='Hub id, model folder, or "demo".')],
    resolution: Annotated[
        bool, typer.Option("--resolution", help="Show what each resolution costs: tokens, predicted times.")
    ] = False,
    measure: Annotated[
        bool, typer.Option("--measure", help="Also measure it, on this machine; with --resolution.")
    ] = False,
    revision: Revision = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what a model is: sizes, parameters by part, type, where it came from; or what resolutions cost."""
    from mlx_fastvlm.loading import resolve_model
    from mlx_fastvlm.model_info import describe_model, format_model_info

    if measure and not resolution:
        raise OptionError("--measure is about resolutions; give --resolution too.")
    with progress() as on_progress:
        folder = resolve_model(model, revision, on_progress)
    if resolution:
        _show_costs(folder, measure, as_json)
        return
    facts = describe_model(folder)
    say(json.dumps(facts, indent=2) if as_json else format_model_info(facts))


def _show_costs(folder: Path, measure: bool, as_json: bool) -> None:
    from mlx_fastvlm.benchmarks.resolution import add_measured, cost_table, format_costs
    from mlx_fastvlm.config import FastVLMConfig
    from mlx_fastvlm.loading import load

    config = FastVLMConfig.from_folder(folder)
    costs = cost_table(config)
    if measure:
        with progress() as on_progress:
            on_answer = partial(on_progress, "Measuring")
            add_measured(costs, *load(folder), repeat=_MEASURED_ANSWERS, on_answer=on_answer)
    trained = config.vision_config.image_size
    say(json.dumps({"trained": trained, "resolutions": costs}, indent=2) if as_json else format_costs(costs, trained))
