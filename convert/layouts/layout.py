"""What recognizing a checkpoint gives, and the renaming that every layout is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from mlx_fastvlm.config import FastVLMConfig
from mlx_fastvlm.convert.key_map import TOWER, decoder_sites
from mlx_fastvlm.convert.tensors import Renamed, Stored, Tensors
from mlx_fastvlm.errors import CheckpointError

Transform = Callable[[mx.array], mx.array]

PROJECTOR = "model.mm_projector"
DECODER = "model."
LM_HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Layout:
    """A checkpoint under LlavaQwen2's names.

    Attributes:
        name: the layout it is stored in, for messages and records.
        config: a config.json in LlavaQwen2's words, as FastVLMConfig.from_dict takes it.
        tensors: everything stored that is of use to the model, and what `check_names` knows as droppable.
        notices: what the user should know about this conversion.
    """

    name: str
    config: dict[str, Any]
    tensors: Tensors
    notices: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Canonical:
    """What one stored name stands for.

    Args:
        name: LlavaQwen2's name.
        transform: from what is stored to what LlavaQwen2 stores; None if that is the same.
    """

    name: str
    transform: Transform | None = None


def renamed(tensors: Tensors, table: Mapping[str, Canonical], layout: str) -> Renamed:
    """A view of `tensors` by the names that `table` (stored name → canonical) gives them.

    Raises:
        CheckpointError: a stored name is not in the table, or two stand for the same tensor.
    """
    refuse_unknown((name for name in tensors.names() if name not in table), layout)
    stored: dict[str, Stored] = {}
    for name in tensors.names():
        canonical = table[name]
        if canonical.name in stored:
            raise CheckpointError(
                f"{stored[canonical.name].name} and {name} are the same tensor in the layout {layout}; expected one."
            )
        stored[canonical.name] = Stored(name, canonical.transform)
    return Renamed(tensors, stored)


def refuse_unknown(names: Iterable[str], layout: str) -> None:
    """Raise CheckpointError naming `names`, if there are any, as unknown to `layout`."""
    unknown = sorted(names)
    if unknown:
        more = f" and {len(unknown) - 6} more" if len(unknown) > 6 else ""
        raise CheckpointError(
            f"The checkpoint is in the layout {layout}, but these tensors are unknown for its config.json: "
            f"{', '.join(unknown[:6])}{more}. It is not FastVLM's, or config.json belongs to another checkpoint."
        )


def decoder_table(config: FastVLMConfig, prefix: str, lm_head: str) -> dict[str, Canonical]:
    """Stored name → canonical, of the decoder.

    Args:
        prefix: what stands for LlavaQwen2's "model.".
        lm_head: the stored name of the head's weight.
    """
    names = {name for site in decoder_sites(config) for name in site.names} - {LM_HEAD}
    # Old transformers stored the rotary frequencies; they are known, and dropped later.
    layers = range(config.text_config.num_hidden_layers)
    names |= {f"{DECODER}layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in layers}
    table = {prefix + name.removeprefix(DECODER): Canonical(name) for name in names}
    return table | {lm_head: Canonical(LM_HEAD)}


def projector_table(first: str, second: str) -> dict[str, Canonical]:
    """Stored name → canonical, of the two Linear layers that are stored under the prefixes `first` and `second`."""
    return {
        f"{stored}.{part}": Canonical(f"{PROJECTOR}.{index}.{part}")
        for stored, index in ((first, 0), (second, 2))
        for part in ("weight", "bias")
    }


def tower_table(names: Mapping[str, str], prefix: str) -> dict[str, Canonical]:
    """`names` (a tower's stored name → Apple's, both without prefix) with their prefixes."""
    return {prefix + stored: Canonical(f"{TOWER}.{apple}") for stored, apple in names.items()}


def spelled_out_tower(vision_config: Any) -> dict[str, Any] | None:
    """The `vision_config` of a config.json if it is this project's own extension, which spells out widths and depths."""
    is_ours = isinstance(vision_config, dict) and {"embed_dims", "layers"} <= vision_config.keys()
    return vision_config if is_ours else None
