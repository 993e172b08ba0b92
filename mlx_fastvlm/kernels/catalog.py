"""Every op that has GPU kernels, in the shapes in which a model calls it.

Tuning, self-test and the kernel benchmark go through this list. It is the one file here that knows a model's config.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from mlx_fastvlm.config import FastVLMConfig, TextConfig, VisionConfig
from mlx_fastvlm.kernels.add_rms_norm import OP as ADD_RMS_NORM
from mlx_fastvlm.kernels.add_rms_norm import add_rms_norm
from mlx_fastvlm.kernels.depthwise_conv import OP as DEPTHWISE_CONV
from mlx_fastvlm.kernels.depthwise_conv import depthwise_conv
from mlx_fastvlm.kernels.depthwise_pair import OP as DEPTHWISE_PAIR
from mlx_fastvlm.kernels.depthwise_pair import depthwise_pair
from mlx_fastvlm.kernels.fused_op import FusedOp, Launch, random_array
from mlx_fastvlm.kernels.linear_epilogue import OP as LINEAR_EPILOGUE
from mlx_fastvlm.kernels.linear_epilogue import linear_add, linear_gelu
from mlx_fastvlm.kernels.quantized_swiglu import OP as QUANTIZED_SWIGLU
from mlx_fastvlm.kernels.quantized_swiglu import quantized_swiglu
from mlx_fastvlm.kernels.rotary_heads import OP as ROTARY_HEADS
from mlx_fastvlm.kernels.rotary_heads import rotary_heads
from mlx_fastvlm.kernels.self_attention import OP as SELF_ATTENTION
from mlx_fastvlm.kernels.self_attention import self_attention
from mlx_fastvlm.kernels.squeeze_excite import OP as SQUEEZE_EXCITE
from mlx_fastvlm.kernels.squeeze_excite import SQUEEZE_RATIO, squeeze_excite
from mlx_fastvlm.kernels.swiglu import OP as SWIGLU
from mlx_fastvlm.kernels.swiglu import swiglu
from mlx_fastvlm.quantization import Storage

Shape = tuple[int, ...]

# What a model calls, with arguments as the kernel takes them.
_DISPATCH: dict[str, Callable[..., tuple[mx.array, ...]]] = {
    "add_rms_norm": add_rms_norm,
    "depthwise_conv": lambda *arrays, **options: (depthwise_conv(*arrays, **options),),
    "depthwise_pair": lambda x, w3, b3, w7, b7: depthwise_pair(x, (w3, b3), (w7, b7)),
    "linear_epilogue": lambda x, weight, bias, extra, gelu, residual: (
        linear_gelu(x, weight, bias) if gelu else linear_add(x, weight, bias, extra),
    ),
    "quantized_swiglu": lambda *arrays, **options: (quantized_swiglu(*arrays, **options, mode="affine"),),
    "rotary_heads": lambda product, bias, offset, **options: rotary_heads(
        product, bias, offset.item() if offset.size == 1 else offset, **options
    ),
    "self_attention": lambda qkv, head_dim: (self_attention(qkv, head_dim),),
    "squeeze_excite": lambda x, w1, b1, w2, b2: (squeeze_excite(x[:, None], (w1, b1), (w2, b2))[:, 0],),
    "swiglu": lambda gate_up: (swiglu(gate_up),),
}
FUSED_OPS = (
    DEPTHWISE_CONV, DEPTHWISE_PAIR, SELF_ATTENTION, SQUEEZE_EXCITE, LINEAR_EPILOGUE,
    ADD_RMS_NORM, ROTARY_HEADS, SWIGLU, QUANTIZED_SWIGLU,
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One op in one shape.

    Attributes:
        fused_op: the op with its kernels.
        label: the shape in words.
        count: how often one answer's encode and prefill, or one decoded token, run it.
        shapes: of its floating-point arrays, in the order of the kernel's arguments. Where the options say how many bits,
            the last is a weight's that is quantized so.
        offsets: of the argument that follows them, a position for each of the batch, if the op has one.
        options: the kernel's other arguments.
    """

    fused_op: FusedOp
    label: str
    count: int
    shapes: tuple[Shape, ...]
    offsets: tuple[int, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def op(self) -> str:
        return self.fused_op.name

    def arrays(self, dtype: mx.Dtype, seed: int = 0) -> tuple[mx.array, ...]:
        """Random arguments; the same for the same seed."""
        arrays = [random_array(shape, dtype, seed + index) for index, shape in enumerate(self.shapes)]
        if "bits" in self.options:
            arrays += mx.quantize(arrays.pop(), self.options["group_size"], self.options["bits"])
        if self.offsets:
            arrays.append(mx.array(self.offsets, mx.int32))
        return tuple(arrays)

    def run(self, *arrays: mx.array) -> tuple[mx.array, ...]:
        """The op as a model calls it: whatever the dispatcher chooses."""
        return _DISPATCH[self.op](*arrays, **self.options)

    def fused(self, *arrays: mx.array, launch: Launch | None = None, where: str = "metal") -> tuple[mx.array, ...]:
        """The kernel itself, in the likeliest launch shape if none is given."""
        launch = launch or self.fused_op.launches(*arrays, **self.options)[0]
        return self.fused_op.on(where)(*arrays, launch=launch, **self.options)


def cases(config: FastVLMConfig, resolution: int, prompt_tokens: int) -> list[Case]:
    """All ops of one encode at `resolution` pixels, one prefill of `prompt_tokens` and one decode step."""
    text = config.text_config
    quantization = config.quantization
    gate_up = None if quantization is None else quantization.storage("language_model.layers.0.mlp.gate_up_proj")
    return [
        *tower_cases(config.vision_config, resolution),
        *decoder_cases(text, prompt_tokens, offset=0),
        *decoder_cases(text, 1, offset=prompt_tokens, gate_up=gate_up),
    ]


def distinct(cases: Iterable[Case]) -> list[Case]:
    """The first of each op, shapes and options, in order."""
    first: dict[tuple, Case] = {}
    for case in cases:
        first.setdefault((case.op, case.shapes, *case.options.items()), case)
    return list(first.values())


def tower_cases(vision: VisionConfig, resolution: int) -> Iterator[Case]:
    """The tower's ops, in the order of its stages."""
    dims, side = vision.embed_dims, resolution // 4
    yield _conv(dims[0], resolution // 2, 3, count=1, stride=2, gelu=True)
    for stage, (channels, depth) in enumerate(zip(dims, vision.layers, strict=True)):
        if stage:
            yield _conv(dims[stage - 1], side, 7, count=1, stride=2, gelu=True, multiplier=channels // dims[stage - 1])
            side //= 2
        yield _linear(side**2, channels, channels, count=1)
        map_shape = (1, side, side, channels)
        if stage < 3:
            shapes = (map_shape, (channels, 3, 3, 1), (channels,), (channels, 7, 7, 1), (channels,))
            yield Case(DEPTHWISE_PAIR, _size(*map_shape[1:]), depth, shapes)
        else:
            yield _conv(channels, side, 7, count=depth + 1)  # one more for the positional encoding
            qkv = (1, side**2, 3 * channels)
            label = f"{side**2} tokens, {channels // vision.head_dim} heads"
            yield Case(SELF_ATTENTION, label, depth, (qkv,), options={"head_dim": vision.head_dim})
        hidden = channels * vision.mlp_ratios[stage]
        yield _linear(side**2, channels, hidden, count=depth)
        yield _linear(side**2, hidden, channels, count=depth, residual=True)
    wide = vision.hidden_size
    yield _conv(dims[-1], side, 3, count=1, multiplier=wide // dims[-1])
    squeezed = int(wide * SQUEEZE_RATIO)
    shapes = ((1, side**2, wide), (squeezed, wide), (squeezed,), (wide, squeezed), (wide,))
    yield Case(SQUEEZE_EXCITE, _size(side, side, wide), 1, shapes)


def decoder_cases(text: TextConfig, tokens: int, offset: int, gate_up: Storage | None = None) -> Iterator[Case]:
    """The decoder's ops for `tokens` positions from `offset` on; `gate_up` is how that projection is quantized, if it is."""
    width, layers = text.hidden_size, text.num_hidden_layers
    row = (tokens, width)
    yield Case(ADD_RMS_NORM, _size(*row), 2 * layers, (row, row, (width,)), options={"eps": text.rms_norm_eps})
    heads, kv_heads = text.num_attention_heads, text.num_key_value_heads
    joint = (heads + 2 * kv_heads) * text.head_dim
    options = {"heads": heads, "kv_heads": kv_heads, "base": text.rope_theta}
    yield Case(ROTARY_HEADS, _size(tokens, joint), layers, ((1, tokens, joint), (joint,)), (offset,), options)
    stacked = 2 * text.intermediate_size
    yield Case(SWIGLU, _size(tokens, stacked), layers, ((tokens, stacked),))
    if gate_up is not None and gate_up.mode == "affine":
        options = {"group_size": gate_up.group_size, "bits": gate_up.bits}
        label = f"{_size(tokens, width)} to {stacked}, {gate_up.bits} bits"
        yield Case(QUANTIZED_SWIGLU, label, layers, ((tokens, width), (stacked, width)), options=options)


def _linear(rows: int, inputs: int, outputs: int, count: int, residual: bool = False) -> Case:
    shapes = ((rows, inputs), (outputs, inputs), (outputs,), (rows, outputs) if residual else (outputs,))
    label = f"{_size(rows, inputs)} to {outputs}, {'residual' if residual else 'GELU'}"
    return Case(LINEAR_EPILOGUE, label, count, shapes, options={"gelu": not residual, "residual": residual})


def _conv(
    channels: int, side: int, kernel: int, count: int, stride: int = 1, gelu: bool = False, multiplier: int = 1
) -> Case:
    label = f"{kernel}x{kernel}" + ("/2" if stride == 2 else "") + (f" x{multiplier}" if multiplier > 1 else "")
    outputs = channels * multiplier
    shapes = ((1, side, side, channels), (outputs, kernel, kernel, 1), (outputs,))
    options = {"stride": stride, "gelu": gelu}
    return Case(DEPTHWISE_CONV, f"{label} {_size(side, side, channels)}", count, shapes, options=options)


def _size(*lengths: int) -> str:
    return "x".join(map(str, lengths))
