"""Every tensor of a FastVLM checkpoint by its name on the hub, its shape, and a range for random values.

Names and shapes were listed from Apple's network (ml-fastvlm@592b4ad llava/model/multimodal_encoder/mobileclip/mci.py)
in both forms. The ranges are chosen so that activations stay near unit size through all 44 blocks.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .presets import TowerSize, tower_size

TOWER_PREFIX = "model.vision_tower.vision_tower.model."
FORMS = ("inference", "training")


@dataclass(frozen=True)
class Tensor:
    """Values are uniform in (low, high); `center` is added to the middle tap of a convolution kernel.

    `counter` marks BatchNorm's num_batches_tracked, an int64 scalar. `copy_of` names a tensor to repeat.
    """

    name: str
    shape: tuple[int, ...]
    low: float
    high: float
    center: float = 0.0
    counter: bool = False
    copy_of: str | None = None

    @property
    def size(self) -> int:
        count = 1
        for length in self.shape:
            count *= length
        return count


def _weight(name: str, shape: tuple[int, ...], gain: float = 1.0, center: float = 0.0) -> Tensor:
    """A matrix (out, in) or kernel (out, in / groups, k, k) whose output has `gain` times its input's deviation."""
    fan_in = 1
    for length in shape[1:]:
        fan_in *= length
    bound = gain * (3.0 / fan_in) ** 0.5
    return Tensor(name, shape, -bound, bound, center)


def _vector(name: str, width: int, low: float, high: float) -> Tensor:
    return Tensor(name, (width,), low, high)


def _conv(name: str, shape: tuple[int, ...], gain: float = 1.0, center: float = 0.0) -> Iterator[Tensor]:
    yield _weight(f"{name}.weight", shape, gain, center)
    yield _vector(f"{name}.bias", shape[0], -0.1, 0.1)


def _norm(name: str, width: int) -> Iterator[Tensor]:
    yield _vector(f"{name}.weight", width, 0.7, 1.3)
    yield _vector(f"{name}.bias", width, -0.2, 0.2)


def _batch_norm(name: str, width: int) -> Iterator[Tensor]:
    yield from _norm(name, width)
    yield _vector(f"{name}.running_mean", width, -0.3, 0.3)
    yield _vector(f"{name}.running_var", width, 0.5, 2.0)
    yield Tensor(f"{name}.num_batches_tracked", (), 0, 0, counter=True)


def _layer_scale(name: str, width: int, low: float = 0.1, high: float = 1.0) -> Tensor:
    return Tensor(name, (width, 1, 1), low, high)


def _conv_bn(name: str, shape: tuple[int, ...], gain: float = 1.0) -> Iterator[Tensor]:
    yield _weight(f"{name}.conv.weight", shape, gain)
    yield from _batch_norm(f"{name}.bn", shape[0])


def _mobile_one(
    name: str, shape: tuple[int, ...], training: bool, *, scale: bool = False, skip: bool = False, gain: float = 1.6
) -> Iterator[Tensor]:
    """MobileOneBlock: one conv, or the sum of k×k conv, 1×1 `rbr_scale` and BatchNorm `rbr_skip`."""
    if not training:
        yield from _conv(f"{name}.reparam_conv", shape, gain)
        return
    yield from _conv_bn(f"{name}.rbr_conv.0", shape, gain)
    if scale:
        yield from _conv_bn(f"{name}.rbr_scale", (*shape[:2], 1, 1), 0.5)
    if skip:
        yield from _batch_norm(f"{name}.rbr_skip", shape[0])


def _rep_mixer(name: str, width: int, training: bool) -> Iterator[Tensor]:
    shape = (width, 1, 3, 3)
    if not training:
        yield from _conv(f"{name}.reparam_conv", shape, 0.2, center=1.0)
        return
    yield from _batch_norm(f"{name}.norm.rbr_skip", width)
    yield from _mobile_one(f"{name}.mixer", shape, training, scale=True, skip=True, gain=1.0)
    yield _layer_scale(f"{name}.layer_scale", width, 0.1, 0.3)


def _conv_ffn(name: str, width: int, ratio: float, depth: int) -> Iterator[Tensor]:
    hidden = int(width * ratio)
    yield from _conv_bn(f"{name}.conv", (width, 1, 7, 7))
    yield from _conv(f"{name}.fc1", (hidden, width, 1, 1), 1.5)
    # BatchNorm with fixed statistics does not normalize: without the depth, 24 blocks multiply the input by 160.
    yield from _conv(f"{name}.fc2", (width, hidden, 1, 1), 1.5 * depth**-0.5)


def _block(name: str, width: int, ratio: float, depth: int, attention: bool, training: bool) -> Iterator[Tensor]:
    if not attention:
        yield from _rep_mixer(f"{name}.token_mixer", width, training)
        yield from _conv_ffn(f"{name}.convffn", width, ratio, depth)
        yield _layer_scale(f"{name}.layer_scale", width)
        return
    yield from _norm(f"{name}.norm", width)
    yield _weight(f"{name}.token_mixer.qkv.weight", (3 * width, width), 1.5)
    yield from _conv(f"{name}.token_mixer.proj", (width, width))
    yield from _conv_ffn(f"{name}.convffn", width, ratio, depth)
    yield _layer_scale(f"{name}.layer_scale_1", width)
    yield _layer_scale(f"{name}.layer_scale_2", width)


