"""conversion.json: where a converted model came from, what was done to it, and the checksums of its files."""

from __future__ import annotations

import hashlib
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_fastvlm.errors import CheckpointError
from mlx_fastvlm.json_file import read_json_object
from mlx_fastvlm.loading import OnProgress
from mlx_fastvlm.quantization import QuantizationConfig, part_of

from .reparameterize import AnySite, ConvBatchNormSite, ConvSite, ScaledLinearSite
from .tensors import Tensors
from .weights import WeightErrors, stored_specs
from .writer import stored_bytes

RECORD = "conversion.json"
_HUB = "hub:"
_ENTRIES = {
    "source": str,
    "license": str,
    "dtype": str,
    "folded": dict,
    "notices": list,
    "self_check": dict,
    "created": str,
    "converter": str,
}
# Files that may change after the conversion without touching the model.
UNCHECKED = (RECORD, "README.md", "fidelity.json")
_BLOCK = 2**22


def stamp() -> dict[str, str]:
    """What made a record, and when."""
    return {
        "converter": f"mlx-fastvlm {version('mlx-fastvlm')}",
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def read_record(folder: Path) -> dict[str, Any]:
    """A converted folder's conversion.json.

    Raises:
        CheckpointError: it is missing, damaged, or lacks what every release has written.
    """
    path = folder / RECORD
    if not path.exists():
        raise CheckpointError(f"{folder} has no {RECORD}, so it is not a model that mlx-fastvlm converted.")
    record = read_json_object(path, CheckpointError)
    wrong = [name for name, kind in _ENTRIES.items() if not isinstance(record.get(name), kind)]
    sums = record.get("sha256", {})
    if not isinstance(sums, dict) or any(Path(name).name != name for name in sums):
        wrong.append("sha256")
    if not wrong and not isinstance(record["self_check"].get("max_relative_error"), int | float):
        wrong.append("self_check")
    if wrong:
        raise CheckpointError(f"{path} is damaged (see {wrong[0]}); convert the model again.")
    return record


def relative_places(places: Mapping[str, Path | str], folder: Path) -> dict[str, str]:
    """Where a model came from, as seen from its folder: that holds wherever one stands.

    Args:
        places: role → absolute path or hub id, see `source.Source`.
        folder: the model's.

    Returns:
        Role → relative path, or "hub:" and the id.
    """
    home = folder.resolve()
    return {
        role: os.path.relpath(place, home) if isinstance(place, Path) else f"{_HUB}{place}"
        for role, place in places.items()
    }


def recorded_places(record: Mapping[str, Any], folder: Path) -> dict[str, Path | str]:
    """`relative_places` read back from a record: role → path, whether it is still there or not, or hub id."""
    origin = record.get("origin")
    if not isinstance(origin, dict):
        return {}
    home = folder.resolve()
    return {
        role: str(place).removeprefix(_HUB) if str(place).startswith(_HUB) else (home / str(place)).resolve()
        for role, place in origin.items()
    }


def model_files(folder: Path) -> list[str]:
    """Names of the files that make up the model."""
    return sorted(
        path.name
        for path in folder.iterdir()
        if path.is_file() and path.name not in UNCHECKED and not path.name.startswith(".")
    )


def checksums(folder: Path, names: Iterable[str], on_progress: OnProgress | None = None) -> dict[str, str]:
    """SHA-256 of the files of these names that are there."""
    paths = [folder / name for name in names if (folder / name).is_file()]
    total, done = sum(path.stat().st_size for path in paths), 0
    sums = {}
    for path in paths:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
                done += len(block)
                if on_progress:
                    on_progress("Checksums", done, total)
        sums[path.name] = digest.hexdigest()
    return sums


def folded_facts(found: list[AnySite], tensors: Tensors) -> dict[str, int]:
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
