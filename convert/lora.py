"""An adapter on its base: LoRA in PEFT's layout, and the tensors that LLaVA's trainer stores beside it.

`read_adapter` reads what the adapter is; `merged` is a view of the base in which its weights are already changed. Nothing
is written, and only the tensor that is asked for is computed. Formulas: LoRA (arXiv 2106.09685, section 4.1),
rank-stabilized LoRA (2312.03732), DoRA (2402.09353, section 4.3), as peft 0.21 applies them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_fastvlm.checkpoint_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PROJECTOR, TRAINER_FILES, is_projector_alone
from mlx_fastvlm.errors import CheckpointError
from mlx_fastvlm.json_file import read_json_object

from .archive import Folder, check_inside
from .checkpoint import Checkpoint
from .tensors import Tensors, same_tensor

_EMBEDDINGS, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_FLOATS = ("F64", "F32", "F16", "BF16")

# Fields of adapter_config.json that change nothing in how a trained adapter is applied.
_OF_NO_EFFECT = {
    *("task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "target_modules", "exclude_modules"),
    *("lora_dropout", "layers_to_transform", "layers_pattern", "megatron_core", "loftq_config", "eva_config"),
    *("runtime_config", "qalora_group_size"),
}
_UNDERSTOOD = {
    *("peft_type", "base_model_name_or_path", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"),
    *("use_dora", "modules_to_save", "bias", "init_lora_weights", "ensure_weight_tying"),
}
# The other ways to begin (PiSSA, OLoRA, CorDA, LoftQ, …) change the base's weights before training.
_HARMLESS_INITS = (True, False, None, "gaussian", "eva", "orthogonal")

_LOW_RANK = re.compile(
    r"(?P<module>.+?)\.(?P<part>lora_(?:embedding_)?[AB]|lora_magnitude_vector)"
    r"(?:\.(?!weight$|bias$)[^.]+)?(?P<leaf>\.weight|\.bias)?"
)
# PEFT's wrappers inside a module's name: the tensors in them are those of the module itself.
_BASE_LAYER = re.compile(r"\.base_layer(?=\.)")
_SAVED_MODULE = re.compile(r"\.modules_to_save(\.(?!weight$|bias$)[^.]+)?(?=\.)")
# transformers' fast_vlm names → LlavaQwen2's
_TRANSFORMERS_NAMES = (
    (re.compile(r"(?:model\.)?language_model\.(?:model\.)?(?=layers\.|embed_tokens\.|norm\.)"), "model."),
    (re.compile(r"(?:model\.)?language_model\.(?=lm_head\.)"), ""),
    (re.compile(r"(?:model\.)?multi_modal_projector\.linear_1(?=\.)"), "model.mm_projector.0"),
    (re.compile(r"(?:model\.)?multi_modal_projector\.linear_2(?=\.)"), "model.mm_projector.2"),
)


@dataclass(frozen=True)
class LowRank:
    """ΔW = scale · B·A of one module.

    Attributes:
        tensors: the file that holds the factors.
        a, b: stored names. Linear and Conv2d: A (r, I, …), B (O, r, …); an embedding: A (r, vocabulary), B (hidden, r).
        scale: what the product is multiplied by.
        magnitude: stored name of DoRA's magnitudes (O), or None.
        is_embedding: whether ΔW is transposed, as an embedding's is.
    """

    tensors: Tensors
    a: str
    b: str
    scale: float
    magnitude: str | None = None
    is_embedding: bool = False

    def changed(self, weight: mx.array, start: int, stop: int) -> mx.array:
        """Rows start … stop − 1 of the base's weight → the same rows of the merged weight, both float32."""
        # In numpy: MLX may round float32 products to TF32, and its CPU build for Linux has a slow BLAS.
        rows = stop - start
        if self.is_embedding:
            product = np.asarray(self.tensors[self.a])[:, start:stop].T @ np.asarray(self.tensors[self.b]).T
        else:
            a, b = np.asarray(self.tensors[self.a]), np.asarray(self.tensors.rows(self.b, start, stop))
            product = b.reshape(rows, a.shape[0]) @ a.reshape(a.shape[0], -1)
        result = product.reshape(weight.shape)
        result *= np.float32(self.scale)
        result += np.asarray(weight)
        if self.magnitude is not None:
            norm = np.linalg.norm(result.reshape(rows, -1), axis=1)
            factor = np.asarray(self.tensors[self.magnitude]).reshape(-1)[start:stop] / norm
            result *= factor.reshape(-1, *(1,) * (result.ndim - 1))
        return mx.array(result)

    def misfit(self, shape: tuple[int, ...], rank: int) -> str | None:
        """The first factor whose shape does not fit a weight of this shape, with what was expected; None if all fit."""
        if self.is_embedding:
            expected = {self.a: (rank, shape[0]), self.b: (shape[1], rank)}
        else:
            expected = {self.a: (rank, *shape[1:]), self.b: (shape[0], rank, *(1,) * (len(shape) - 2))}
        for name, wanted in expected.items():
            if self.tensors.shape(name) != wanted:
                return f"{name} has shape {list(self.tensors.shape(name))}; expected {list(wanted)}"
        if self.magnitude is not None and math.prod(self.tensors.shape(self.magnitude)) != shape[0]:
            return f"{self.magnitude} has shape {list(self.tensors.shape(self.magnitude))}; expected {[shape[0]]}"
        return None


