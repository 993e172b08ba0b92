"""A converted folder → a folder in another program's layout: LlavaQwen2 for PyTorch, or mlx-vlm's.

`unfold` says what the tensors are; this file reads, checks and writes. The decoder's numbers come back as they were
stored; the tower's come back folded (see `unfold`).
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_fastvlm.config import FastVLMConfig, VisionConfig, read_config_dict
from mlx_fastvlm.errors import CheckpointError, OptionError
from mlx_fastvlm.loading import DTYPES, FORMAT_KEY, OnProgress, as_path, is_converted
from mlx_fastvlm.safetensors_file import DTYPE_NAMES

from .archive import check_links
from .aside import check_apart, check_destination, check_room, read_notes, write_json, written_aside
from .checkpoint import Checkpoint
from .clip_head import CLIP_HEAD, kept_clip_head
from .licenses import NO_LICENSE
from .model_card import write_export_card
from .pipeline import PREPROCESSOR, check_dtype, copy_notices
from .record import model_files, stamp
from .tensors import Combined, Tensors, row_blocks
from .tokenizer import write_tokenizer
from .unfold import Exported, Shapes, Unfolded, hub_tensors, mlx_vlm_tensors
from .weights import parameter_shapes
from .writer import SafetensorsWriter, Spec, stored_bytes

RECORD = "export.json"  # where an export says what it is made of, and what its user should know
MAX_SHARD_BYTES = 5_000_000_000  # as transformers splits
_NO_CLIP_HEAD = "CLIP's projection head, which answers do not need, is not in the converted folder"


@dataclass(frozen=True)
class _Target:
    """What one layout wants.

    Args:
        tensors: config and shapes → what to store.
        file_format: safetensors' `format`, by which PyTorch's and MLX's files are told apart.
        without_clip_head: what the user should know where the source has none.
    """

    tensors: Callable[[FastVLMConfig, Shapes], list[Exported]]
    file_format: str
    without_clip_head: str


_TARGETS = {
    "hub": _Target(
        hub_tensors, "pt", f"{_NO_CLIP_HEAD}: head.proj is left out, and PyTorch says so when it loads the folder."
    ),
    "mlx-vlm": _Target(
        mlx_vlm_tensors, "mlx", f"{_NO_CLIP_HEAD}: mlx-vlm demands it without reading it, so head.proj is zeros."
    ),
}
LAYOUTS = tuple(_TARGETS)


def export(
    folder: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    layout: str,
    *,
    dtype: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    force: bool = False,
    with_clip_head: bool = True,
    on_progress: OnProgress | None = None,
) -> Path:
    """Write a converted folder in another program's layout.

    Args:
        folder: a converted folder, not quantized.
        destination: folder to make; it appears only when it is complete.
        layout: "hub" (LlavaQwen2 in inference form, what PyTorch loads) or "mlx-vlm" (what mlx_vlm.load loads).
        dtype: "float32", "float16" or "bfloat16" to store; None keeps the folder's.
        max_shard_bytes: larger weights are split into files of at most this size, but never within a tensor.
        force: replace `destination` if it exists.
        with_clip_head: whether CLIP's head goes along, where `folder` has it.
        on_progress: called with (what is being done, bytes done, bytes in all).

    Returns:
        The destination. Its export.json has what the user should know, under "notices".

    Raises:
        FastVLMError: a child of it says what is wrong; nothing is left behind.
    """
    folder, destination = as_path(folder), as_path(destination)
    if layout not in LAYOUTS:
        raise OptionError(f"The layout is {layout!r}; expected one of {', '.join(LAYOUTS)}.")
    check_dtype(dtype)
    check_destination(destination, force)
    check_apart(folder, destination)
    raw_config = _converted_config(folder)
    check_links(folder)
    config = FastVLMConfig.from_dict(raw_config)
    if layout == "mlx-vlm":
        _refuse_other_towers(config.vision_config)
    stored, shapes = _read(folder, config, with_clip_head)
    target = _TARGETS[layout]
    exported = target.tensors(config, shapes)
    view = Unfolded(stored, exported)
    dtype = dtype or DTYPE_NAMES[stored.dtype("language_model.norm.weight")]
    specs = {name: (view.shape(name), _stored_type(view, name, dtype)) for name in view.names()}
    check_room(destination.absolute().parent, stored_bytes(specs))

    with written_aside(destination, force) as aside:
        _write_weights(aside, view, specs, max_shard_bytes, target.file_format, on_progress)
        _write_tokenizer(folder, aside)
        copy_notices(folder, aside)
        if (folder / PREPROCESSOR).is_file():
            shutil.copyfile(folder / PREPROCESSOR, aside / PREPROCESSOR)
        write_json(aside / "config.json", _config_for(layout, raw_config, config, dtype))
        has_clip_head = any(tensor.parameter == CLIP_HEAD for tensor in exported)
        notices = [] if has_clip_head else [target.without_clip_head]
        record = _record(folder, layout, dtype, notices)
        write_json(aside / RECORD, {**record, "files": model_files(aside)})
        write_export_card(aside, destination.name, record)
    return destination


def _converted_config(folder: Path) -> dict[str, Any]:
    """config.json of a converted folder that can be taken apart."""
    if not folder.is_dir() or not is_converted(folder):
        raise CheckpointError(f"{folder} is not a converted model; convert the checkpoint first, then export it.")
    raw_config = read_config_dict(folder)
    if "quantization" in raw_config:
        raise CheckpointError(
            f"{folder} is quantized, and other layouts hold unquantized weights; export the model it was quantized from."
        )
    return raw_config


def _is_fastvithd(config: VisionConfig) -> bool:
    """Whether this is the released models' tower, at any resolution."""
    return replace(config, image_size=VisionConfig.image_size) == VisionConfig()


