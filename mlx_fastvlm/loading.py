"""A name → a model ready to answer: "demo", a local folder, or a hub id that is converted on first use.

The runtime knows one layout, the converter's. This file finds or makes a folder in it and fills a model from it.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_fastvlm.blas import use_openblas
from mlx_fastvlm.cache_folder import CACHE_VARIABLE, cache_home
from mlx_fastvlm.checkpoint_files import ADAPTER_CONFIG, PROJECTOR, WEIGHT_SUFFIXES, is_projector_alone
from mlx_fastvlm.clip_head import ClipHead
from mlx_fastvlm.config import FastVLMConfig, read_config_dict
from mlx_fastvlm.errors import CheckpointError, FastVLMError, HubError, OptionError
from mlx_fastvlm.hub import download_checkpoint, is_hub_id
from mlx_fastvlm.json_file import read_json_object
from mlx_fastvlm.kernels import cpu
from mlx_fastvlm.kernels.choice import kernels_allowed, reference_only
from mlx_fastvlm.model import FastVLM
from mlx_fastvlm.processor import Processor
from mlx_fastvlm.safetensors_file import check_safetensors

DEFAULT_MODEL = "apple/FastVLM-0.5B"
DEMO = "demo"
FORMAT_KEY = "mlx_fastvlm"  # in config.json: marks the converter's layout
FORMAT_VERSION = 1
LARGE_MODEL_BYTES = 100_000_000  # beyond it, the extra `cpu` decides between seconds and minutes
DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}

# What a conversion depends on: a note or a picture beside the weights does not make it new.
_CHECKPOINT_SUFFIXES = (*WEIGHT_SUFFIXES, ".json", ".txt", ".jinja")

OnProgress = Callable[[str, int, int], None]  # (what is being done, bytes done, bytes in all)


def load(
    model: str | os.PathLike[str] = DEFAULT_MODEL,
    dtype: str | None = None,
    revision: str | None = None,
    on_progress: OnProgress | None = None,
) -> tuple[FastVLM, Processor]:
    """Load a model and its processor.

    Args:
        model: hub id, local folder or zip (a checkpoint in any layout, or an adapter), a converted model's folder, or
            "demo" for the built-in small model. A checkpoint is converted on first use into the cache folder.
        dtype: "float32", "float16" or "bfloat16" to compute in. None keeps the stored type on a GPU and takes float32
            on a CPU, where MLX is fast in no other.
        revision: branch, tag or commit of a hub id.
        on_progress: told how far a conversion is.

    Raises:
        FastVLMError: a child of it says what is wrong with the name, the files or the network.
    """
    if dtype is not None and dtype not in DTYPES:
        raise OptionError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}.")
    folder = resolve_model(model, revision, on_progress)
    config = FastVLMConfig.from_folder(folder)
    return load_model(folder, config, dtype), Processor.from_folder(folder, config)


def load_model(folder: Path, config: FastVLMConfig, dtype: str | None = None) -> FastVLM:
    """Fill a model from a converted folder; every weight is read, cast and placed before this returns.

    Raises:
        CheckpointError: weights are missing, damaged, or do not fit `config`.
    """
    path = folder / "model.safetensors"
    check_safetensors(path)
    weights = mx.load(str(path))
    model = FastVLM(config)
    strange = sorted(set(weights) ^ {name for name, _ in tree_flatten(model.parameters())})
    if strange:
        raise CheckpointError(f"{path} does not fit its config.json (see {strange[0]}); convert the model again.")
    target = compute_dtype(weights["language_model.norm.weight"].dtype, dtype)
    with _cpu_prepared(path.stat().st_size, target, config.quantization is not None) as keeps_narrow:
        for name in list(weights):
            # One at a time: the stored copy of a weight is freed before the next is read.
            weights[name] = _placed(name, weights[name], target, keeps_narrow)
    try:
        model.load_weights(list(weights.items()), strict=True)
    except ValueError as error:
        first_line = str(error).splitlines()[0]
        raise CheckpointError(f"{path} does not fit its config.json ({first_line}); convert the model again.") from None
    model.eval()
    model.clip_head = ClipHead.in_folder(folder)
    return model


def compute_dtype(stored: mx.Dtype, asked: str | None) -> mx.Dtype:
    """The type to compute in on the present device; see `load`."""
    if asked is not None:
        return DTYPES[asked]
    return mx.float32 if mx.default_device().type == mx.DeviceType.cpu else stored


def _placed(name: str, stored: mx.array, target: mx.Dtype, keeps_narrow: bool) -> mx.array:
    """A weight in memory, in the type to compute in. Packed ones stay packed, and with `keeps_narrow` matrices that hold
    nothing that bfloat16 does not are kept in it: the same numbers in half the bytes (see kernels/linear.py)."""
    if not mx.issubdtype(stored.dtype, mx.floating):
        placed = stored
    elif keeps_narrow and stored.ndim == 2 and name.endswith(".weight") and _fits_bfloat16(stored):
        placed = stored.astype(mx.bfloat16)
    else:
        placed = stored.astype(target)
    mx.eval(placed)
    return placed


def _fits_bfloat16(stored: mx.array) -> bool:
    """Whether no number changes in bfloat16. Many a float32 file was made from a bfloat16 one."""
    if stored.dtype != mx.float32:
        return stored.dtype == mx.bfloat16
    bits = np.asarray(stored).view(np.uint32)
    return not any(np.bitwise_or.reduce(part, axis=None) & 0xFFFF for part in (bits[:1], bits))


@contextmanager
def _cpu_prepared(size: int, dtype: mx.Dtype, quantized: bool) -> Iterator[bool]:
    """On a Linux CPU: put the fast matrix product in place, and for a large model load the loops while weights load.

    Yields:
        Whether those loops will run, which compute in float32 on weights in bfloat16.
    """
    if not on_slow_cpu() or reference_only():
        yield False
        return
    use_openblas()
    loops_run = kernels_allowed() and dtype == mx.float32 and size > LARGE_MODEL_BYTES and cpu.missing() is None
    if not loops_run:
        yield False
        return
    with ThreadPoolExecutor(1) as pool:
        pool.submit(cpu.warm_up, quantized)
        yield True


def on_slow_cpu() -> bool:
    """Whether MLX computes on a Linux CPU, where its own matrix product and loops are slow."""
    return sys.platform == "linux" and mx.default_device().type == mx.DeviceType.cpu


def resolve_model(
    model: str | os.PathLike[str], revision: str | None = None, on_progress: OnProgress | None = None
) -> Path:
    """The folder of the converted model that a name stands for, converting and downloading as needed."""
    if revision is not None and not is_hub_id(str(model)):
        raise OptionError(f"A revision is given, but {model} is not a hub id.")
    if str(model) == DEMO:
        return Path(__file__).parent / "assets" / "demo"
    path = as_path(model)
    if path.is_dir():
        _refuse_projector(path)
        is_adapter = (path / ADAPTER_CONFIG).exists()
        return path if not is_adapter and is_converted(path) else _converted_copy(path, on_progress)
    if path.suffix.lower() == ".zip" and path.is_file():
        return _converted_copy(path, on_progress)
    if path.exists():
        raise CheckpointError(
            f"{path} is a file; expected a model folder or zip, a hub id such as {DEFAULT_MODEL}, or {DEMO!r}."
        )
    if not is_hub_id(str(model)):
        raise CheckpointError(
            f"There is no folder {path}; expected one, a hub id such as {DEFAULT_MODEL}, or {DEMO!r}."
        )
    return _converted_from_hub(str(model), revision or "main", on_progress)


def as_path(name: str | os.PathLike[str]) -> Path:
    """A name as a path, `~` expanded. Raises CheckpointError if it is empty or the system cannot even look for it."""
    if not os.fspath(name):
        raise CheckpointError("A name is empty; expected that of a folder, a file or a model.")
    try:
        path = Path(name).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # too long, no such user, null bytes
        raise CheckpointError(
            f"{str(name)[:80]!r} cannot be a path: {getattr(error, 'strerror', None) or error}."
        ) from None
    return path


def is_converted(folder: Path) -> bool:
    """Whether a model folder is in the converter's layout.

    Raises:
        ConfigError: there is no readable config.json.
        CheckpointError: the folder was made by an incompatible release.
    """
    mark = read_config_dict(folder).get(FORMAT_KEY)
    if mark is None:
        return False
    version = mark.get("format") if isinstance(mark, dict) else mark
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} is in format {version!r}; this release reads format {FORMAT_VERSION}. Convert the checkpoint again."
        )
    return True


def cache_folder() -> Path:
    """Where converted models are kept: below `cache_home`, one folder for each format.

    So another release never reads what it does not know.
    """
    return as_path(cache_home()) / f"v{FORMAT_VERSION}"


def _converted_from_hub(hub_id: str, revision: str, on_progress: OnProgress | None) -> Path:
    """The cached conversion of a hub model; a name seen before needs no network at all."""
    home = cache_folder() / "hub" / hub_id.replace("/", "--")
    reference = home / "refs" / revision.replace("/", "--")
    try:
        commit = reference.read_text().strip()
    except FileNotFoundError:
        commit = revision
    except OSError as error:
        raise _unusable_cache(error) from None
    if re.fullmatch(r"[0-9a-f]{4,64}", commit) and (home / commit / "config.json").exists():
        return home / commit
    checkpoint = download_checkpoint(hub_id, revision)
    _convert(checkpoint, home / checkpoint.name, on_progress, source_name=hub_id, revision=checkpoint.name)
    try:
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(checkpoint.name)
    except OSError as error:
        raise _unusable_cache(error) from None
    return home / checkpoint.name


def _converted_copy(source: Path, on_progress: OnProgress | None) -> Path:
    """The cached conversion of a local checkpoint, folder or zip, made anew when its files change."""
    source = source.resolve()
    state = _state(source)
    base = _local_base(source)
    if base is not None:
        state += _state(base)
    place = hashlib.sha256(os.fsencode(source)).hexdigest()[:12]
    home = cache_folder() / "local" / f"{source.name}-{place}"
    current = home / hashlib.sha256(state).hexdigest()[:12]
    if not (current / "config.json").exists():
        _convert(source, current, on_progress)
        for other in home.iterdir():  # conversions of what the folder held before
            if other != current and not other.name.startswith("."):
                shutil.rmtree(other, ignore_errors=True)
    return current


def _state(source: Path) -> bytes:
    """What changes when a file that a conversion reads does: names, sizes and times. Raises CheckpointError."""
    try:
        if source.is_dir():
            files = [path for suffix in _CHECKPOINT_SUFFIXES for path in source.glob(f"*{suffix}")]
            files += [path for path in source.glob("*.mlpackage/**/*") if path.is_file()]
        else:
            files = [source]
        lines = [os.fsencode(source)]
        for path in sorted(files):
            status = path.stat()
            lines.append(os.fsencode(path.relative_to(source)) + f" {status.st_size} {status.st_mtime_ns}".encode())
    except OSError as error:
        raise CheckpointError(f"{source} cannot be read ({error.strerror or error}).") from None
    return b"".join(line + b"\n" for line in lines)


def _local_base(source: Path) -> Path | None:
    """The base of an adapter, if it lies on this machine; a hub id is part of the adapter's own state."""
    path = source / ADAPTER_CONFIG if source.is_dir() else _in_zip(source, ADAPTER_CONFIG)
    if path is None or not path.is_file():
        return None
    name = read_json_object(path, CheckpointError, shown=source / ADAPTER_CONFIG).get("base_model_name_or_path")
    base = as_path(name) if isinstance(name, str) and name else None
    return base.resolve() if base is not None and base.exists() else None


