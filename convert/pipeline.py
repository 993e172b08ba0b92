"""The conversion: check everything, fold, quantize if asked, write aside, rename."""

from __future__ import annotations

import math
import os
import shutil
from collections import Counter
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_fastvlm.config import FastVLMConfig, vision_config_dict
from mlx_fastvlm.errors import CheckpointError, OptionError
from mlx_fastvlm.hub import is_hub_id
from mlx_fastvlm.image_processing import ImageProcessor
from mlx_fastvlm.loading import DTYPES, FORMAT_KEY, FORMAT_VERSION, OnProgress, as_path
from mlx_fastvlm.quantization import QuantizationConfig, part_of
from mlx_fastvlm.safetensors_file import DTYPE_NAMES, check_safetensors

from .aside import check_destination, check_room, write_json, written_aside
from .key_map import check_names, sites
from .model_card import write_card
from .recipes import Recipe, plan
from .record import RECORD, checksums, local_origin, model_files, stamp, stated_license
from .reparameterize import AnySite, ConvBatchNormSite, ConvSite, ScaledLinearSite, StackSite
from .self_check import self_check
from .source import Source, opened
from .tensors import Tensors, same_tensor
from .tokenizer import write_tokenizer
from .weights import WeightErrors, parameter_shapes, site_blocks, stored_specs, write_weights
from .writer import stored_bytes

_EMBEDDINGS, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
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
        conversion = _checked(found, dtype, recipe)
        check_room(destination.absolute().parent, conversion.stored_bytes() + SMALL_FILES)
        aside = stack.enter_context(written_aside(destination, force))
        check = self_check(conversion.sites, found.tensors)
        blocks = site_blocks(conversion.sites, found.tensors, on_progress)
        errors = write_weights(
            aside / "model.safetensors", conversion.shapes, blocks, DTYPES[conversion.dtype], conversion.quantization
        )
        write_tokenizer(found.folder, aside)
        config = conversion.config
        fit = "pad" if config.image_aspect_ratio == "pad" else "crop"
        write_json(
            aside / "preprocessor_config.json", ImageProcessor(config.vision_config.image_size, fit=fit).to_dict()
        )
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
        record = {
            "source": source_name or found.name,
            "base_model": source_name if source_name and is_hub_id(source_name) else found.hub_id,
            "revision": found.revision,
            "origin": None if source_name else local_origin(found.places, destination),
            "layout": found.layout,
            "license": stated_license(found.folder),
            "dtype": conversion.dtype,
            "folded": _folded(conversion.sites, found.tensors),
            "dropped": Counter(conversion.dropped.values()),
            "notices": [*found.notices, *conversion.notices, *left_out(conversion.quantization)],
            "self_check": asdict(check),
        }
        finish(aside, destination.name, record, conversion.quantized_facts(errors), on_progress)
    return destination


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


def left_out(quantization: QuantizationConfig | None) -> list[str]:
    """A notice on the layers that keep their type although their part is quantized."""
    if quantization is None:
        return []
    counts = Counter(
        part_of(path)
        for path, storage in quantization.layers.items()
        if storage is None and quantization.parts[part_of(path)]
    )
    return [
        f"{count} {'layer' if count == 1 else 'layers'} of {part} could not be quantized in groups of "
        f"{quantization.parts[part].group_size}, which do not divide the rows."
        for part, count in counts.items()
    ]


def quantized_facts(
    shapes: dict[str, tuple[int, ...]],
    dtype: mx.Dtype,
    quantization: QuantizationConfig | None,
    errors: WeightErrors,
    calibration_images: int = 0,
) -> dict[str, Any] | None:
    """What conversion.json says of the quantization, or None if there is none."""
    if quantization is None:
        return None
    weights = sum(math.prod(shape) for shape in shapes.values())
    return {
        "recipe": quantization.recipe,
        "bits_per_weight": round(8 * stored_bytes(stored_specs(shapes, dtype, quantization)) / weights, 3),
        "relative_weight_error": {part: float(f"{error:.3g}") for part, error in errors.relative().items()},
        "calibration_images": calibration_images,
    }


def finish(
    aside: Path,
    name: str,
    record: dict[str, Any],
    quantization: dict[str, Any] | None,
    on_progress: OnProgress | None,
) -> None:
    """Check what was written and add conversion.json and the model card."""
    check_safetensors(aside / "model.safetensors")
    total, done = sum((aside / name).stat().st_size for name in model_files(aside)), 0

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        if on_progress:
            on_progress("Checksums", done, total)

    sums = checksums(aside, model_files(aside), on_bytes)
    write_json(aside / RECORD, {**record, "quantization": quantization, **stamp(), "sha256": sums})
    write_card(aside, name)


