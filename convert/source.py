"""What is to be converted, whatever it is given as: folder, zip, hub id, adapter, with another tower if asked."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mlx_fastvlm.config import FastVLMConfig, read_config_dict
from mlx_fastvlm.errors import CheckpointError, OptionError
from mlx_fastvlm.hub import download_checkpoint, is_hub_id
from mlx_fastvlm.loading import DEMO, FORMAT_KEY, OnProgress, as_path

from .archive import Folder, open_source
from .aside import check_apart
from .checkpoint import Checkpoint
from .key_map import TOWER
from .layouts import candidates, recognize, tower_alone
from .licenses import APPLE_LICENSE, NO_LICENSE, stated_license
from .lora import is_adapter, merged, read_adapter
from .tensors import Combined, Renamed, Stored, Tensors

# Apple's zip files and the folders in them: llava-fastvithd_0.5b_stage3
_APPLES_NAMES = re.compile(r"llava-fastvithd_(0\.5b|1\.5b|7b)_stage\d")
PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class Source:
    """A checkpoint ready to be folded.

    Attributes:
        name: for people: the hub id, or the name of the folder or zip without the way to it.
        hub_id: where the weights were downloaded from; an adapter's is its base's. None if they are local.
        revision: commit on the hub, if it came from there.
        folder: holds the tokenizer, the license and what else is copied.
        license: what the source states, see `licenses.stated_license`.
        layout: how the checkpoint was stored.
        config: config.json in LlavaQwen2's words.
        tensors: under LlavaQwen2's names.
        notices: what the user should know.
        places: role ("source", "base", "vision_tower") → the folder or file it was read from, or a hub id.
    """

    name: str
    hub_id: str | None
    revision: str | None
    folder: Path
    license: str
    layout: str
    config: dict[str, Any]
    tensors: Tensors
    notices: tuple[str, ...] = ()
    places: dict[str, Path | str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Opening:
    """What all that is opened for one conversion shares.

    Attributes:
        stack: closes what was opened.
        destination: what is going to be made, beside which zips are unpacked.
        on_progress: told how far the reading of a zip is.
    """

    stack: ExitStack
    destination: Path
    on_progress: OnProgress | None

    def folder(self, path: Path) -> Folder:
        """A folder or zip, opened. Raises OptionError if the destination is that folder or lies in it."""
        if path.is_dir():
            check_apart(path, self.destination)
        return self.stack.enter_context(open_source(path, self.destination, self.on_progress))


@contextmanager
def opened(
    source: PathLike,
    destination: Path,
    *,
    revision: str | None = None,
    base: PathLike | None = None,
    vision_tower: PathLike | None = None,
    on_progress: OnProgress | None = None,
) -> Iterator[Source]:
    """Find a checkpoint and present it; what had to be unpacked is removed at the end.

    Args:
        source: a checkpoint's or adapter's folder or zip, or a hub id.
        destination: what is going to be made, beside which a zip is unpacked.
        revision: of a hub id, or the commit that a folder was downloaded at.
        base: what an adapter is merged into, in place of the model it names.
        vision_tower: a file or folder whose FastViTHD takes the checkpoint's place.
        on_progress: called with (what is being done, bytes done, bytes in all).

    Raises:
        FastVLMError: a child says what is wrong with the source.
    """
    with ExitStack() as stack:
        opening = _Opening(stack, destination, on_progress)
        found = _open(opening, source, revision, base)
        if vision_tower is not None:
            found = _with_tower(opening, found, vision_tower)
        yield found


def _open(opening: _Opening, source: PathLike, revision: str | None, base: PathLike | None) -> Source:
    path, hub_id, revision = _find(source, revision)
    folder = opening.folder(path)
    if is_adapter(folder):
        return _adapted(opening, folder, hub_id, revision, base)
    if base is not None:
        raise OptionError(f"{source} is a whole model; --base is for adapters.")
    model = _model(folder, path, "give the original checkpoint, or use mlx-fastvlm quantize")
    places = {"source": hub_id or path.resolve()}
    return replace(model, name=hub_id or model.name, hub_id=hub_id, revision=revision, places=places)


def _find(source: PathLike, revision: str | None) -> tuple[Path, str | None, str | None]:
    """Where a source lies, the hub id it was downloaded from if it was, and its commit."""
    path = as_path(source)
    if path.exists():
        return path, *_downloaded_as(path, revision)
    if str(source) == DEMO:
        raise CheckpointError("The demo model is converted already; --to hub writes it as a checkpoint.")
    if not is_hub_id(str(source)):
        raise CheckpointError(f"{source} is neither a folder, a zip nor a hub id such as apple/FastVLM-0.5B.")
    path = download_checkpoint(str(source), revision)
    return path, str(source), path.name


def _downloaded_as(path: Path, revision: str | None) -> tuple[str | None, str | None]:
    """Hub id and commit of a folder in the Hugging Face cache, models--owner--name/snapshots/<commit>."""
    path = path.resolve()
    owner_and_name = re.fullmatch(r"models--([\w.-]+?)--([\w.-]+)", path.parent.parent.name)
    if path.parent.name != "snapshots" or owner_and_name is None:
        return None, revision
    return "/".join(owner_and_name.groups()), path.name


def _model(folder: Folder, path: Path, if_converted: str) -> Source:
    """A whole checkpoint, not an adapter."""
    if not (folder.path / "config.json").is_file():
        where = " at its top or in its one folder" if path.is_file() else ""
        raise CheckpointError(f"{path} has no config.json{where}, so it is not a checkpoint.")
    raw_config = read_config_dict(folder.path, folder.origin)
    if FORMAT_KEY in raw_config:
        todo = "unpack it and use its folder as it is" if path.is_file() else if_converted
        raise CheckpointError(f"{path} is converted already; {todo}.")
    candidates(raw_config)  # another model's config is a clearer answer than its lack of weights
    layout = recognize(Checkpoint(folder), raw_config, folder.path)
    return Source(
        name=path.resolve().name,
        hub_id=None,
        revision=None,
        folder=folder.path,
        license=_license(folder.path, path),
        layout=layout.name,
        config=layout.config,
        tensors=layout.tensors,
        notices=tuple(layout.notices),
    )


def _license(folder: Path, path: Path) -> str:
    """What the source's files state, or what is known of the names under which Apple publishes its checkpoints."""
    stated = stated_license(folder)
    return APPLE_LICENSE if stated == NO_LICENSE and _APPLES_NAMES.match(path.resolve().name) else stated


