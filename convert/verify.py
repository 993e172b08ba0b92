"""Verifying a converted folder: its files are what was written, its numbers are sound, its folds are the source's."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_fastvlm.config import FastVLMConfig
from mlx_fastvlm.errors import CheckpointError, FastVLMError
from mlx_fastvlm.kernels import plain_ops
from mlx_fastvlm.loading import OnProgress, as_path, load_model
from mlx_fastvlm.quantization import Storage
from mlx_fastvlm.safetensors_file import SafetensorsFile

from .calibrate import calibrated_layers
from .clip_head import CLIP_HEAD, kept_clip_head, read_clip_head
from .key_map import sites
from .record import checksums, read_record, recorded_places
from .self_check import TOLERANCE, self_check
from .source import Source, opened
from .tensors import row_blocks
from .weights import PACKED_PARTS, SUFFIX, Packed, pack, parameter_shapes, site_blocks, storage_of, stored_specs, unpack

_PIXELS = 128  # side of the picture that both ways of computing are compared on
_UNIT = {mx.float32: 0.0, mx.float16: 2.0**-10, mx.bfloat16: 2.0**-7}  # spacing of numbers, over the number
_WORSE = 1.1  # how much more than here rounding on another device may move weights, root mean square
_FUSED_TOLERANCE = {mx.float32: 1e-4, mx.float16: 2e-2, mx.bfloat16: 1e-1}


@dataclass
class Verification:
    """What was checked.

    Attributes:
        checks: name → what was found, in words.
        problems: what is wrong; empty if the model is sound.
    """

    checks: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def verify(
    folder: str | os.PathLike[str],
    source: str | os.PathLike[str] | None = None,
    *,
    base: str | os.PathLike[str] | None = None,
    vision_tower: str | os.PathLike[str] | None = None,
    on_progress: OnProgress | None = None,
) -> Verification:
    """Check a converted model. The fast-path check loads it as answering does; the others read it by blocks.

    Args:
        folder: a converted folder.
        source: the checkpoint it was made from; each fold is then computed and checked again, and what is stored
            compared with it. None: what it was made from, if that is a local file that is still where it was.
        base, vision_tower: the same for what an adapter was merged into, and for the tower that was put in.
        on_progress: called with (what is being done, bytes done, bytes in all).

    Raises:
        CheckpointError, ConfigError: the folder is no converted model at all, or `source` cannot be read.
    """
    folder = as_path(folder)
    record = read_record(folder)
    config = FastVLMConfig.from_folder(folder)
    given = {"source": source, "base": base, "vision_tower": vision_tower}
    places = recorded_places(record, folder) | {role: place for role, place in given.items() if place is not None}
    found = Verification()
    _run(found, "checksums", lambda: _checksums(folder, record, on_progress))
    _run(found, "weights", lambda: _weights(folder, config, on_progress))
    if found.problems:
        found.checks["fast paths"] = found.checks["folds"] = "skipped"
        return found
    _run(found, "fast paths", lambda: _fast_paths(folder, config))
    absent = [role for role in given if given[role] is None and not _is_here(role, places)]
    if absent:
        options = ", ".join(f"--{role.replace('_', '-')}" for role in absent)
        found.checks["folds"] = f"not checked: what it was made from is not here; give it with {options}"
        return found
    origin = places.pop("source")
    with (
        tempfile.TemporaryDirectory(prefix="mlx-fastvlm-") as beside,
        opened(origin, Path(beside) / "unpacked", **places, on_progress=on_progress) as checkpoint,
    ):
        _run(found, "folds", lambda: _folds(folder, config, record, checkpoint, on_progress))
    return found


def _is_here(role: str, places: Mapping[str, Path | str]) -> bool:
    """Whether what a model was made from can be read without a network; roles that it does not have are no matter."""
    if role not in places:
        return role != "source"
    place = places[role]
    return isinstance(place, Path) and place.exists()


def _run(found: Verification, name: str, check: Callable[[], str]) -> None:
    try:
        found.checks[name] = check()
    except FastVLMError as error:
        found.checks[name] = "wrong"
        if str(error) not in found.problems:
            found.problems.append(str(error))


def _checksums(folder: Path, record: dict[str, Any], on_progress: OnProgress | None) -> str:
    """Hold the files against conversion.json; files of the user's own beside them are nobody's business."""
    stated = record.get("sha256")
    if not stated:
        return "none in conversion.json, which an older release wrote"
    sums = checksums(folder, stated, on_progress)
    wrong = [
        f"{name} is {'changed' if name in sums else 'missing'}" for name in stated if sums.get(name) != stated[name]
    ]
    if wrong:
        raise CheckpointError(f"Not as converted: {', '.join(wrong)}; convert the model again.")
    return f"{len(stated)} files as converted"


def _weights(folder: Path, config: FastVLMConfig, on_progress: OnProgress | None) -> str:
    """Every parameter is there in its shape, and every number is finite."""
    weights = SafetensorsFile(folder / "model.safetensors")
    specs = stored_specs(parameter_shapes(config), mx.float32, config.quantization)
    strange = sorted(set(weights.names()) ^ set(specs))
    if strange:
        raise CheckpointError(f"{weights.path} does not fit its config.json (see {strange[0]}).")
    total, done = sum(weights.nbytes(name) for name in weights.names()), 0
    for name, (shape, dtype) in specs.items():
        if weights.shape(name) != shape:
            raise CheckpointError(f"{name} has the shape {list(weights.shape(name))}; expected {list(shape)}.")
        if dtype == mx.float32:
            for start, rows in row_blocks(weights, name):
                if not mx.all(mx.isfinite(rows)).item():
                    raise CheckpointError(
                        f"{name} holds NaN or infinity, from row {start} on; convert the model again."
                    )
        done += weights.nbytes(name)
        if on_progress:
            on_progress("Weights", done, total)
    return f"{len(specs)} tensors, all finite"


def _fast_paths(folder: Path, config: FastVLMConfig) -> str:
    """What this machine's fast kernels make of a picture equals what plain operations make of it."""
    model = load_model(folder, config)
    pixels = mx.random.uniform(shape=(1, _PIXELS, _PIXELS, 3), key=mx.random.key(0))
    decoder = model.language_model

    def logits() -> mx.array:
        embeddings = mx.concatenate([model.encode_images(pixels), model.embed([1, 2, 3])], axis=1)
        return decoder.logits(decoder.hidden_states(embeddings, model.make_cache())).astype(mx.float32)

    fast = logits()
    with plain_ops():
        plain = logits()
    error = (mx.max(mx.abs(fast - plain)) / mx.max(mx.abs(plain))).item()
    if not error <= _FUSED_TOLERANCE[model.dtype]:  # not `>`, which NaN would pass
        raise CheckpointError(
            f"On this machine the fast kernels differ from plain operations by {error:.1e} (relative); "
            "set MLX_FASTVLM_KERNELS=reference and report it."
        )
    return f"equal plain operations to {error:.0e} on this machine" if error else "the same as plain operations here"


