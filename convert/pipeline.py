"""The conversion: check everything, fold, quantize if asked, write aside, rename."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mlx_fastvlm.config import vision_config_dict
from mlx_fastvlm.errors import OptionError
from mlx_fastvlm.hub import is_hub_id
from mlx_fastvlm.image_processing import ImageProcessor
from mlx_fastvlm.loading import DTYPES, FORMAT_KEY, FORMAT_VERSION, OnProgress, as_path
from mlx_fastvlm.quantization import QuantizationConfig
from mlx_fastvlm.safetensors_file import check_safetensors

from .aside import check_destination, check_room, write_json, written_aside
from .clip_head import write_clip_head
from .model_card import write_card
from .preflight import preflight
from .recipes import Recipe
from .record import (
    RECORD,
    checksums,
    folded_facts,
    left_out,
    model_files,
    quantized_facts,
    relative_places,
    stamp,
)
from .self_check import self_check
from .source import Source, opened
from .tokenizer import write_tokenizer
from .weights import site_blocks, write_weights

PREPROCESSOR = "preprocessor_config.json"
SMALL_FILES = 16 * 2**20  # bytes of disk for everything beside the weights: a tokenizer, mostly


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    revision: str | None = None,
    recipe: Recipe | None = None,
    base: str | os.PathLike[str] | None = None,
    vision_tower: str | os.PathLike[str] | None = None,
    force: bool = False,
    on_progress: OnProgress | None = None,
    source_name: str | None = None,
) -> Path:
    """Convert a FastVLM checkpoint into the folder that the runtime reads.

    Args:
        source: checkpoint folder or zip in any layout of convert/layouts, a LoRA adapter's folder, or a hub id.
        destination: folder to make; it appears only when it is complete.
        dtype: "float32", "float16" or "bfloat16" to store; None keeps the checkpoint's.
        revision: branch, tag or commit of a hub id (or the commit that a folder was downloaded at).
        recipe: how to quantize (see `recipes.choose`); None stores every weight in `dtype`.
        base: what an adapter was trained on, in place of the model that it names.
        vision_tower: a file or folder with a FastViTHD alone, in place of the checkpoint's.
        force: replace `destination` if it exists.
        on_progress: called with (what is being done, bytes done, bytes in all).
        source_name: what conversion.json calls the source in place of its own name, e.g. the hub id of a download.

    Returns:
        The destination.

    Raises:
        FastVLMError: a child of it says what is wrong; nothing is left behind.
    """
    destination = as_path(destination)
    check_dtype(dtype)
    check_destination(destination, force)
    with ExitStack() as stack:
        origin = {"revision": revision, "base": base, "vision_tower": vision_tower}
        found = stack.enter_context(opened(source, destination, **origin, on_progress=on_progress))
        conversion = preflight(found, dtype, recipe)
        check_room(destination.absolute().parent, conversion.stored_bytes() + SMALL_FILES)
        aside = stack.enter_context(written_aside(destination, force))
        check = self_check(conversion.sites, found.tensors)
        blocks = site_blocks(conversion.sites, found.tensors, on_progress)
        errors = write_weights(
            aside / "model.safetensors", conversion.shapes, blocks, DTYPES[conversion.dtype], conversion.quantization
        )
        if conversion.clip_head is not None:
            write_clip_head(aside, conversion.clip_head, DTYPES[conversion.dtype])
        write_tokenizer(found.folder, aside)
        config = conversion.config
        fit = "pad" if config.image_aspect_ratio == "pad" else "crop"
        write_json(aside / PREPROCESSOR, ImageProcessor(config.vision_config.image_size, fit=fit).to_dict())
        copy_notices(found.folder, aside)
        write_json(
            aside / "config.json",
            {
                **found.config,
                "tie_word_embeddings": config.text_config.tie_word_embeddings,
                "torch_dtype": conversion.dtype,
                "vision_config": vision_config_dict(config.vision_config),
                **quantization_entry(conversion.quantization),
                FORMAT_KEY: {"format": FORMAT_VERSION},
            },
        )
        of_hub = source_name is not None and is_hub_id(source_name)
        record = {
            "source": source_name or found.name,
            "base_model": source_name if of_hub else found.hub_id,
            "revision": found.revision,
            "origin": _origin(found, source_name, destination),
            "layout": found.layout,
            "license": found.license,
            "dtype": conversion.dtype,
            "folded": folded_facts(conversion.sites, found.tensors),
            "dropped": Counter(conversion.dropped.values()),
            "notices": [*found.notices, *conversion.notices, *left_out(conversion.quantization)],
            "self_check": asdict(check),
        }
        facts = quantized_facts(conversion.shapes, DTYPES[conversion.dtype], conversion.quantization, errors)
        finish(aside, destination.name, record, facts, on_progress)
    return destination


def _origin(found: Source, source_name: str | None, destination: Path) -> dict[str, str]:
    """Where verification finds the source again; nowhere, if the caller gave it a name of his own."""
    if source_name is None:
        return relative_places(found.places, destination)
    return relative_places(found.places | {"source": source_name}, destination) if is_hub_id(source_name) else {}


def check_dtype(dtype: str | None) -> None:
    """Raises OptionError if `dtype` names no type that weights are stored in."""
    if dtype is not None and dtype not in DTYPES:
        raise OptionError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}.")


def copy_notices(source: Path, destination: Path) -> None:
    """Carry over the license's text, its attributions, and the settings for generation."""
    for path in [*source.glob("LICENSE*"), *source.glob("ACKNOWLEDGEMENTS*"), source / "generation_config.json"]:
        if path.is_file():
            shutil.copyfile(path, destination / path.name)


def quantization_entry(quantization: QuantizationConfig | None) -> dict[str, Any]:
    """What config.json says of it: nothing, if nothing is quantized."""
    return {} if quantization is None else {"quantization": quantization.to_dict()}


def finish(
    aside: Path,
    name: str,
    record: dict[str, Any],
    quantization: dict[str, Any] | None,
    on_progress: OnProgress | None,
) -> None:
    """Check what was written and add conversion.json and the model card."""
    check_safetensors(aside / "model.safetensors")
    sums = checksums(aside, model_files(aside), on_progress)
    write_json(aside / RECORD, {**record, "quantization": quantization, **stamp(), "sha256": sums})
    write_card(aside, name)
