"""Quantization: what every recipe saves and what it costs in quality, beside the unquantized types.

By default the demo model, which can be asked for the right answers: size on disk, fidelity to the embedded float16
weights on some of easy-VQA's test pictures and the generated ones (see mlx_fastvlm.fidelity), and exact match on all
of easy-VQA's test questions (pip install easy-vqa). With --full-size, a model of real size instead, whose values need
not mean anything: size, memory and speed, each taken in processes that hold nothing else, in turns.

  python -m mlx_fastvlm.benchmarks.quantization --save
  python -m mlx_fastvlm.benchmarks.quantization --kv-bits 8 6 5 4 3 2 --save quantization-kv
  python -m tests.reference.hub_checkpoint random-0.5b --config 0.5b      (from the repository root)
  python -m mlx_fastvlm.benchmarks.quantization --full-size random-0.5b --save quantization-0.5b

The tables of docs/quantization.md, from the saved results and without measuring anything:

  python -m mlx_fastvlm.benchmarks.quantization --docs docs/quantization.md --plot docs/quantization.png
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_fastvlm.config import FastVLMConfig
from mlx_fastvlm.convert.quantize import RECIPES, quantize
from mlx_fastvlm.errors import FastVLMError
from mlx_fastvlm.fidelity.comparison import measure as measure_fidelity
from mlx_fastvlm.fidelity.pictures import NUM_GENERATED, draw
from mlx_fastvlm.fidelity.plot import plot_fidelity
from mlx_fastvlm.fidelity.results import Fidelity
from mlx_fastvlm.fidelity.stopwatch import SPEED_TOKENS, time_in_turns
from mlx_fastvlm.loading import DEMO, DTYPES, compute_dtype, load, resolve_model
from mlx_fastvlm.quantization import Storage
from mlx_fastvlm.safetensors_file import DTYPE_NAMES, SafetensorsFile

from .command import DEFAULT_PROMPT, BenchmarkError, add_picture, at_least_one, make_parser, progress, run
from .easy_vqa import answers, exact_match, test_questions, training_pictures
from .picture import picture_file
from .quantization_docs import SAVED, cells, demo_rows, fill_docs, full_size_rows, kv_rows
from .report import format_table, save_json
from .ttft import resolve_aside

UNQUANTIZED = ("float32", "bfloat16")  # beside what the model is stored in
CALIBRATED = {f"{name}, calibrated": name for name in ("int4", "int3", "int2")}  # where rounding alone costs something
CALIBRATION_PICTURES = 32  # of easy-VQA's training pictures, which are asked about nowhere here
FIDELITY_PICTURES = 25
FIDELITY_PROMPTS = (DEFAULT_PROMPT, "what color is the shape?")


def measure(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """See the top of this file."""
    known = [*UNQUANTIZED, *RECIPES] if args.full_size else [*UNQUANTIZED, *RECIPES, *CALIBRATED]
    recipes = args.recipes or known
    unknown = sorted(set(recipes) - set(known))
    if unknown:
        raise BenchmarkError(f"There is no recipe {unknown[0]}; choose of {', '.join(known)}.")
    if args.full_size is not None:
        return measure_full_size(args, recipes)
    if args.kv_bits:
        return measure_kv(args.kv_bits)
    return measure_demo(recipes, args.limit)


def measure_demo(names: Sequence[str], limit: int | None) -> tuple[str, dict[str, Any]]:
    """Fidelity and task accuracy of the demo model by recipe.

    Args:
        names: of RECIPES, UNQUANTIZED and CALIBRATED.
        limit: test pictures to ask about; None takes all.
    """
    asked = test_questions(limit)
    pictures = _fidelity_pictures(asked)
    reference = resolve_model(DEMO)
    models = []
    with tempfile.TemporaryDirectory(prefix="mlx-fastvlm-") as work:
        for name in (None, *names):
            start = time.perf_counter()
            folder = reference if name is None else make_candidate(reference, Path(work) / name, name)
            fidelity = measure_fidelity(reference, folder, pictures, FIDELITY_PROMPTS, speed_rounds=0)
            accuracy = exact_match(answers(*load(folder), asked))
            models.append(
                {
                    "recipe": name or "as embedded",
                    "parts": stored_parts(folder),
                    "bits_per_weight": bits_per_weight(folder),
                    "fidelity": fidelity.to_dict(),
                    "easy_vqa_test": accuracy,
                    "seconds": round(time.perf_counter() - start, 1),
                }
            )
            progress(f"{models[-1]['recipe']}: {accuracy['exact_match']:.2%} in {models[-1]['seconds']:.0f} s")
    result = {"model": DEMO, "test_pictures": len(asked), "models": models}
    return _table(demo_rows(result)), result


def measure_kv(all_bits: Sequence[int]) -> tuple[str, dict[str, Any]]:
    """Fidelity of the demo model to itself when it holds keys and values in fewer bits."""
    pictures = _fidelity_pictures(test_questions())
    models = []
    for bits in all_bits:
        fidelity = measure_fidelity(DEMO, DEMO, pictures, FIDELITY_PROMPTS, kv_bits=bits, speed_rounds=0)
        models.append({"kv_bits": bits, "fidelity": fidelity.to_dict()})
        progress(f"{bits} bits: KL {fidelity.next_token.kl_mean:.1e}")
    result = {"model": DEMO, "models": models}
    return _table(kv_rows(result)), result


def measure_full_size(args: argparse.Namespace, names: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Size, memory and speed by recipe of the model `args.full_size`."""
    progress(f"Preparing {args.full_size}.")
    reference = resolve_aside(args.full_size)
    with tempfile.TemporaryDirectory(prefix="mlx-fastvlm-", dir=args.work) as work, picture_file(args.image) as image:
        folders = {"as stored": reference}
        for name in names:
            progress(f"Making {name}.")
            folders[name] = make_candidate(reference, Path(work) / name, name)
        speeds = time_in_turns(
            folders,
            image.resolve(),
            DEFAULT_PROMPT,
            args.dtype,
            args.repeat,
            lambda _, done, total: progress(f"{done}/{total}"),
        )
        models = [
            {
                "recipe": name,
                "parts": stored_parts(folder),
                "bits_per_weight": bits_per_weight(folder),
                "weight_bytes": (folder / "model.safetensors").stat().st_size,
                **{
                    field: {"median": measured.median, "samples": list(measured.samples)}
                    for field, measured in vars(speeds[name]).items()
                },
            }
            for name, folder in folders.items()
        ]
    result = {
        "model": Path(args.full_size).name,
        "dtype": str(compute_dtype(stored_dtype(reference), args.dtype)).removeprefix("mlx.core."),
        "generation_tokens": SPEED_TOKENS,
        "models": models,
    }
    return _table(full_size_rows(result)), result