def _downsample(name: str, width: int, width_out: int, training: bool) -> Iterator[Tensor]:
    if training:
        yield from _conv_bn(f"{name}.proj.0.lkb_origin", (width_out, 1, 7, 7))
        yield from _conv_bn(f"{name}.proj.0.small_conv", (width_out, 1, 3, 3))
    else:
        yield from _conv(f"{name}.proj.0.lkb_reparam", (width_out, 1, 7, 7), 1.6)
    yield from _mobile_one(f"{name}.proj.1", (width_out, width_out, 1, 1), training, skip=True)


def tower_tensors(size: TowerSize, form: str) -> Iterator[Tensor]:
    """FastViTHD's tensors, without `TOWER_PREFIX`."""
    if form not in FORMS:
        raise ValueError(f"unknown form {form!r}; expected one of {FORMS}")
    training = form == "training"
    dims = size.embed_dims
    yield from _mobile_one("patch_embed.0", (dims[0], 3, 3, 3), training)
    yield from _mobile_one("patch_embed.1", (dims[0], 1, 3, 3), training)
    yield from _mobile_one("patch_embed.2", (dims[0], dims[0], 1, 1), training, skip=True)
    index = 0
    for stage, width in enumerate(dims):
        attention = stage >= 3
        if attention:
            # The identity is an addition in training form and lies inside the kernel in inference form.
            leaf, center = ("pe", 0.0) if training else ("reparam_conv", 1.0)
            yield from _conv(f"network.{index}.{leaf}", (width, 1, 7, 7), 0.3, center)
            index += 1
        for block in range(size.layers[stage]):
            name = f"network.{index}.{block}"
            yield from _block(name, width, size.mlp_ratios[stage], size.layers[stage], attention, training)
        index += 1
        if stage + 1 < len(dims):
            yield from _downsample(f"network.{index}", width, dims[stage + 1], training)
            index += 1
    features, squeeze = size.feature_dim, size.squeeze_dim
    yield from _mobile_one("conv_exp", (features, 1, 3, 3), training, scale=True)
    yield from _conv("conv_exp.se.reduce", (squeeze, features, 1, 1), 1.5)
    yield from _conv("conv_exp.se.expand", (features, squeeze, 1, 1), 1.5)
    # Stored (in, out): Apple's GlobalPool2D multiplies from the right.
    bound = (3.0 / features) ** 0.5
    yield Tensor("head.proj", (features, size.projection_dim), -bound, bound)


def projector_tensors(config: dict[str, Any]) -> Iterator[Tensor]:
    """mlp2x_gelu: Linear, exact GELU, Linear (index 1 is the activation)."""
    hidden = config["hidden_size"]
    yield from _conv("model.mm_projector.0", (hidden, config["mm_hidden_size"]), 1.5)
    yield from _conv("model.mm_projector.2", (hidden, hidden), 1.5)


def decoder_tensors(config: dict[str, Any], lm_head: str) -> Iterator[Tensor]:
    """Qwen2's tensors; `lm_head` is "absent", "tied-copy" or "untied"."""
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head_dim = hidden // config["num_attention_heads"]
    kv = head_dim * config["num_key_value_heads"]
    # A unit-size final norm then gives logits with a deviation of about 3.
    spread = 3.0 * (3.0 / hidden) ** 0.5
    yield Tensor("model.embed_tokens.weight", (vocab, hidden), -spread, spread)
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        yield _vector(f"{name}.input_layernorm.weight", hidden, 0.7, 1.3)
        for leaf, width in (("q_proj", hidden), ("k_proj", kv), ("v_proj", kv)):
            yield _weight(f"{name}.self_attn.{leaf}.weight", (width, hidden), 1.3)
            yield _vector(f"{name}.self_attn.{leaf}.bias", width, -0.2, 0.2)
        yield _weight(f"{name}.self_attn.o_proj.weight", (hidden, hidden))
        yield _vector(f"{name}.post_attention_layernorm.weight", hidden, 0.7, 1.3)
        yield _weight(f"{name}.mlp.gate_proj.weight", (inner, hidden), 1.5)
        yield _weight(f"{name}.mlp.up_proj.weight", (inner, hidden), 1.5)
        yield _weight(f"{name}.mlp.down_proj.weight", (hidden, inner))
    yield _vector("model.norm.weight", hidden, 0.7, 1.3)
    if lm_head != "absent":
        source = "model.embed_tokens.weight" if lm_head == "tied-copy" else None
        yield Tensor("lm_head.weight", (vocab, hidden), -spread, spread, copy_of=source)


def checkpoint_tensors(config: dict[str, Any], form: str, lm_head: str) -> list[Tensor]:
    """All tensors of one checkpoint, in the order in which they are written."""
    tower = [
        Tensor(**{**vars(tensor), "name": TOWER_PREFIX + tensor.name})
        for tensor in tower_tensors(tower_size(config), form)
    ]
    return [*tower, *projector_tensors(config), *decoder_tensors(config, lm_head)]