def _in_zip(source: Path, name: str) -> zipfile.Path | None:
    """A small file at the top of a zip or in a folder there; None also if the zip is damaged, as its conversion says."""
    try:
        tops = [zipfile.Path(source), *zipfile.Path(source).iterdir()]
        return next((top / name for top in tops if (top / name).is_file()), None)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return None


def _refuse_projector(folder: Path) -> None:
    """Raise CheckpointError for what LLaVA's first training stage leaves, which does not say what it belongs to."""
    try:
        names = [path.name for path in folder.iterdir()]
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read ({error.strerror or error}).") from None
    if is_projector_alone(names) and ADAPTER_CONFIG not in names:
        raise CheckpointError(
            f"{folder} holds only a projector ({PROJECTOR}); merge it into its base model first: "
            f"mlx-fastvlm convert {folder} CONVERTED --base {DEFAULT_MODEL}"
        )


def _convert(source: Path, destination: Path, on_progress: OnProgress | None, **origin: str) -> None:
    # Imported here: the converter is needed once per model, and `describe` should start fast.
    from mlx_fastvlm.convert import convert

    with _made_folder(destination.parent):
        try:
            convert(source, destination, on_progress=on_progress, **origin)
        except FastVLMError:
            # Another process may have finished the same conversion meanwhile, and stands in the way: as good a result.
            if not (destination / "config.json").exists():
                raise


@contextmanager
def _made_folder(folder: Path) -> Iterator[None]:
    """A folder of the cache; what is made for it goes again if an error leaves it empty."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unusable_cache(error) from None
    try:
        yield
    except BaseException:
        with suppress(OSError):  # another process uses it, and so all that lie above
            for path in missing:
                path.rmdir()
        raise


def _unusable_cache(error: OSError) -> HubError:
    return HubError(
        f"The cache folder {cache_folder()} cannot be used ({error.strerror or error}); "
        f"set {CACHE_VARIABLE} to a folder that can be written."
    )
