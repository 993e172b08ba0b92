"""The way back: a converted folder's parameters under the names and shapes that other programs store.

The inverse of every site as data (`hub_tensors`, `mlx_vlm_tensors`) and a view that reads it (`Unfolded`). What folding
merged cannot be taken apart again, and need not be: the folded weight stays where it is, and what was folded into it
becomes an identity that computes exactly nothing. So ours → theirs → ours is equal bit by bit, in every type.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import mlx.core as mx

from mlx_fastvlm.config import FastVLMConfig, TextConfig

from .clip_head import CLIP_HEAD
from .key_map import TOWER, sites
from .reparameterize import ConvBatchNormSite, ConvSite, ScaledLinearSite, StackSite
from .tensors import Tensors

CLIP_HEAD_WIDTH = 768

# A BatchNorm with these statistics multiplies by 16 / sqrt(256 + eps), which is 1 exactly in float32, float16 and
# bfloat16 for every eps below 1.5e-5: beside 256 it vanishes. With variance 1 it would not, and nothing that bfloat16
# can hold would take it back.
IDENTITY_BATCH_NORM = {"weight": 16.0, "running_mean": 0.0, "running_var": 256.0}

# Linear layers of the runtime that the tower stores as 1×1 convolutions; all others are stored as matrices.
_POINTWISE = re.compile(r".*\.(convffn\.fc[12]|se\.(reduce|expand))")

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Exported:
    """One tensor to store: rows of a runtime parameter, or a constant.

    Args:
        name: what it is called there.
        shape: what is stored there; a parameter's first axis, its outputs, stays the first.
        parameter: the runtime's parameter; None for a constant.
        first_row: where in the parameter its rows begin.
        input_first: a kernel that is stored (O, C/groups, k, k) and not, as the runtime has it, (O, k, k, C/groups).
        value: the constant.
        is_counter: stored as int64, whatever the others are.
    """

    name: str
    shape: tuple[int, ...]
    parameter: str | None = None
    first_row: int = 0
    input_first: bool = False
    value: float = 0.0
    is_counter: bool = False


def hub_tensors(config: FastVLMConfig, shapes: Shapes) -> list[Exported]:
    """LlavaQwen2's tensors in inference form, as apple/FastVLM-0.5B names and shapes them.

    The head of a tied decoder is not among them: it is the embedding, and PyTorch ties it by config.json.

    Args:
        config: the converted folder's.
        shapes: parameter → shape; the runtime's, and `CLIP_HEAD` where there is one.
    """
    rows = _rows_of(config.text_config)
    found: list[Exported] = []
    for site in sites(config):
        if isinstance(site, StackSite):
            found += _unstack(site, shapes, rows)
        elif isinstance(site, ScaledLinearSite):
            found += _unscale(site, shapes)
        elif isinstance(site, ConvBatchNormSite):
            found += _unfold_batch_norm(site, shapes)
        else:
            found += _unfold_conv(site, shapes)
    return [*found, Exported(CLIP_HEAD, shapes[CLIP_HEAD], CLIP_HEAD)] if CLIP_HEAD in shapes else found


def mlx_vlm_tensors(config: FastVLMConfig, shapes: Shapes) -> list[Exported]:
    """The tensors of mlx-vlm's FastVLM (mlx_vlm/models/fastvlm), as its own converter would store them.

    Kernels stay (O, k, k, C/groups), which its loader recognizes by the stem's depthwise 3×3. It demands CLIP's head
    although nothing reads it: without one, zeros stand there.
    """
    head = (config.vision_config.hidden_size, CLIP_HEAD_WIDTH)
    found = [
        replace(_channels_last(tensor), name=_mlx_vlm_name(tensor.name))
        for tensor in hub_tensors(config, shapes)
        if not tensor.is_counter and tensor.name != CLIP_HEAD
    ]
    parameter = CLIP_HEAD if shapes.get(CLIP_HEAD) == head else None
    return [*found, Exported(_mlx_vlm_name(CLIP_HEAD), head, parameter)]


class Unfolded:
    """A converted folder's tensors as another program names and shapes them.

    Args:
        tensors: the folder's, under the runtime's names.
        exported: what to present.
    """

    def __init__(self, tensors: Tensors, exported: Iterable[Exported]):
        self._tensors = tensors
        self._exported = {tensor.name: tensor for tensor in exported}

    def names(self) -> list[str]:
        return list(self._exported)

    def __contains__(self, name: str) -> bool:
        return name in self._exported

    def __getitem__(self, name: str) -> mx.array:
        shape = self.shape(name)
        return self.rows(name, 0, shape[0]) if shape else mx.array(self._exported[name].value)

    def rows(self, name: str, start: int, stop: int) -> mx.array:
        tensor = self._exported[name]
        shape = (stop - start, *tensor.shape[1:])
        if tensor.parameter is None:
            return mx.full(shape, tensor.value)
        rows = self._tensors.rows(tensor.parameter, tensor.first_row + start, tensor.first_row + stop)
        if tensor.input_first and rows.ndim == 4:
            rows = rows.transpose(0, 3, 1, 2)
        return rows.reshape(shape)  # a Linear becomes a 1×1 kernel; all else has this shape already

    def shape(self, name: str) -> tuple[int, ...]:
        return self._exported[name].shape

    def dtype(self, name: str) -> str:
        tensor = self._exported[name]
        if tensor.is_counter:
            return "I64"
        return self._tensors.dtype(tensor.parameter or "language_model.norm.weight")

    def nbytes(self, name: str) -> int:
        tensor = self._exported[name]
        if tensor.parameter is None:
            return 0
        return self._tensors.nbytes(tensor.parameter) * tensor.shape[0] // self._tensors.shape(tensor.parameter)[0]


def _rows_of(config: TextConfig) -> dict[str, int]:
    """Rows of each part of a stacked matrix."""
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    inner = config.intermediate_size
    return {"q_proj": queries, "k_proj": keys, "v_proj": keys, "gate_proj": inner, "up_proj": inner}


def _unstack(site: StackSite, shapes: Shapes, rows: Mapping[str, int]) -> Iterator[Exported]:
    length, *rest = shapes[site.target]
    if len(site.names) == 1:
        yield Exported(site.names[0], (length, *rest), site.target)
        return
    first_row = 0
    for name in site.names:
        count = rows[name.split(".")[-2]]
        yield Exported(name, (count, *rest), site.target, first_row)
        first_row += count
    assert first_row == length, f"{site.target} has {length} rows, its parts {first_row}"


def _unscale(site: ScaledLinearSite, shapes: Shapes) -> Iterator[Exported]:
    outputs, inputs = shapes[f"{site.target}.weight"]
    shape = (outputs, inputs, 1, 1) if _POINTWISE.fullmatch(site.target) else (outputs, inputs)
    yield Exported(f"{site.source}.weight", shape, f"{site.target}.weight", input_first=True)
    yield Exported(f"{site.source}.bias", (outputs,), f"{site.target}.bias")
    if site.layer_scale is not None:
        yield Exported(site.layer_scale, (outputs, 1, 1), value=1.0)


def _unfold_conv(site: ConvSite, shapes: Shapes) -> Iterator[Exported]:
    yield _kernel(site, f"{site.source}.{site.folded_name}.weight")
    yield Exported(f"{site.source}.{site.folded_name}.bias", shapes[f"{site.target}.bias"], f"{site.target}.bias")


def _unfold_batch_norm(site: ConvBatchNormSite, shapes: Shapes) -> Iterator[Exported]:
    yield _kernel(site, f"{site.source}.conv.conv.weight")
    norm, width = f"{site.source}.conv.bn", shapes[f"{site.target}.bias"]
    yield Exported(f"{norm}.bias", width, f"{site.target}.bias")
    for part, value in IDENTITY_BATCH_NORM.items():
        yield Exported(f"{norm}.{part}", width, value=value)
    yield Exported(f"{norm}.num_batches_tracked", (), is_counter=True)


def _kernel(site: ConvSite, name: str) -> Exported:
    conv = site.conv
    shape = (conv.out_channels, conv.in_channels // conv.groups, conv.kernel_size, conv.kernel_size)
    return Exported(name, shape, f"{site.target}.weight", input_first=True)


def _channels_last(tensor: Exported) -> Exported:
    """The same tensor with its channels behind: (O, C, k, k) → (O, k, k, C), and a layer scale (C, 1, 1) → (1, 1, C)."""
    shape = tensor.shape
    if len(shape) == 4:
        return replace(tensor, shape=(shape[0], shape[2], shape[3], shape[1]), input_first=False)
    return replace(tensor, shape=(shape[1], shape[2], shape[0])) if len(shape) == 3 else tensor


# LlavaQwen2's prefixes → mlx-vlm's; the first that fits counts.
_MLX_VLM_PREFIXES = {
    f"{TOWER}.patch_embed.": "vision_tower.vision_model.patch_embed.blocks.",
    f"{TOWER}.": "vision_tower.vision_model.",
    "model.mm_projector.": "mm_projector.",
    "": "language_model.",
}


def _mlx_vlm_name(name: str) -> str:
    prefix = next(prefix for prefix in _MLX_VLM_PREFIXES if name.startswith(prefix))
    return _MLX_VLM_PREFIXES[prefix] + name.removeprefix(prefix)