@dataclass(frozen=True)
class Replacement:
    """A tensor that takes the place of the base's.

    Attributes:
        tensors: the file that holds it.
        name: the stored name.
        of_copy: whether a copy of the module was trained (`modules_to_save`), so that what was tied to it stays as it was.
    """

    tensors: Tensors
    name: str
    of_copy: bool


@dataclass(frozen=True)
class Adapter:
    """A trained change to a base model.

    Attributes:
        folder: where it was read.
        base_model_name_or_path: the base that the adapter says it was trained on, or None.
        settings: adapter_config.json, {} where there is only a projector.
        low_rank: module name as stored, without PEFT's wrappers → its change.
        ranks: the same module names → rank r.
        replacements: tensor name as stored, without PEFT's wrappers → what takes its place.
    """

    folder: Path
    base_model_name_or_path: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    low_rank: Mapping[str, LowRank] = field(default_factory=dict)
    ranks: Mapping[str, int] = field(default_factory=dict)
    replacements: Mapping[str, Replacement] = field(default_factory=dict)


def is_adapter(source: Path | Folder) -> bool:
    """Whether a folder holds a change to a model rather than a model."""
    folder = _as_folder(source)
    return folder.holds(ADAPTER_CONFIG) or is_projector_alone(folder.names())


def read_adapter(source: Path | Folder) -> Adapter:
    """Read adapter_config.json and the names and shapes of all of an adapter's tensors.

    Args:
        source: a folder as PEFT or LLaVA's trainer writes it: adapter_config.json with adapter_model.safetensors or .bin,
            and perhaps non_lora_trainables.bin; or one with mm_projector.bin only.

    Raises:
        CheckpointError: files are missing or damaged, or the adapter is of a kind that cannot be merged exactly.
    """
    folder = _as_folder(source)
    settings = _read_settings(folder)
    files = [next((name for name in ADAPTER_WEIGHTS if folder.holds(name)), None)] if settings else []
    if None in files:
        raise CheckpointError(f"{folder.origin} has {ADAPTER_CONFIG} but no {ADAPTER_WEIGHTS[0]}; finish the download.")
    files += [name for name in TRAINER_FILES if folder.holds(name)]
    if not files:
        raise CheckpointError(f"{folder.origin} has neither {ADAPTER_CONFIG} nor {PROJECTOR}; expected an adapter.")
    parts: dict[str, dict[str, tuple[Tensors, str]]] = {}
    replacements: dict[str, Replacement] = {}
    for file in files:
        tensors = Checkpoint(folder, [file])
        for name in tensors.names():
            found = _LOW_RANK.fullmatch(name)
            if found is None:
                of_copy = file in ADAPTER_WEIGHTS and ".base_layer." not in name
                _add_replacement(folder, replacements, tensors, name, of_copy)
            else:
                _add_part(folder, parts, tensors, name, found)
    if not parts and not replacements:
        raise CheckpointError(f"{folder.origin} holds no tensors; download the adapter again.")
    low_rank = {module: _low_rank(folder, module, found, settings) for module, found in parts.items()}
    return Adapter(
        folder=folder.origin,
        base_model_name_or_path=settings.get("base_model_name_or_path"),
        settings=settings,
        low_rank=low_rank,
        ranks={module: _pattern(settings, "rank_pattern", module, settings["r"]) for module in parts},
        replacements=replacements,
    )