def _folds(
    folder: Path, config: FastVLMConfig, record: dict[str, Any], source: Source, on_progress: OnProgress | None
) -> str:
    """Fold the source again: the self-check holds, and what is stored is what folding (and rounding) gives."""
    weights = SafetensorsFile(folder / "model.safetensors")
    shapes = parameter_shapes(config)
    quantization = config.quantization
    calibration = (record.get("quantization") or {}).get("calibration_images")
    calibrated = set(calibrated_layers(config, quantization)) if calibration else set()
    model_sites = sites(config)
    norm = weights.rows("language_model.norm.weight", 0, 1)  # never quantized: it has the model's type
    check = self_check(model_sites, source.tensors)
    for name, start, rows in site_blocks(model_sites, source.tensors, on_progress, "Folds"):
        layer, storage = name.removesuffix(SUFFIX), storage_of(name, shapes[name], quantization)
        if storage is None:
            same = _is_rounded_from(weights.rows(name, start, start + len(rows)), rows)
        elif layer in calibrated:
            continue
        else:
            parts = PACKED_PARTS[: 2 + storage.has_biases]
            stored = tuple(weights.rows(f"{layer}.{part}", start, start + len(rows)) for part in parts)
            same = _is_packed_from(stored, rows, storage, norm.dtype)
        if not same:
            raise CheckpointError(f"{name} is not what {source.name} folds to.")
    kept, head = kept_clip_head(folder), read_clip_head(source.tensors, config.vision_config)
    if kept is not None and (head is None or not _is_rounded_from(kept[CLIP_HEAD].astype(norm.dtype), head)):
        raise CheckpointError(f"CLIP's head is not that of {source.name}.")
    said = (
        f"{check.sites} parts equal the source's to {check.max_relative_error:.0e}; "
        f"{len(shapes)} parameters are what they fold to"
    )
    return f"{said}, but for {len(calibrated)} calibrated ones, which were not compared" if calibrated else said


def _is_rounded_from(stored: mx.array, rows: mx.array) -> bool:
    """Whether stored numbers are float32 rows in a shorter type.

    To a unit in the last place, not bit by bit: another device may fold to another last bit of float32, which may then
    round the other way.
    """
    unit = _UNIT[stored.dtype]
    limit = unit * mx.abs(rows) + TOLERANCE * mx.max(mx.abs(rows))
    return mx.all(mx.abs(stored.astype(mx.float32) - rows) <= limit).item()


def _is_packed_from(stored: Packed, rows: mx.array, storage: Storage, dtype: mx.Dtype) -> bool:
    """Whether packed weights are rows rounded to nearest, as near to them as this device would bring them.

    Not bit by bit: devices round halves differently, and where a group's least and greatest weights are equally far
    from zero, the last bit decides from which of them its grid starts.
    """
    found, expected = unpack(stored, storage), unpack(pack(rows, storage, dtype), storage)
    largest = mx.max(mx.abs(rows), axis=-1, keepdims=True)
    if storage.mode == "affine":
        # Two steps, as a group's range is at most twice the largest, after the rounding to the model's type.
        level = largest * (2.0 ** (2 - storage.bits) + 2 * _UNIT[dtype])
    else:
        level = mx.maximum(mx.maximum(mx.abs(found), mx.abs(expected)) / 2, largest / 6)  # e2m1's are the widest
    noise = TOLERANCE * mx.max(largest)
    near = mx.all(mx.abs(found - expected) <= mx.maximum(level, noise)).item()
    moved, expected_move = (mx.sqrt(mx.mean(mx.square(values - rows))) for values in (found, expected))
    return near and (moved <= _WORSE * expected_move + noise).item()
