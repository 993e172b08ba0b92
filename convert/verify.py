"""Verifying a converted folder: its files are what was written, its numbers are sound, its folds are the source's."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_fastvlm.config import FastVLMConfig
from mlx_fastvlm.errors import CheckpointError, FastVLMError
from mlx_fastvlm.kernels import plain_ops
from mlx_fastvlm.loading import OnProgress, as_path, load_model
from mlx_fastvlm.safetensors_file import SafetensorsFile

from .key_map import sites
from .record import checksums, read_record
from .self_check import TOLERANCE, self_check
from .source import opened
from .tensors import row_blocks
from .weights import parameter_shapes, site_blocks, storage_of, stored_specs

_PIXELS = 128  # side of the picture that both ways of computing are compared on
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
    on_progress: OnProgress | None = None,
) -> Verification:
    """Check a converted model.

    Args:
        folder: a converted folder.
        source: the checkpoint it was made from; each fold is then computed and checked again, and every unquantized
            weight compared. None: the source that conversion.json names, if it is a folder on this machine.
        on_progress: called with (what is being done, bytes done, bytes in all).

    Raises:
        CheckpointError, ConfigError: the folder is no converted model at all, or the source cannot be read.
    """
    folder = as_path(folder)
    record = read_record(folder)
    config = FastVLMConfig.from_folder(folder)
    found = Verification()
    _run(found, "checksums", lambda: _checksums(folder, record, on_progress))
    _run(found, "weights", lambda: _weights(folder, config, on_progress))
    if not found.problems:
        _run(found, "fast paths", lambda: _fast_paths(folder, config))
    if source is None and record.get("layout") and Path(str(record["source"])).is_dir():
        source = record["source"]
    if source is None:
        found.checks["folds"] = "not checked again: give the checkpoint it was made from with --source"
    else:
        _run(found, "folds", lambda: _folds(folder, config, source, on_progress))
    return found


def _run(found: Verification, name: str, check: Callable[[], str]) -> None:
    try:
        found.checks[name] = check()
    except FastVLMError as error:
        found.checks[name] = "wrong"
        found.problems.append(str(error))


def _checksums(folder: Path, record: dict[str, Any], on_progress: OnProgress | None) -> str:
    """Hold the files against conversion.json."""
    stated = record.get("sha256")
    if not stated:
        return "none in conversion.json, which an older release wrote"
    present = [path for path in folder.iterdir() if path.name in stated]
    total, done = sum(path.stat().st_size for path in present), 0

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        if on_progress:
            on_progress("Checksums", done, total)

    sums = checksums(folder, on_bytes)
    wrong = [
        f"{name} is {'changed' if name in sums else 'missing'}" for name in stated if sums.get(name) != stated[name]
    ]
    wrong += [f"{name} is new" for name in sums if name not in stated]
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

    def logits() -> mx.array:
        ids = [1, 2, 3]
        return model.language_model.logits(
            model.language_model.hidden_states(
                mx.concatenate([model.encode_images(pixels), model.embed(ids)], axis=1), model.make_cache()
            )
        )

    fast = logits().astype(mx.float32)
    with plain_ops():
        plain = logits().astype(mx.float32)
    error = (mx.max(mx.abs(fast - plain)) / mx.max(mx.abs(plain))).item()
    if not error <= _FUSED_TOLERANCE[model.dtype]:  # not `>`, which NaN would pass
        raise CheckpointError(
            f"On this machine the fast kernels differ from plain operations by {error:.1e} (relative); "
            "set MLX_FASTVLM_KERNELS=reference and report it."
        )
    return f"equal plain operations to {error:.0e} on this machine"


def _folds(folder: Path, config: FastVLMConfig, source: str | os.PathLike[str], on_progress: OnProgress | None) -> str:
    """Fold the source again: the self-check holds, and what is stored is what folding gives."""
    weights = SafetensorsFile(folder / "model.safetensors")
    shapes = parameter_shapes(config)
    with opened(source, folder / "none") as found:
        model_sites = sites(config)
        check = self_check(model_sites, found.tensors)
        worst = 0.0
        for name, start, rows in site_blocks(model_sites, found.tensors, on_progress):
            if storage_of(name, shapes[name], config.quantization) is not None:
                continue
            stored = weights.rows(name, start, start + len(rows))
            expected = rows.astype(stored.dtype).astype(mx.float32)
            difference = mx.max(mx.abs(stored.astype(mx.float32) - expected)).item()
            worst = max(worst, difference / max(mx.max(mx.abs(expected)).item(), 1e-30))
            if not worst <= TOLERANCE:
                raise CheckpointError(f"{name} is not what {source} folds to (off by {worst:.1e}, relative).")
    return f"{check.sites} parts equal the source's to {check.max_relative_error:.0e}, stored weights are what they fold to"