def merged(tensors: Tensors, adapter: Adapter, aliases: Mapping[str, str] | None = None) -> Tensors:
    """The base with an adapter merged into it, tensor by tensor as they are asked for.

    Where the base ties its head to its embeddings, the view has the head that the adapter was trained with: it gets a
    tensor of its own if the adapter changed only one of the two, and follows the embeddings if those were trained
    themselves (not through LoRA or as PEFT's copy).

    Args:
        tensors: the base under LlavaQwen2's names.
        adapter: what `read_adapter` returned.
        aliases: further names of the base's tensors → LlavaQwen2's, e.g. those of the layout the base is stored in.

    Raises:
        CheckpointError: a tensor of the adapter has no counterpart in the base, or another shape.
    """
    names = _Names(tensors, adapter, aliases or {})
    changes: dict[str, _Change] = {}
    for stored, replacement in adapter.replacements.items():
        name = names.find(stored)
        if name in changes:
            raise CheckpointError(f"{adapter.folder} has two tensors for {name}; expected one.")
        if replacement.tensors.shape(replacement.name) != names.base_shape(name):
            raise CheckpointError(
                f"{adapter.folder}: {replacement.name} has shape {list(replacement.tensors.shape(replacement.name))}, but the "
                f"base's {name} has {list(names.base_shape(name))}. Is this the base that the adapter was trained on?"
            )
        changes[name] = _Change(replacement.tensors, replacement.name, of_copy=replacement.of_copy)
    for module, low_rank in adapter.low_rank.items():
        name = names.find(f"{module}.weight")
        problem = low_rank.misfit(names.base_shape(name), adapter.ranks[module])
        if problem is not None:
            raise CheckpointError(
                f"{adapter.folder}: {problem}, for the base's {name} {list(names.base_shape(name))}. "
                "Is this the base that the adapter was trained on?"
            )
        base = changes.get(name) or _Change(tensors, names.base(name))
        if base.low_rank is not None:
            raise CheckpointError(f"{adapter.folder} changes {name} twice, under two names; expected one.")
        changes[name] = replace(base, low_rank=low_rank)
    hidden = _settle_tied_head(tensors, adapter, changes)
    return _Merged(tensors, changes, hidden)


@dataclass(frozen=True)
class _Change:
    """One tensor of the merged model: what is read, and what is added to it."""

    tensors: Tensors
    name: str
    low_rank: LowRank | None = None
    of_copy: bool = False


class _Merged:
    """The base's tensors, some of them changed, one perhaps added or hidden."""

    def __init__(self, tensors: Tensors, changes: Mapping[str, _Change], hidden: set[str]):
        self._tensors = tensors
        self._changes = dict(changes)
        self._hidden = hidden

    def names(self) -> list[str]:
        own = [name for name in self._tensors.names() if name not in self._hidden]
        return [*own, *(name for name in self._changes if name not in self._tensors)]

    def __contains__(self, name: str) -> bool:
        return name not in self._hidden and (name in self._changes or name in self._tensors)

    def __getitem__(self, name: str) -> mx.array:
        change = self._change(name)
        if change.low_rank is None:
            return change.tensors[change.name]
        return change.low_rank.changed(change.tensors[change.name], 0, self.shape(name)[0])

    def rows(self, name: str, start: int, stop: int) -> mx.array:
        change = self._change(name)
        stop = min(stop, self.shape(name)[0])
        weight = change.tensors.rows(change.name, start, stop)
        return weight if change.low_rank is None else change.low_rank.changed(weight, start, stop)

    def shape(self, name: str) -> tuple[int, ...]:
        change = self._change(name)
        return change.tensors.shape(change.name)

    def dtype(self, name: str) -> str:
        """The base's type: what an adapter is stored in says nothing about the model."""
        change = self._change(name)
        return self._tensors.dtype(name) if name in self._tensors else change.tensors.dtype(change.name)

    def nbytes(self, name: str) -> int:
        change = self._change(name)
        return change.tensors.nbytes(change.name)

    def _change(self, name: str) -> _Change:
        if name in self._hidden:
            raise KeyError(name)
        return self._changes.get(name) or _Change(self._tensors, name)


