"""What is held against each other before anything is written: names, shapes, head, and the bits that were asked for."""

from __future__ import annotations

from dataclasses import dataclass, replace

import mlx.core as mx

from mlx_fastvlm.config import FastVLMConfig
from mlx_fastvlm.errors import CheckpointError
from mlx_fastvlm.loading import DTYPES
from mlx_fastvlm.quantization import QuantizationConfig
from mlx_fastvlm.safetensors_file import DTYPE_NAMES

from .clip_head import clip_head_names, read_clip_head
from .key_map import check_names, sites
from .recipes import Recipe, plan
from .reparameterize import AnySite, StackSite
from .source import Source
from .tensors import Tensors, same_tensor
from .weights import parameter_shapes, stored_specs
from .writer import stored_bytes

_EMBEDDINGS, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Preflight:
    """What is going to be written, all of it checked.

    Attributes:
        config: the model's, its head tied as the weights say.
        dtype: to store.
        sites: all of them.
        shapes: runtime parameter → shape.
        quantization: which layers to quantize.
        dropped: stored tensor → why it is not needed.
        clip_head: see `read_clip_head`; None if there is none.
        notices: what the user should know.
    """

    config: FastVLMConfig
    dtype: str
    sites: list[AnySite]
    shapes: dict[str, tuple[int, ...]]
    quantization: QuantizationConfig | None
    dropped: dict[str, str]
    clip_head: mx.array | None
    notices: list[str]

    def stored_bytes(self) -> int:
        """Size of the weights that will be written."""
        dtype = DTYPES[self.dtype]
        head = 0 if self.clip_head is None else self.clip_head.size * dtype.size
        return stored_bytes(stored_specs(self.shapes, dtype, self.quantization)) + head


def preflight(source: Source, dtype: str | None, recipe: Recipe | None) -> Preflight:
    """Hold names and shapes of the source against its config. Raises CheckpointError, ConfigError, OptionError."""
    tensors = source.tensors
    config, notices = _settle_head(FastVLMConfig.from_dict(source.config), tensors)
    found = sites(config)
    tied = _tied_head(config, tensors)
    dropped = check_names(found, set(tensors.names()) - tied - clip_head_names(tensors), tensors)
    dropped |= dict.fromkeys(tied, "equal to the embeddings, to which it is tied")
    shapes = parameter_shapes(config)
    names = [name for site in found for name in _targets(site)]
    assert set(names) == set(shapes), f"sites and model disagree: {sorted(set(names) ^ set(shapes))[:6]}"
    _check_shapes(found, tensors, shapes)
    return Preflight(
        config=config,
        dtype=dtype or DTYPE_NAMES.get(tensors.dtype(_EMBEDDINGS), "float32"),
        sites=found,
        shapes={name: shapes[name] for name in names},
        quantization=None if recipe is None else plan(config, recipe),
        dropped=dropped,
        clip_head=read_clip_head(tensors, config.vision_config),
        notices=notices,
    )


def _settle_head(config: FastVLMConfig, tensors: Tensors) -> tuple[FastVLMConfig, list[str]]:
    """Whether the head is tied, by what is stored: some configs of FastVLM say the opposite of their weights."""
    says_tied, is_stored = config.text_config.tie_word_embeddings, _HEAD in tensors
    if says_tied and is_stored and _EMBEDDINGS in tensors and not same_tensor(tensors, _EMBEDDINGS, _HEAD):
        notice = "config.json says tie_word_embeddings, but lm_head differs from the embeddings: it is kept."
    elif not says_tied and not is_stored:
        notice = "config.json says that embeddings and head are not tied, but no lm_head is stored: they are tied."
    else:
        return config, []
    return replace(config, text_config=replace(config.text_config, tie_word_embeddings=not says_tied)), [notice]


def _tied_head(config: FastVLMConfig, tensors: Tensors) -> set[str]:
    """The stored head, if it is tied and so not needed (`_settle_head` has made sure that it is equal)."""
    return {_HEAD} if config.text_config.tie_word_embeddings and _HEAD in tensors else set()


def _targets(site: AnySite) -> list[str]:
    return [site.target] if isinstance(site, StackSite) else [f"{site.target}.weight", f"{site.target}.bias"]


class _Outline:
    """A checkpoint's shapes without its numbers: MLX infers what a fold would give without computing it."""

    def __init__(self, tensors: Tensors):
        self._tensors = tensors

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __getitem__(self, name: str) -> mx.array:
        return mx.zeros(self._tensors.shape(name))


def _check_shapes(found: list[AnySite], tensors: Tensors, shapes: dict[str, tuple[int, ...]]) -> None:
    """Hold the stored shapes against the config's; the error names the tensors."""
    outline = _Outline(tensors)
    for site in found:
        try:
            wrong = [name for name, array in site.fold(outline).items() if tuple(array.shape) != shapes[name]]
        except ValueError:  # the stored shapes do not even fit each other
            wrong = _targets(site)
        if wrong:
            stored = ", ".join(f"{name} {list(tensors.shape(name))}" for name in site.sources(tensors))
            raise CheckpointError(
                f"Stored shapes do not fit config.json: {stored} should make {wrong[0]} {list(shapes[wrong[0]])}."
            )
