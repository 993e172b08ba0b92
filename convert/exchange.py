"""Any checkpoint → another program's layout, by way of ours."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from mlx_fastvlm.config import read_config_dict
from mlx_fastvlm.errors import OptionError
from mlx_fastvlm.loading import DEMO, FORMAT_KEY, OnProgress, as_path, resolve_model

from .aside import check_destination, check_room, hidden_beside, make_folder
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
    if str(source) == DEMO and not path.exists():
        path = resolve_model(DEMO)
    if (path / "config.json").is_file() and FORMAT_KEY in read_config_dict(path):
        if revision or base or vision_tower:
            raise OptionError(
                f"{path} is converted already; --revision, --base and --vision-tower are for checkpoints."
            )
        return export(path, destination, layout, dtype=dtype, force=force, on_progress=on_progress)
    check_destination(destination, force)
    origin = {"revision": revision, "base": base, "vision_tower": vision_tower}
    work = hidden_beside(destination)
    try:
        with opened(source, destination, **origin) as found:
            check_room(work.parent, 2 * sum(found.tensors.nbytes(name) for name in found.tensors.names()))
            make_folder(work)
            convert(source, work / "converted", **origin, on_progress=on_progress)
            return export(work / "converted", destination, layout, dtype=dtype, force=force, on_progress=on_progress)
    finally:
        shutil.rmtree(work, ignore_errors=True)