def _adapted(
    opening: _Opening, folder: Folder, adapter_id: str | None, revision: str | None, base: PathLike | None
) -> Source:
    """The model that an adapter makes of its base."""
    name = adapter_id or folder.origin.resolve().name
    adapter = read_adapter(folder)
    base = base or adapter.base_model_name_or_path
    if not base:
        raise CheckpointError(f"{name} does not say what it adapts; name the base model with --base.")
    path, hub_id, base_revision = _find(base, None)
    base_folder = opening.folder(path)
    if is_adapter(base_folder):
        raise CheckpointError(f"{path} is an adapter too; merge it into its base first, and name that with --base.")
    model = _model(base_folder, path, "an adapter needs the original checkpoint of its base")
    base_name = hub_id or model.name
    at = f" at {base_revision}" if base_revision else ""
    places = {"source": adapter_id or folder.origin.resolve(), "base": hub_id or path.resolve()}
    return replace(
        model,
        name=f"{name} on {base_name}",
        hub_id=hub_id,
        revision=revision,
        tensors=merged(model.tensors, adapter),
        notices=(*model.notices, f"The adapter {name} is merged into {base_name}{at}."),
        places=places,
    )


def _with_tower(opening: _Opening, model: Source, vision_tower: PathLike) -> Source:
    """The model with another vision tower; the one it has is not read."""
    path = as_path(vision_tower)
    if not path.exists():
        raise CheckpointError(f"There is no file or folder {vision_tower}; expected a vision tower's weights.")
    in_file = path.is_file() and path.suffix.lower() != ".zip"
    tensors = Checkpoint.from_file(path) if in_file else Checkpoint(opening.folder(path))
    config = FastVLMConfig.from_dict(model.config).vision_config
    others = {name: Stored(name) for name in model.tensors.names() if not name.startswith(f"{TOWER}.")}
    name = path.resolve().name
    return replace(
        model,
        name=f"{model.name} with the vision tower {name}",
        tensors=Combined(tower_alone(tensors, config), Renamed(model.tensors, others)),
        notices=(*model.notices, f"The vision tower is {name}'s."),
        places={**model.places, "vision_tower": path.resolve()},
    )
