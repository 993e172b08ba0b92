"""Any checkpoint → another program's layout, by way of ours."""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path

from mlx_fastvlm.config import read_config_dict
from mlx_fastvlm.errors import OptionError
from mlx_fastvlm.loading import FORMAT_KEY, OnProgress, as_path

from .aside import check_destination
from .export import export
from .pipeline import convert
from .source import opened


def convert_to(
    layout: str,
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    revision: str | None = None,
    base: str | os.PathLike[str] | None = None,
    vision_tower: str | os.PathLike[str] | None = None,
    force: bool = False,
    on_progress: OnProgress | None = None,
) -> Path:
    """Write a checkpoint as "hub" (LlavaQwen2) or "mlx-vlm".

    Args:
        layout: one of `export.LAYOUTS`.
        source: a folder that mlx-fastvlm converted, or anything that `convert` takes; that is converted aside first.
        destination: folder to make; it appears only when it is complete.
        dtype, revision, base, vision_tower, force, on_progress: as `convert` takes them.

    Raises:
        FastVLMError: a child says what is wrong; nothing is left behind.
    """
    path, destination = as_path(source), as_path(destination)
    if (path / "config.json").is_file() and FORMAT_KEY in read_config_dict(path):
        if revision or base or vision_tower:
            raise OptionError(
                f"{path} is converted already; --revision, --base and --vision-tower are for checkpoints."
            )
        return export(path, destination, layout, dtype=dtype, force=force, on_progress=on_progress)
    check_destination(destination, force)
    origin = {"revision": revision, "base": base, "vision_tower": vision_tower}
    converted = destination.absolute().parent / f".{destination.name}.{uuid.uuid4().hex[:8]}.converted.partial"
    try:
        convert(source, converted, **origin, on_progress=on_progress, source_name=str(source))
        with opened(source, destination, **origin) as found:
            return export(
                converted, destination, layout, dtype=dtype, force=force, source=found.tensors, on_progress=on_progress
            )
    finally:
        shutil.rmtree(converted, ignore_errors=True)
