"""Quantizing a model that is converted already, with calibration on pictures if asked."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import mlx.core as mx

from mlx_fastvlm.clip_head import FILE_NAME as CLIP_HEAD_FILE
from mlx_fastvlm.config import FastVLMConfig, read_config_dict
from mlx_fastvlm.errors import OptionError
from mlx_fastvlm.loading import DTYPES, OnProgress, as_path, is_converted, load_model
from mlx_fastvlm.processor import Processor
from mlx_fastvlm.safetensors_file import DTYPE_NAMES, SafetensorsFile

from .archive import check_links
from .aside import check_apart, check_destination, check_room, write_json, written_aside
from .calibrate import PROMPTS, calibrate, calibrated_layers
from .pipeline import PREPROCESSOR, SMALL_FILES, copy_notices, finish, quantization_entry
from .recipes import RECIPES, Recipe, choose, plan
from .record import left_out, quantized_facts, read_record, recorded_places, relative_places
from .tensors import row_blocks
from .tokenizer import NOTES as TOKENIZER_NOTES
from .weights import Block, parameter_shapes, stored_specs, write_weights
from .writer import stored_bytes

__all__ = ["RECIPES", "Recipe", "choose", "quantize"]

_KEPT = ("tokenizer.json", PREPROCESSOR, CLIP_HEAD_FILE, *TOKENIZER_NOTES)


def quantize(
    folder: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    recipe: str | Recipe,
    *,
    images: Sequence[Path] = (),
    prompts: Sequence[str] = PROMPTS,
    force: bool = False,
    on_progress: OnProgress | None = None,
) -> Path:
    """Quantize a converted model.

    Args:
        folder: a converted, unquantized model.
        destination: folder to make; it appears only when it is complete.
        recipe: a name of RECIPES, or a Recipe of one's own (see `choose`).
        images: pictures to calibrate the decoder on (GPTQ); the whole model is then held in memory. None: every weight
            is rounded to nearest, in bounded memory.
        prompts: questions to calibrate on, each asked about every picture.
        force: replace `destination` if it exists.
        on_progress: called with (what is being done, how much is done, how much there is).

    Returns:
        The destination.

    Raises:
        OptionError: the model is quantized already, or the recipe does not suit it.
        FastVLMError: another child says what is wrong; nothing is left behind.
    """
    folder, destination = as_path(folder), as_path(destination)
    recipe = choose(recipe) if isinstance(recipe, str) else recipe
    check_destination(destination, force)
    raw_config = read_config_dict(folder)
    if not is_converted(folder):
        raise OptionError(f"{folder} is not converted yet; use: mlx-fastvlm convert --quantize {recipe.name}")
    config = FastVLMConfig.from_dict(raw_config)
    if config.quantization is not None:
        raise OptionError(
            f"{folder} is quantized already, by recipe {config.quantization.recipe}; give the model it was made from."
        )
    check_apart(folder, destination)
    record = read_record(folder)
    check_links(folder)
    weights = SafetensorsFile(folder / "model.safetensors")
    dtype = DTYPES[DTYPE_NAMES[weights.dtype("language_model.norm.weight")]]
    shapes = parameter_shapes(config)
    quantization = plan(config, recipe)
    if images and not any(calibrated_layers(config, quantization)):
        raise OptionError(
            f"Pictures calibrate the decoder's layers in affine modes; recipe {recipe.name} has none, so leave them out."
        )
    with ExitStack() as stack:
        needed = stored_bytes(stored_specs(shapes, dtype, quantization))
        check_room(destination.absolute().parent, needed + SMALL_FILES)
        aside = stack.enter_context(written_aside(destination, force))
        calibrated = {}
        if images:
            model, processor = load_model(folder, config, "float32"), Processor.from_folder(folder, config)
            calibrated = calibrate(model, processor, images, quantization, dtype, prompts, on_progress)
            del model
        blocks = _blocks(weights, on_progress)
        errors = write_weights(aside / "model.safetensors", shapes, blocks, dtype, quantization, calibrated)
        for path in folder.iterdir():
            if path.is_file() and path.name in _KEPT:
                shutil.copyfile(path, aside / path.name)
        copy_notices(folder, aside)
        write_json(aside / "config.json", {**raw_config, **quantization_entry(quantization)})
        facts = quantized_facts(shapes, dtype, quantization, errors, len(images))
        kept = {key: record[key] for key in record if key not in ("sha256", "created", "converter", "quantization")}
        kept["origin"] = relative_places(recorded_places(record, folder), destination)
        kept["notices"] = [*record["notices"], *left_out(quantization)]
        finish(aside, destination.name, kept, facts, on_progress)
    return destination


def _blocks(weights: SafetensorsFile, on_progress: OnProgress | None) -> Iterator[Block]:
    """Every parameter of a converted file, by blocks of rows."""
    total, done = sum(weights.nbytes(name) for name in weights.names()), 0
    for name in weights.names():
        for start, rows in row_blocks(weights, name):
            yield name, start, rows.astype(mx.float32)
        done += weights.nbytes(name)
        if on_progress:
            on_progress("Quantizing", done, total)