def _refuse_other_towers(config: VisionConfig) -> None:
    if not _is_fastvithd(config):
        raise OptionError(
            f"mlx-vlm knows one vision tower, FastViTHD with embed_dims {list(VisionConfig().embed_dims)}; this model's "
            f"has {list(config.embed_dims)} and layers {list(config.layers)}. Export it with the layout hub."
        )


def _read(folder: Path, config: FastVLMConfig, with_clip_head: bool) -> tuple[Tensors, dict[str, tuple[int, ...]]]:
    """The folder's tensors, checked against its config.json, and CLIP's head if there is one and it is wanted."""
    stored: Tensors = Checkpoint(folder)
    shapes = parameter_shapes(config)
    found = {name: stored.shape(name) for name in stored.names()}
    strange = sorted(name for name in {*found, *shapes} if found.get(name) != shapes.get(name))
    if strange:
        raise CheckpointError(
            f"{folder} does not fit its config.json ({strange[0]}: {found.get(strange[0])} is stored, "
            f"{shapes.get(strange[0])} expected); convert the model again."
        )
    head = kept_clip_head(folder) if with_clip_head else None
    if head is None:
        return stored, shapes
    return Combined(stored, head), {**shapes, CLIP_HEAD: head.shape(CLIP_HEAD)}


def _stored_type(view: Tensors, name: str, dtype: str) -> mx.Dtype:
    return mx.int64 if view.dtype(name) == "I64" else DTYPES[dtype]


def _write_weights(
    folder: Path,
    view: Tensors,
    specs: dict[str, Spec],
    max_shard_bytes: int,
    file_format: str,
    on_progress: OnProgress | None,
) -> None:
    """model.safetensors, or shards and the index that PyTorch looks for."""
    shards = _split(specs, max_shard_bytes)
    total, done = stored_bytes(specs), 0
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        with SafetensorsWriter(folder / file_name, shard, {"format": file_format}) as writer:
            for name in shard:
                for start, rows in row_blocks(view, name):
                    writer.write(name, rows, start)
                weight_map[name] = file_name
                done += stored_bytes({name: shard[name]})
                if on_progress:
                    on_progress("Exporting", done, total)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)


def _split(specs: dict[str, Spec], max_bytes: int) -> list[dict[str, Spec]]:
    """The tensors in order, a new file where the next would make one too large."""
    shards: list[dict[str, Spec]] = [{}]
    size = 0
    for name, (shape, dtype) in specs.items():
        added = math.prod(shape) * dtype.size
        if shards[-1] and size + added > max_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = (shape, dtype)
        size += added
    return shards


def _write_tokenizer(folder: Path, destination: Path) -> None:
    """The folder's tokenizer files, and Qwen2's vocab.json and merges.txt, which Apple's code reads (use_fast=False)."""
    write_tokenizer(folder, destination)
    tokenizer = json.loads((destination / "tokenizer.json").read_text(encoding="utf-8"))
    model = tokenizer["model"]
    vocabulary = json.dumps(model["vocab"], ensure_ascii=False)
    (destination / "vocab.json").write_text(vocabulary + "\n", encoding="utf-8")
    # tokenizers before 0.20 wrote a merge as one string with a space, later ones as a pair.
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (destination / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    if not (destination / "added_tokens.json").exists():
        write_json(destination / "added_tokens.json", {t["content"]: t["id"] for t in tokenizer["added_tokens"]})


def _config_for(layout: str, raw_config: dict[str, Any], config: FastVLMConfig, dtype: str) -> dict[str, Any]:
    """config.json in LlavaQwen2's words: what conversion added is taken out again."""
    left_out = {FORMAT_KEY}
    tower = config.vision_config
    if _is_fastvithd(tower) and raw_config["mm_vision_tower"].endswith(f"_{tower.image_size}"):
        left_out.add("vision_config")  # mm_vision_tower says it all
    if layout == "mlx-vlm":
        left_out.add("auto_map")  # names PyTorch code
    return {**{key: value for key, value in raw_config.items() if key not in left_out}, "torch_dtype": dtype}


def _record(folder: Path, layout: str, dtype: str, notices: list[str]) -> dict[str, Any]:
    """export.json: where the weights come from, carried on from conversion.json."""
    conversion = read_notes(folder) or {}  # a note about the weights, not a part of them
    return {
        "source": conversion.get("source", folder.name),
        "base_model": conversion.get("base_model"),
        "revision": conversion.get("revision"),
        "license": conversion.get("license", NO_LICENSE),
        "layout": layout,
        "dtype": dtype,
        "notices": [*conversion.get("notices", []), *notices],
        **stamp(),
    }