class _Names:
    """Which tensor of the base a name in an adapter means."""

    def __init__(self, tensors: Tensors, adapter: Adapter, aliases: Mapping[str, str]):
        self._tensors = tensors
        self._adapter = adapter
        self._aliases = aliases

    def base(self, name: str) -> str:
        """Where the base stores it: a tied head is stored as the embeddings."""
        return _EMBEDDINGS if name == _HEAD and _HEAD not in self._tensors else name

    def base_shape(self, name: str) -> tuple[int, ...]:
        return self._tensors.shape(self.base(name))

    def find(self, stored: str) -> str:
        for name in _candidates(stored):
            name = self._aliases.get(name, name)
            if self.base(name) in self._tensors:
                return name
        trained_on = self._adapter.base_model_name_or_path
        raise CheckpointError(
            f"{self._adapter.folder} changes {stored}, which the base does not have; expected an adapter of this model"
            f"{f', but it says it was trained on {trained_on}' if trained_on else ''}."
        )


def _candidates(stored: str) -> Iterator[str]:
    """What a stored name may stand for: PEFT and LLaVA put the same tensor under more or fewer prefixes."""
    plain = [stored.removeprefix("base_model.model."), stored.removeprefix("base_model."), f"model.{stored}"]
    yield from plain
    for name in plain:
        for pattern, llava in _TRANSFORMERS_NAMES:
            if pattern.match(name):
                yield pattern.sub(llava, name, count=1)


def _settle_tied_head(tensors: Tensors, adapter: Adapter, changes: dict[str, _Change]) -> set[str]:
    """Give a tied head the weight it had in training; return what must be hidden for it."""
    embeddings, head = changes.get(_EMBEDDINGS), changes.get(_HEAD)
    if embeddings is None or (_HEAD in tensors and not same_tensor(tensors, _EMBEDDINGS, _HEAD)):
        return set()
    trained_itself = embeddings.tensors is not tensors and not embeddings.of_copy
    shared = replace(embeddings, low_rank=None) if trained_itself else _Change(tensors, _EMBEDDINGS)
    if head is not None:
        if head.tensors is tensors:  # LoRA on the head: its base is what the embeddings are
            changes[_HEAD] = replace(shared, low_rank=head.low_rank)
        return set()
    if adapter.settings.get("ensure_weight_tying") or (trained_itself and embeddings.low_rank is None):
        return {_HEAD} if _HEAD in tensors else set()
    changes[_HEAD] = shared
    return set()


def _as_folder(source: Path | Folder) -> Folder:
    return source if isinstance(source, Folder) else Folder(source, source)


def _read_settings(folder: Folder) -> dict[str, Any]:
    """adapter_config.json, checked; {} if there is none."""
    path = folder.path / ADAPTER_CONFIG
    if not path.is_file():
        return {}
    shown = folder.origin / ADAPTER_CONFIG
    settings = read_json_object(check_inside(folder.path, path), CheckpointError, shown=shown)
    _check_settings(shown, settings)
    return settings


def _check_settings(path: Path, settings: dict[str, Any]) -> None:
    if settings.get("peft_type") != "LORA":
        raise CheckpointError(f"{path} says peft_type {settings.get('peft_type')!r}; only LORA adapters can be merged.")
    for name in sorted(set(settings) - _UNDERSTOOD - _OF_NO_EFFECT):
        # fan_in_fan_out, lora_bias, layer_replication, trainable_token_indices, … and what PEFT will think of next
        if settings[name]:
            raise CheckpointError(
                f"{path} sets {name} to {settings[name]!r}, which is not supported; merge the adapter with peft "
                "(merge_and_unload) and convert the result."
            )
    if settings.get("init_lora_weights", True) not in _HARMLESS_INITS:
        raise CheckpointError(
            f"{path} says init_lora_weights {settings['init_lora_weights']!r}, which changes the base's weights as well; "
            "merge the adapter with peft (merge_and_unload) and convert the result."
        )
    base = settings.get("base_model_name_or_path")
    if base is not None and not isinstance(base, str):
        raise CheckpointError(f"{path} says base_model_name_or_path {base!r}; expected a name.")
    for name in ("r", "lora_alpha"):
        _check_number(path, name, settings.get(name), whole=name == "r")
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = settings.get(name) or {}
        if not isinstance(patterns, dict):
            raise CheckpointError(f"{path} says {name} {patterns!r}; expected an object.")
        for pattern, value in patterns.items():
            _check_number(path, f"{name}[{pattern!r}]", value, whole=name == "rank_pattern")