@dataclass(frozen=True)
class _Conversion:
    """What is going to be written, all of it checked.

    Attributes:
        config: the model's, its head tied as the weights say.
        dtype: to store.
        sites: all of them.
        shapes: runtime parameter → shape.
        quantization: which layers to quantize.
        dropped: stored tensor → why it is not needed.
        notices: what the user should know.
    """

    config: FastVLMConfig
    dtype: str
    sites: list[AnySite]
    shapes: dict[str, tuple[int, ...]]
    quantization: QuantizationConfig | None
    dropped: dict[str, str]
    notices: list[str]

    def stored_bytes(self) -> int:
        return stored_bytes(stored_specs(self.shapes, DTYPES[self.dtype], self.quantization))

    def quantized_facts(self, errors: WeightErrors) -> dict[str, Any] | None:
        return quantized_facts(self.shapes, DTYPES[self.dtype], self.quantization, errors)


def _checked(source: Source, dtype: str | None, recipe: Recipe | None) -> _Conversion:
    """Hold names and shapes of the source against its config. Raises CheckpointError, ConfigError, OptionError."""
    tensors = source.tensors
    config, notices = _settle_head(FastVLMConfig.from_dict(source.config), tensors)
    found = sites(config)
    tied = _tied_head(config, tensors)
    dropped = check_names(found, set(tensors.names()) - tied, tensors)
    dropped |= dict.fromkeys(tied, "equal to the embeddings, to which it is tied")
    shapes = parameter_shapes(config)
    names = [name for site in found for name in _targets(site)]
    assert set(names) == set(shapes), f"sites and model disagree: {sorted(set(names) ^ set(shapes))[:6]}"
    _check_shapes(found, tensors, shapes)
    return _Conversion(
        config=config,
        dtype=dtype or DTYPE_NAMES.get(tensors.dtype(_EMBEDDINGS), "float32"),
        sites=found,
        shapes={name: shapes[name] for name in names},
        quantization=None if recipe is None else plan(config, recipe),
        dropped=dropped,
        notices=notices,
    )


def _settle_head(config: FastVLMConfig, tensors: Tensors) -> tuple[FastVLMConfig, list[str]]:
    """Whether the head is tied, by what is stored: some configs of FastVLM say the opposite of their weights."""
    says_tied, is_stored = config.text_config.tie_word_embeddings, _HEAD in tensors
    if says_tied and is_stored and _EMBEDDINGS in tensors and not same_tensor(tensors, _EMBEDDINGS, _HEAD):
        notice = "config.json says tie_word_embeddings, but lm_head differs from the embeddings: it is kept."
    elif not says_tied and not is_stored:
        notice = "config.json says that embeddings and head are not tied, but no lm_head is stored: they are tied."
    else:
        return config, []
    return replace(config, text_config=replace(config.text_config, tie_word_embeddings=not says_tied)), [notice]


def _tied_head(config: FastVLMConfig, tensors: Tensors) -> set[str]:
    """The stored head, if it is tied and so not needed (`_settle_head` has made sure that it is equal)."""
    return {_HEAD} if config.text_config.tie_word_embeddings and _HEAD in tensors else set()


def _targets(site: AnySite) -> list[str]:
    return [site.target] if isinstance(site, StackSite) else [f"{site.target}.weight", f"{site.target}.bias"]


class _Outline:
    """A checkpoint's shapes without its numbers: MLX infers what a fold would give without computing it."""

    def __init__(self, tensors: Tensors):
        self._tensors = tensors

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __getitem__(self, name: str) -> mx.array:
        return mx.zeros(self._tensors.shape(name))


def _check_shapes(found: list[AnySite], tensors: Tensors, shapes: dict[str, tuple[int, ...]]) -> None:
    """Hold the stored shapes against the config's; the error names the tensors."""
    outline = _Outline(tensors)
    for site in found:
        try:
            wrong = [name for name, array in site.fold(outline).items() if tuple(array.shape) != shapes[name]]
        except ValueError:  # the stored shapes do not even fit each other
            wrong = _targets(site)
        if wrong:
            stored = ", ".join(f"{name} {list(tensors.shape(name))}" for name in site.sources(tensors))
            raise CheckpointError(
                f"Stored shapes do not fit config.json: {stored} should make {wrong[0]} {list(shapes[wrong[0]])}."
            )


def _folded(found: list[AnySite], tensors: Tensors) -> dict[str, int]:
    """What was folded, counted by kind."""
    convs = [site for site in found if isinstance(site, ConvSite) and site.is_training_form(tensors)]
    return {
        "batch_norms": sum(1 for site in convs for name in site.sources(tensors) if name.endswith("running_mean")),
        "multi_branch_blocks": sum(not isinstance(site, ConvBatchNormSite) for site in convs),
        "layer_scales": sum(
            name.rpartition(".")[2].startswith("layer_scale") for site in found for name in site.sources(tensors)
        ),
        "convolutions_to_linear": sum(
            (isinstance(site, ConvSite) and site.as_linear)
            or (isinstance(site, ScaledLinearSite) and len(tensors.shape(f"{site.source}.weight")) == 4)
            for site in found
        ),
    }
