"""What is to be converted, whatever it is given as: folder, zip, hub id, adapter, with another tower if asked."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlx_fastvlm.config import FastVLMConfig, read_config_dict
from mlx_fastvlm.errors import CheckpointError, OptionError
from mlx_fastvlm.hub import download_checkpoint, is_hub_id
from mlx_fastvlm.loading import FORMAT_KEY, as_path

from .archive import Folder, open_source
from .checkpoint import Checkpoint
from .key_map import TOWER
from .layouts import candidates, recognize, tower_alone
from .lora import is_adapter, merged, read_adapter
from .tensors import Combined, Renamed, Stored, Tensors

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class Source:
    """A checkpoint ready to be folded.

    Attributes:
        name: as the user gave it, or the hub id.
        revision: commit on the hub, if it came from there.
        folder: holds the tokenizer, the license and what else is copied.
        layout: how the checkpoint was stored.
        config: config.json in LlavaQwen2's words.
        tensors: under LlavaQwen2's names.
        notices: what the user should know.
    """

    name: str
    revision: str | None
    folder: Path
    layout: str
    config: dict[str, Any]
    tensors: Tensors
    notices: tuple[str, ...] = ()


@contextmanager
def opened(
    source: PathLike,
    destination: Path,
    *,
    revision: str | None = None,
    base: PathLike | None = None,
    vision_tower: PathLike | None = None,
) -> Iterator[Source]:
    """Find a checkpoint and present it; what had to be unpacked is removed at the end.

    Args:
        source: a checkpoint's or adapter's folder or zip, or a hub id.
        destination: what is going to be made, beside which a zip is unpacked.
        revision: of a hub id, or the commit that a folder was downloaded at.
        base: what an adapter is merged into, in place of the model it names.
        vision_tower: a file or folder whose FastViTHD takes the checkpoint's place.

    Raises:
        FastVLMError: a child says what is wrong with the source.
    """
    with ExitStack() as stack:
        found = _open(stack, source, destination, revision, base)
        if vision_tower is not None:
            found = _with_tower(stack, found, vision_tower, destination)
        yield found


def _open(
    stack: ExitStack,
    source: PathLike,
    destination: Path,
    revision: str | None,
    base: PathLike | None,
    is_base: bool = False,
) -> Source:
    path = as_path(source)
    if not path.exists():
        if not is_hub_id(str(source)):
            raise CheckpointError(f"{source} is neither a folder, a zip nor a hub id such as apple/FastVLM-0.5B.")
        path = download_checkpoint(str(source), revision)
        revision = path.name
    if path.resolve() == destination.resolve():
        raise OptionError(f"Source and destination are the same folder, {path}.")
    folder = stack.enter_context(open_source(path, destination))
    if is_adapter(folder):
        if is_base:
            raise CheckpointError(f"{path} is an adapter too; merge it into its base first, and name that with --base.")
        return _adapted(stack, folder, str(source), destination, base)
    if base is not None:
        raise OptionError(f"{source} is a whole model; --base is for adapters.")
    raw_config = read_config_dict(folder.path)
    if FORMAT_KEY in raw_config:
        raise CheckpointError(
            f"{path} is converted already; give the original checkpoint, or use mlx-fastvlm quantize."
        )
    candidates(raw_config)  # another model's config is a clearer answer than its lack of weights
    layout = recognize(Checkpoint(folder), raw_config, folder.path)
    return Source(str(source), revision, folder.path, layout.name, layout.config, layout.tensors, tuple(layout.notices))


def _adapted(stack: ExitStack, folder: Folder, name: str, destination: Path, base: PathLike | None) -> Source:
    """The model that an adapter makes of its base."""
    adapter = read_adapter(folder)
    base = base or adapter.base_model_name_or_path
    if not base:
        raise CheckpointError(f"{name} does not say what it adapts; name the base model with --base.")
    model = _open(stack, base, destination, None, None, is_base=True)
    return replace(
        model,
        name=f"{name} on {model.name}",
        tensors=merged(model.tensors, adapter),
        notices=(*model.notices, f"The adapter {name} is merged into {model.name}."),
    )


def _with_tower(stack: ExitStack, model: Source, vision_tower: PathLike, destination: Path) -> Source:
    """The model with another vision tower; the one it has is not read."""
    path = as_path(vision_tower)
    if path.is_file() and path.suffix != ".zip":
        tensors = Checkpoint.from_file(path)
    else:
        tensors = Checkpoint(stack.enter_context(open_source(path, destination)))
    config = FastVLMConfig.from_dict(model.config).vision_config
    others = {name: Stored(name) for name in model.tensors.names() if not name.startswith(f"{TOWER}.")}
    return replace(
        model,
        tensors=Combined(tower_alone(tensors, config), Renamed(model.tensors, others)),
        notices=(*model.notices, f"The vision tower is {vision_tower}'s."),
    )