def _check_number(path: Path, name: str, value: object, *, whole: bool) -> None:
    is_number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    if not is_number or not int(whole) <= value <= 1e9:  # not the reverse, which NaN would pass
        expected = "a whole number above zero" if whole else "a number of at least zero"
        raise CheckpointError(f"{path} says {name} = {value!r}; expected {expected}.")


def _add_part(
    folder: Folder,
    parts: dict[str, dict[str, tuple[Tensors, str]]],
    tensors: Tensors,
    name: str,
    found: re.Match[str],
) -> None:
    module, part = _without_wrappers(found["module"]), found["part"]
    if found["leaf"] == ".bias":
        raise CheckpointError(
            f"{folder.origin}: {name} is a bias inside LoRA, which is not supported; merge the adapter with peft."
        )
    if tensors.dtype(name) not in _FLOATS:
        raise CheckpointError(f"{folder.origin}: {name} is of type {tensors.dtype(name)}; expected floating point.")
    if part in parts.setdefault(module, {}):
        raise CheckpointError(f"{folder.origin} has {part} of {module} twice; expected one adapter in the folder.")
    parts[module][part] = (tensors, name)


def _add_replacement(
    folder: Folder, replacements: dict[str, Replacement], tensors: Tensors, name: str, of_copy: bool
) -> None:
    """PEFT and LLaVA's trainer may both store a tensor; then both must say the same."""
    plain = _without_wrappers(name)
    of_copy = of_copy or _SAVED_MODULE.search(name) is not None
    known = replacements.setdefault(plain, Replacement(tensors, name, of_copy))
    if known.tensors is not tensors and not mx.array_equal(known.tensors[known.name], tensors[name]).item():
        raise CheckpointError(f"{folder.origin} has two different tensors for {plain}; expected one.")
    if known.tensors is tensors and known.name != name:
        raise CheckpointError(f"{folder.origin} has both {known.name} and {name}; expected one adapter in the folder.")


def _without_wrappers(name: str) -> str:
    return _SAVED_MODULE.sub("", _BASE_LAYER.sub("", name))


def _low_rank(
    folder: Folder, module: str, parts: Mapping[str, tuple[Tensors, str]], settings: Mapping[str, Any]
) -> LowRank:
    is_embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
    a, b = ("lora_embedding_A", "lora_embedding_B") if is_embedding else ("lora_A", "lora_B")
    uses_dora = bool(settings.get("use_dora"))
    if is_embedding and uses_dora:
        raise CheckpointError(
            f"{folder.origin} has DoRA on the embeddings ({module}), which is not supported; merge the adapter with peft."
        )
    expected = {a, b, "lora_magnitude_vector"} if uses_dora else {a, b}
    lacking = sorted(expected - set(parts))
    if lacking and settings:
        raise CheckpointError(f"{folder.origin} lacks {' and '.join(lacking)} of {module}; download the adapter again.")
    if set(parts) != expected or not settings or len({id(tensors) for tensors, _ in parts.values()}) > 1:
        raise CheckpointError(
            f"{folder.origin} has {', '.join(sorted(parts))} of {module}; expected {', '.join(sorted(expected))}"
            f"{'' if settings else f' together with {ADAPTER_CONFIG}'}."
        )
    rank = _pattern(settings, "rank_pattern", module, settings["r"])
    alpha = _pattern(settings, "alpha_pattern", module, settings["lora_alpha"])
    return LowRank(
        tensors=parts[a][0],
        a=parts[a][1],
        b=parts[b][1],
        scale=alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank),
        magnitude=parts["lora_magnitude_vector"][1] if uses_dora else None,
        is_embedding=is_embedding,
    )


def _pattern(settings: Mapping[str, Any], field_name: str, module: str, default: Any) -> Any:
    """The value for a module: PEFT's patterns are regular expressions for the end of its name."""
    name = module.removeprefix("base_model.model.")
    for pattern, value in (settings.get(field_name) or {}).items():
        try:
            if re.fullmatch(rf"(.*\.)?({pattern})", name):
                return value
        except re.error as error:
            raise CheckpointError(
                f"{ADAPTER_CONFIG}: {field_name} has {pattern!r}, which is no pattern ({error})."
            ) from None
    return default