def make_candidate(reference: Path, destination: Path, name: str) -> Path:
    """The reference quantized by a recipe, or stored in another type."""
    if name in RECIPES:
        return quantize(reference, destination, name)
    if name in CALIBRATED:
        pictures = training_pictures(CALIBRATION_PICTURES)
        return quantize(reference, destination, CALIBRATED[name], images=pictures, prompts=FIDELITY_PROMPTS)
    return store_as(reference, destination, name)


def store_as(reference: Path, destination: Path, dtype: str) -> Path:
    """A copy of an unquantized model whose weights are stored in another type; its recorded checksums are not renewed."""
    shutil.copytree(reference, destination, ignore=shutil.ignore_patterns("*.safetensors"))
    weights = mx.load(str(reference / "model.safetensors"))
    mx.save_safetensors(
        str(destination / "model.safetensors"), {name: array.astype(DTYPES[dtype]) for name, array in weights.items()}
    )
    for name, key in (("config.json", "torch_dtype"), ("conversion.json", "dtype")):
        path = destination / name
        save_json(path, {**json.loads(path.read_text(encoding="utf-8")), key: dtype})
    return destination


def stored_parts(folder: Path) -> dict[str, str | None] | None:
    """Part of the model → how the folder's config.json says it is stored; None if nothing is quantized."""
    quantization = FastVLMConfig.from_folder(folder).quantization
    return quantization and spell_parts(quantization.parts)


