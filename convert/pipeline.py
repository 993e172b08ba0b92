"""The conversion: check everything, fold, write aside, rename."""

from __future__ import annotations

import errno
import glob
import json
import os
import re
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_fastvlm.config import FastVLMConfig, read_config_dict, vision_config_dict
from mlx_fastvlm.errors import CheckpointError, OptionError
from mlx_fastvlm.hub import download_checkpoint, is_hub_id
from mlx_fastvlm.image_processing import ImageProcessor
from mlx_fastvlm.loading import DTYPES, FORMAT_KEY, FORMAT_VERSION, OnProgress, as_path
from mlx_fastvlm.model import FastVLM
from mlx_fastvlm.safetensors_file import check_safetensors, write_safetensors

from .checkpoint import Checkpoint
from .key_map import check_names, sites
from .reparameterize import AnySite, ConvBatchNormSite, ConvSite, ScaledLinearSite, StackSite
from .self_check import self_check
from .tokenizer import write_tokenizer

_STORED_DTYPES = {"F32": "float32", "F64": "float32", "F16": "float16", "BF16": "bfloat16"}
_EMBEDDINGS, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    revision: str | None = None,
    force: bool = False,
    on_progress: OnProgress | None = None,
    source_name: str | None = None,
) -> Path:
    """Convert a FastVLM checkpoint into the folder that the runtime reads.

    Args:
        source: checkpoint folder in the hub's layout, or a hub id.
        destination: folder to make; it appears only when it is complete.
        dtype: "float32", "float16" or "bfloat16" to store; None keeps the checkpoint's.
        revision: branch, tag or commit of a hub id (or the commit that a folder was downloaded at).
        force: replace `destination` if it exists.
        on_progress: called with (what is being done, bytes done, bytes in all).
        source_name: what conversion.json calls the source, if not `source` itself.

    Returns:
        The destination.

    Raises:
        FastVLMError: a child of it says what is wrong; nothing is left behind.
    """
    destination = as_path(destination)
    if dtype is not None and dtype not in DTYPES:
        raise OptionError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}.")
    _check_destination(destination, force)
    folder = as_path(source)
    if not folder.is_dir():
        if folder.exists() or not is_hub_id(str(source)):
            raise CheckpointError(f"{source} is neither a folder nor a hub id such as apple/FastVLM-0.5B.")
        folder = download_checkpoint(str(source), revision)
        revision = folder.name
    if folder.resolve() == destination.resolve():
        raise OptionError(f"Source and destination are the same folder, {folder}.")

    raw_config = read_config_dict(folder)
    if FORMAT_KEY in raw_config:
        raise CheckpointError(f"{folder} is converted already; give the original checkpoint.")
    stated = FastVLMConfig.from_dict(raw_config)
    checkpoint = Checkpoint(folder)
    config, notices = _settle_head(stated, checkpoint)
    found = sites(config)
    dropped = check_names(found, set(checkpoint.names()) - _tied_head(config, checkpoint), checkpoint)
    if _tied_head(config, checkpoint):
        dropped[_HEAD] = "equal to the embeddings, to which it is tied"
    dtype = dtype or _STORED_DTYPES.get(checkpoint.dtype(_EMBEDDINGS), "float32")
    shapes = _parameter_shapes(config)

    _check_shapes(found, checkpoint, shapes)

    with _written_aside(destination, force) as aside:
        check = self_check(found, checkpoint)
        _write_weights(aside / "model.safetensors", found, shapes, checkpoint, DTYPES[dtype], on_progress)
        check_safetensors(aside / "model.safetensors")
        write_tokenizer(folder, aside)
        fit = "pad" if config.image_aspect_ratio == "pad" else "crop"
        _write_json(
            aside / "preprocessor_config.json", ImageProcessor(config.vision_config.image_size, fit=fit).to_dict()
        )
        for path in [*folder.glob("LICENSE*"), *folder.glob("ACKNOWLEDGEMENTS*"), folder / "generation_config.json"]:
            if path.is_file():
                shutil.copyfile(path, aside / path.name)
        _write_json(
            aside / "conversion.json",
            {
                "source": source_name or str(source),
                "revision": revision,
                "license": _license(folder),
                "dtype": dtype,
                "folded": _folded(found, checkpoint),
                "dropped": Counter(dropped.values()),
                "notices": notices,
                "self_check": asdict(check),
                "converter": f"mlx-fastvlm {version('mlx-fastvlm')}",
                "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            },
        )
        _write_json(
            aside / "config.json",
            {
                **raw_config,
                "tie_word_embeddings": config.text_config.tie_word_embeddings,
                "torch_dtype": dtype,
                "vision_config": vision_config_dict(config.vision_config),
                FORMAT_KEY: {"format": FORMAT_VERSION},
            },
        )
    return destination


def _settle_head(config: FastVLMConfig, checkpoint: Checkpoint) -> tuple[FastVLMConfig, list[str]]:
    """Whether the head is tied, by what is stored: some configs of FastVLM say the opposite of their weights."""
    says_tied, is_stored = config.text_config.tie_word_embeddings, _HEAD in checkpoint
    if says_tied and is_stored and _EMBEDDINGS in checkpoint and not _same_head(checkpoint):
        notice = "config.json says tie_word_embeddings, but lm_head differs from the embeddings: it is kept."
    elif not says_tied and not is_stored:
        notice = "config.json says that embeddings and head are not tied, but no lm_head is stored: they are tied."
    else:
        return config, []
    return replace(config, text_config=replace(config.text_config, tie_word_embeddings=not says_tied)), [notice]


def _same_head(checkpoint: Checkpoint) -> bool:
    return mx.array_equal(checkpoint[_HEAD], checkpoint[_EMBEDDINGS]).item()


def _tied_head(config: FastVLMConfig, checkpoint: Checkpoint) -> set[str]:
    """The stored head, if it is tied and so not needed (`_settle_head` has made sure that it is equal)."""
    return {_HEAD} if config.text_config.tie_word_embeddings and _HEAD in checkpoint else set()


def _parameter_shapes(config: FastVLMConfig) -> dict[str, tuple[int, ...]]:
    """Runtime parameter name → shape, from the model itself."""
    return {name: tuple(array.shape) for name, array in tree_flatten(FastVLM(config).parameters())}


def _write_weights(
    path: Path,
    found: list[AnySite],
    shapes: dict[str, tuple[int, ...]],
    checkpoint: Checkpoint,
    dtype: mx.Dtype,
    on_progress: OnProgress | None,
) -> None:
    names = [name for site in found for name in _targets(site)]
    assert set(names) == set(shapes), f"sites and model disagree: {sorted(set(names) ^ set(shapes))[:6]}"
    total = sum(checkpoint.nbytes(name) for site in found for name in site.sources(checkpoint))

    def folded() -> Iterator[tuple[str, mx.array]]:
        done = 0
        for site in found:
            yield from site.fold(checkpoint).items()
            done += sum(checkpoint.nbytes(name) for name in site.sources(checkpoint))
            if on_progress:
                on_progress("Converting", done, total)

    write_safetensors(path, {name: shapes[name] for name in names}, dtype, folded(), {"format": "mlx"})


def _targets(site: AnySite) -> list[str]:
    return [site.target] if isinstance(site, StackSite) else [f"{site.target}.weight", f"{site.target}.bias"]


class _Outline:
    """A checkpoint's shapes without its numbers: MLX infers what a fold would give without computing it."""

    def __init__(self, checkpoint: Checkpoint):
        self._checkpoint = checkpoint

    def __contains__(self, name: str) -> bool:
        return name in self._checkpoint

    def __getitem__(self, name: str) -> mx.array:
        return mx.zeros(self._checkpoint.shape(name))


def _check_shapes(found: list[AnySite], checkpoint: Checkpoint, shapes: dict[str, tuple[int, ...]]) -> None:
    """Hold the stored shapes against the config's; the error names the tensors."""
    outline = _Outline(checkpoint)
    for site in found:
        try:
            wrong = [name for name, array in site.fold(outline).items() if tuple(array.shape) != shapes[name]]
        except ValueError:  # the stored shapes do not even fit each other
            wrong = _targets(site)
        if wrong:
            stored = ", ".join(f"{name} {list(checkpoint.shape(name))}" for name in site.sources(checkpoint))
            raise CheckpointError(
                f"Stored shapes do not fit config.json: {stored} should make {wrong[0]} {list(shapes[wrong[0]])}."
            )


def _folded(found: list[AnySite], checkpoint: Checkpoint) -> dict[str, int]:
    """What was folded, counted by kind."""
    convs = [site for site in found if isinstance(site, ConvSite) and site.is_training_form(checkpoint)]
    return {
        "batch_norms": sum(1 for site in convs for name in site.sources(checkpoint) if name.endswith("running_mean")),
        "multi_branch_blocks": sum(not isinstance(site, ConvBatchNormSite) for site in convs),
        "layer_scales": sum(
            name.rpartition(".")[2].startswith("layer_scale") for site in found for name in site.sources(checkpoint)
        ),
        "convolutions_to_linear": sum(
            (isinstance(site, ConvSite) and site.as_linear)
            or (isinstance(site, ScaledLinearSite) and len(checkpoint.shape(f"{site.source}.weight")) == 4)
            for site in found
        ),
    }


def _license(folder: Path) -> str:
    """The license the source's model card states, else where to look for it."""
    card = folder / "README.md"
    if card.is_file():
        text = card.read_text(encoding="utf-8", errors="replace")
        front_matter = re.match(r"---\n(.*?\n)---", text, re.DOTALL)
        lines = front_matter[1] if front_matter else ""
        stated = dict(re.findall(r"^(license|license_name):\s*['\"]?([\w.-]+)", lines, re.MULTILINE))
        if "license" in stated:
            return stated.get("license_name", stated["license"])
    return "see LICENSE" if any(folder.glob("LICENSE*")) else "not stated by the source"


def _check_destination(destination: Path, force: bool) -> None:
    if destination.exists():
        if not force:
            raise OptionError(f"{destination} exists; give another folder, or --force to replace it.")
        if not destination.is_dir():
            raise OptionError(f"{destination} is a file; --force replaces folders only.")
        if any(destination.iterdir()) and not (destination / "conversion.json").exists():
            raise OptionError(f"{destination} is not a converted model; --force will not delete it.")
    if not destination.absolute().parent.is_dir():
        raise OptionError(f"{destination.absolute().parent} is not a folder; make it first.")


@contextmanager
def _written_aside(destination: Path, force: bool) -> Iterator[Path]:
    """A new folder beside `destination` that takes its place at the end, or vanishes on any error or Ctrl-C."""
    destination = destination.resolve()
    _remove_abandoned(destination)
    aside = destination.parent / f".{destination.name}.{uuid.uuid4().hex[:8]}.partial"
    try:
        aside.mkdir()
        yield aside
        if force and destination.exists():
            _exchange(aside, destination)
        else:
            aside.rename(destination)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            free = shutil.disk_usage(destination.parent).free
            raise CheckpointError(
                f"The disk of {destination.parent} is full ({free / 1e9:.1f} GB free); free some room."
            ) from None
        raise CheckpointError(f"{destination} cannot be written: {error.strerror or error}.") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _exchange(aside: Path, destination: Path) -> None:
    """Put `aside` in the place of `destination`; if that fails, the old folder is back where it was."""
    old = aside.with_suffix(".old")
    destination.rename(old)
    try:
        aside.rename(destination)
    except BaseException:
        old.rename(destination)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _remove_abandoned(destination: Path) -> None:
    """Remove what a conversion to the same place left when it was killed outright, a day or more ago."""
    for left in destination.parent.glob(f".{glob.escape(destination.name)}.*.partial"):
        if time.time() - left.stat().st_mtime > 86400:
            shutil.rmtree(left, ignore_errors=True)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
