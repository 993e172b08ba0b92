"""The same weights for everyone: copies of one checkpoint in one type, each in the form its reader takes.

What each reads:
  ours      the converted folder, stored in that type (folding happens in float32)
  mlx-vlm   the hub folder. It computes in the stored type, so a checkpoint in another type is copied in that one.
            Apple's files are enough otherwise: `image_token_index` and the image processor have the right defaults,
            but for towers of another input size than 1024, which only a preprocessor_config.json can tell it.
  PyTorch   the hub folder as it is; the weights are cast while they are read
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx

from mlx_fastvlm.config import FastVLMConfig
from mlx_fastvlm.convert import convert
from mlx_fastvlm.convert.export import export
from mlx_fastvlm.convert.unfold import CLIP_HEAD, CLIP_HEAD_WIDTH
from mlx_fastvlm.loading import DTYPES

from .command import BenchmarkError

TOWER_SIZES = "mlx_fastvlm_tower_sizes"
_MLX_VLM_IMAGE_SIZE = 1024
_ONE_FILE = 2**50  # bytes: no export is larger


@contextmanager
def work_folder(given: Path | None) -> Iterator[Path]:
    """Where the copies go: a folder that is kept, or one that is deleted at the end."""
    if given is not None:
        if not given.is_dir():
            raise BenchmarkError(f"{given} is not a folder; make it first.")
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="mlx-fastvlm-") as folder:
        yield Path(folder)


def make_ours(checkpoint: Path, folder: Path, dtype: str) -> Path:
    """Convert into `folder`, stored as `dtype`, unless an earlier run has."""
    return folder if folder.exists() else convert(checkpoint, folder, dtype=dtype)


def make_mlx_vlm(checkpoint: Path, folder: Path, dtype: str) -> Path:
    """Copy a hub folder into `folder`, in `dtype`, as mlx-vlm needs it, unless an earlier run has."""
    if folder.exists():
        return folder
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        for path in checkpoint.iterdir():
            if path.suffix == ".safetensors":
                _copy_as(DTYPES[dtype], path, aside / path.name)
            elif path.is_file():
                shutil.copyfile(path, aside / path.name)
        image_size = FastVLMConfig.from_folder(checkpoint).vision_config.image_size
        if image_size != _MLX_VLM_IMAGE_SIZE and not (aside / "preprocessor_config.json").exists():
            sizes = {"size": {"shortest_edge": image_size}, "crop_size": {"height": image_size, "width": image_size}}
            (aside / "preprocessor_config.json").write_text(json.dumps(sizes))
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def _copy_as(dtype: mx.Dtype, source: Path, destination: Path) -> None:
    weights = mx.load(str(source))
    if all(not mx.issubdtype(array.dtype, mx.floating) or array.dtype == dtype for array in weights.values()):
        destination.symlink_to(source.resolve())
        return
    for name in list(weights):
        if mx.issubdtype(weights[name].dtype, mx.floating):
            weights[name] = weights[name].astype(dtype)
    mx.save_safetensors(str(destination), weights, {"format": "pt"})


def export_to_mlx_vlm(model: Path, folder: Path, dtype: str) -> Path:
    """Write a converted model into `folder`, in `dtype`, as mlx-vlm reads it, unless an earlier run has.

    The sizes of mlx-vlm's tower are constants of its code. Another tower's, the demo's, stand under TOWER_SIZES in
    config.json, where `runners.load_mlx_vlm` finds them.
    """
    if folder.exists():
        return folder
    tower = FastVLMConfig.from_folder(model).vision_config
    aside = folder.with_name(f".{folder.name}.partial")
    export(model, aside, "hub", dtype=dtype, max_shard_bytes=_ONE_FILE, with_clip_head=False, force=True)
    head = mx.zeros((tower.hidden_size, CLIP_HEAD_WIDTH), DTYPES[dtype])  # mlx-vlm demands it and never reads it
    mx.save_safetensors(str(aside / "clip-head.safetensors"), {CLIP_HEAD: head}, {"format": "pt"})
    config = json.loads((aside / "config.json").read_text())
    config.pop("vision_config", None)
    config[TOWER_SIZES] = {"embed_dims": tower.embed_dims, "layers": tower.layers}
    (aside / "config.json").write_text(json.dumps(config))
    return aside.rename(folder)