def spell_parts(parts: Mapping[str, Storage | None]) -> dict[str, str | None]:
    """Part → its storage in words, None where it is left as it is."""
    return {part: storage and str(storage) for part, storage in parts.items()}


def bits_per_weight(folder: Path) -> float:
    """On average over all weights, with the scales of the quantized ones."""
    record = json.loads((folder / "conversion.json").read_text(encoding="utf-8"))
    if record.get("quantization"):
        return record["quantization"]["bits_per_weight"]
    return 8.0 * stored_dtype(folder).size


def stored_dtype(folder: Path) -> mx.Dtype:
    """The type of what is not quantized."""
    stored = SafetensorsFile(folder / "model.safetensors").dtype("language_model.norm.weight")
    return DTYPES[DTYPE_NAMES[stored]]


def write_docs(docs: Path | None, plot: Path | None) -> None:
    """Render what is saved in benchmarks/results/ under the current folder into the page and the picture.

    Raises:
        BenchmarkError: a result, the page or one of its marks is missing.
        OptionError: the picture cannot be drawn or written.
    """
    results = {}
    for name in SAVED:
        path = Path("benchmarks", "results", f"{name}.json")
        try:
            results[name] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise BenchmarkError(f"{path} cannot be read ({error}); measure first, with --save.") from None
    if docs is not None:
        if not docs.is_file():
            raise BenchmarkError(f"There is no file {docs}.")
        docs.write_text(fill_docs(docs.read_text(encoding="utf-8"), results), encoding="utf-8")
    if plot is not None:
        models = results["quantization"]["models"]
        shown = [model for model in models[1:] if model["recipe"] != "float32"]  # twice the size, and nothing gained
        plot_fidelity([Fidelity.from_dict(model["fidelity"]) for model in shown], plot)


def _fidelity_pictures(asked: Sequence[tuple[Path, Any]]) -> list[Path | np.ndarray]:
    """Some of the test pictures, and the generated ones, of which the model is less sure."""
    step = max(1, len(asked) // FIDELITY_PICTURES)
    pictures = [picture for picture, _ in asked[::step]][:FIDELITY_PICTURES]
    return [*pictures, *(draw(index) for index in range(NUM_GENERATED))]


def _table(rows: list[dict[str, str]]) -> str:
    return format_table(*cells(rows))


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser("quantization", __doc__)
    parser.add_argument("--recipes", metavar="NAME", nargs="+", help="which ones (all)")
    parser.add_argument("--limit", metavar="N", type=at_least_one, help="ask about the first N test pictures only")
    parser.add_argument("--kv-bits", metavar="N", type=int, nargs="+", help="instead: keys and values in N bits")
    parser.add_argument("--full-size", metavar="MODEL", help="measure this folder or hub id: size, memory, speed")
    add_picture(parser)
    parser.add_argument("--dtype", choices=DTYPES, help="--full-size: type to compute in (the runtime's choice)")
    parser.add_argument("--repeat", metavar="N", type=at_least_one, default=3, help="--full-size: rounds (3)")
    parser.add_argument("--work", metavar="FOLDER", type=Path, help="--full-size: where the quantized copies go")
    parser.add_argument("--docs", metavar="FILE", type=Path, help="measure nothing; renew the tables of this page")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="measure nothing; draw the saved result as a PNG")
    args = parser.parse_args(argv)
    if args.docs is None and args.plot is None:
        run("quantization", parser, measure, argv)
        return
    try:
        write_docs(args.docs, args.plot)
    except FastVLMError as error:
        sys.exit(f"quantization: {error}")


if __name__ == "__main__":
    main()
