"""The launches of FastVLM's forward passes, stage by stage, for three ways to run the same network on Metal.

  mlx-vlm  that package's model (0.7.10): nothing folded, 1×1 convolutions as convolutions, no stacked projections
  plain    this package with MLX's own ops only, one launch an op
  fused    this package with its kernels

Formulas of single launches are in op_work.py, speeds of chips in performance_model.py. One image, one sequence, 16 bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx

from mlx_fastvlm.config import FastVLMConfig, TextConfig, VisionConfig
from mlx_fastvlm.fastvithd import SQUEEZE_RATIO
from mlx_fastvlm.kernels.depthwise_conv import OP as DEPTHWISE_CONV
from mlx_fastvlm.kernels.depthwise_pair import OP as DEPTHWISE_PAIR
from mlx_fastvlm.kernels.launch_table import default_launch

from .op_work import (
    EXP_FLOPS,
    Launch,
    Map,
    cached_attention,
    elementwise,
    gelu,
    linear,
    mlx_dense_conv,
    mlx_depthwise,
    mlx_unfused_attention,
    mlx_widening_conv,
    own_attention,
    own_depthwise,
    own_linear,
    own_pair,
    padded_attention,
)

ITEMSIZE = 2  # bytes of float16
ATTENTIONS = ("unfused", "padded", "own")
PADDED_HEAD_DIM = 64  # the narrowest heads that MLX's fused attention takes

Stages = dict[str, list[Launch]]  # stage → its launches in order


@dataclass(frozen=True)
class Graph:
    """How the network is run. Each field but the name is one saving that can be had without the others.

    Attributes:
        name: what tables call it.
        folded: BatchNorm and layer scale inside the weights, 1×1 convolutions as matrix products, q/k/v and gate/up each
            as one, norms by MLX's fast ones.
        own_depthwise: convolutions by kernels/depthwise_conv.py, with bias and GELU inside.
        depthwise_pair: RepMixer's and ConvFFN's convolutions by kernels/depthwise_pair.py.
        attention: of the tower, one of ATTENTIONS.
        squeeze_excite: three launches by kernels/squeeze_excite.py.
        add_rms_norm: residual and norm by kernels/add_rms_norm.py.
        rotary_heads: bias, rotary positions and split by kernels/rotary_heads.py.
        gate_up_swiglu: SwiGLU inside the quantized gate/up product of a decode step (kernels/quantized_swiglu.py, where
            tuning finds it faster).
        linear_epilogue: GELU and residual inside the tower's products (kernels/linear_epilogue.py, where tuning finds it
            faster).
    """

    name: str
    folded: bool = True
    own_depthwise: bool = False
    depthwise_pair: bool = False
    attention: str = "unfused"
    squeeze_excite: bool = False
    add_rms_norm: bool = False
    rotary_heads: bool = False
    gate_up_swiglu: bool = False
    linear_epilogue: bool = False


MLX_VLM = Graph("mlx-vlm", folded=False)
PLAIN = Graph("plain")
FUSED = Graph(
    "fused",
    own_depthwise=True,
    depthwise_pair=True,
    attention="own",
    squeeze_excite=True,
    add_rms_norm=True,
    rotary_heads=True,
)


def encode_stages(config: VisionConfig, graph: Graph, family: str | None = None) -> Stages:
    """The vision tower on one image of `config.image_size`.

    Args:
        config: the tower's shape.
        graph: how it is run.
        family: of chips, "M1" to "M5": kernels/launch_table.py has launch shapes for each. None: each op's first.
    """
    tower = _Tower(graph, config.head_dim, family)
    widths = config.embed_dims
    stages: Stages = {"patch embed": tower.patch_embed(Map(config.image_size, 3, ITEMSIZE), widths[0])}
    x = Map(config.image_size // 4, widths[0], ITEMSIZE)
    for index, (width, depth, ratio) in enumerate(zip(widths, config.layers, config.mlp_ratios, strict=True)):
        if index > 0:
            stages[f"downsampling {index}"] = tower.downsampling(x, width)
            x = Map(x.side // 2, width, ITEMSIZE)
        if index < 3:
            blocks = tower.rep_mixer_block(x, ratio) * depth
        else:
            blocks = tower.rep_cpe(x) + tower.attention_block(x, ratio) * depth
        stages[f"stage {index + 1}"] = blocks
    stages["conv_exp"] = tower.conv_exp(x, config.hidden_size)
    return stages


def project_stage(config: FastVLMConfig) -> list[Launch]:
    """The projector on the rows of one image; the same in all graphs."""
    rows, features = config.vision_config.num_image_tokens, config.vision_config.hidden_size
    hidden = config.text_config.hidden_size
    return [
        linear(rows, features, hidden, ITEMSIZE, weight_bits=16, bias=True),
        gelu(rows * hidden * ITEMSIZE, ITEMSIZE),
        linear(rows, hidden, hidden, ITEMSIZE, weight_bits=16, bias=True),
    ]


def prefill_stage(config: TextConfig, graph: Graph, tokens: int, weight_bits: float = 16) -> list[Launch]:
    """A prompt of `tokens` positions, image rows included, up to the first token; the head sees the last position."""
    return _decoder(config, graph, tokens, tokens, weight_bits)


def decode_step(config: TextConfig, graph: Graph, context: int, weight_bits: float = 16) -> list[Launch]:
    """One token after `context` − 1 positions in the cache, up to the next token."""
    return _decoder(config, graph, 1, context, weight_bits)


def bits_per_weight(bits: int) -> float:
    """Stored bits of a weight: 16, or `bits` and its share of a group's scale and bias (affine, groups of 64)."""
    return 16 if bits == 16 else bits + 32 / 64


class _Tower:
    """The launches of FastViTHD's blocks in one graph on one family of chips."""

    def __init__(self, graph: Graph, head_dim: int, family: str | None) -> None:
        self._graph = graph
        self._head_dim = head_dim
        self._family = family

    def patch_embed(self, pixels: Map, width: int) -> list[Launch]:
        half, quarter = (Map(pixels.side // shrink, width, ITEMSIZE) for shrink in (2, 4))
        return [
            mlx_dense_conv(pixels, 3, 2, width),
            _bias(half),
            _gelu(half),
            *self._depthwise(half, 3, stride=2, with_gelu=True),
            *self._linear_gelu(quarter, width),
        ]

    def rep_mixer_block(self, x: Map, ratio: int) -> list[Launch]:
        if self._graph.depthwise_pair:
            convolutions = [own_pair(x, _pair_launch(x, self._family))]
        else:
            convolutions = self._depthwise(x, 3) + self._depthwise(x, 7, bias=self._graph.folded) + self._batch_norm(x)
        return convolutions + self._feed_forward(x, ratio)

    def attention_block(self, x: Map, ratio: int) -> list[Launch]:
        heads = x.channels // self._head_dim
        return [
            *self._layer_norm(x),
            linear(x.positions, x.channels, 3 * x.channels, ITEMSIZE, weight_bits=16),
            *tower_attention(self._graph.attention, x.positions, heads, self._head_dim),
            *self._linear_residual(x, x.channels, as_convolution=False),
            *self._depthwise(x, 7, bias=self._graph.folded),
            *self._batch_norm(x),
            *self._feed_forward(x, ratio),
        ]

    def rep_cpe(self, x: Map) -> list[Launch]:
        return self._depthwise(x, 7)

    def downsampling(self, x: Map, width: int) -> list[Launch]:
        half = Map(x.side // 2, width, ITEMSIZE)
        return self._depthwise(x, 7, 2, width // x.channels, with_gelu=True) + self._linear_gelu(half, width)

    def conv_exp(self, x: Map, width: int) -> list[Launch]:
        out = x.with_channels(width)
        return self._depthwise(x, 3, multiplier=width // x.channels) + self._squeeze_excite(out)

    def _depthwise(
        self, x: Map, kernel: int, stride: int = 1, multiplier: int = 1, *, with_gelu: bool = False, bias: bool = True
    ) -> list[Launch]:
        if self._graph.own_depthwise:
            launch = _depthwise_launch(x, kernel, stride, multiplier, self._family)
            return [own_depthwise(x, kernel, stride, multiplier, launch, with_gelu)]
        out = Map(x.side // stride, x.channels * multiplier, ITEMSIZE)
        convolution = (
            mlx_depthwise(x, kernel, stride) if multiplier == 1 else mlx_widening_conv(x, kernel, stride, multiplier)
        )
        return [convolution, *([_bias(out)] if bias else []), *([_gelu(out)] if with_gelu else [])]

    def _feed_forward(self, x: Map, ratio: int) -> list[Launch]:
        wide = x.with_channels(x.channels * ratio)
        return self._linear_gelu(x, wide.channels) + self._linear_residual(wide, x.channels, as_convolution=True)

    def _linear_gelu(self, x: Map, width: int) -> list[Launch]:
        """1×1 convolution and GELU."""
        if self._graph.linear_epilogue:
            return [own_linear(x.positions, x.channels, width, ITEMSIZE, then="GELU")]
        return [*self._pointwise(x, width), _gelu(x.with_channels(width))]

    def _linear_residual(self, x: Map, width: int, as_convolution: bool) -> list[Launch]:
        """1×1 convolution or Linear layer, layer scale where it is not folded, and the residual."""
        if self._graph.linear_epilogue:
            return [own_linear(x.positions, x.channels, width, ITEMSIZE, then="residual")]
        out = x.with_channels(width)
        product = self._pointwise(x, width) if as_convolution else [self._linear(x, width)]
        scale = [] if self._graph.folded else [elementwise("layer scale", 2 * out.nbytes)]
        return [*product, *scale, elementwise("residual", 3 * out.nbytes)]

    def _pointwise(self, x: Map, width: int) -> list[Launch]:
        if self._graph.folded:
            return [self._linear(x, width)]
        return [mlx_dense_conv(x, 1, 1, width), _bias(x.with_channels(width))]

    def _linear(self, x: Map, width: int) -> Launch:
        return linear(x.positions, x.channels, width, ITEMSIZE, weight_bits=16, bias=True)

    def _batch_norm(self, x: Map) -> list[Launch]:
        """mlx.nn.BatchNorm: variance + eps and its root per channel, then four passes over the map."""
        if self._graph.folded:
            return []
        channel = x.channels * ITEMSIZE
        return [elementwise("BatchNorm", 2 * channel)] * 2 + [elementwise("BatchNorm", 2 * x.nbytes)] * 4

    def _layer_norm(self, x: Map) -> list[Launch]:
        if self._graph.folded:
            return [elementwise("LayerNorm", 2 * x.nbytes)]
        row = x.positions * ITEMSIZE
        passes = [x.nbytes + row, 2 * x.nbytes, 2 * x.nbytes, x.nbytes + row, 2 * row, 2 * row]
        passes += [2 * x.nbytes] * 4  # subtract, divide, weight, bias
        return [elementwise("LayerNorm", nbytes) for nbytes in passes]

    def _squeeze_excite(self, x: Map) -> list[Launch]:
        """Mean, two small products, gate, GELU. The plain mean is taken in float32 of a copy of the map."""
        squeezed = int(x.channels * SQUEEZE_RATIO)
        row = x.channels * ITEMSIZE
        narrow = linear(1, x.channels, squeezed, ITEMSIZE, weight_bits=16, bias=True)
        wide = linear(1, squeezed, x.channels, ITEMSIZE, weight_bits=16, bias=True)
        gate = elementwise("gate and GELU", 2 * x.nbytes, flops=x.size * EXP_FLOPS)
        if self._graph.squeeze_excite:
            return [elementwise("mean", x.nbytes, row), narrow, Launch("gate", gate.device_bytes + wide.device_bytes)]
        mean = [
            elementwise("to float32", 3 * x.nbytes),
            elementwise("mean", 2 * x.nbytes),
            elementwise("cast", 3 * row),
        ]
        small = [narrow, elementwise("ReLU", 2 * squeezed * ITEMSIZE), wide, elementwise("sigmoid", 2 * row)]
        return [*mean, *small, elementwise("gate", 2 * x.nbytes), _gelu(x)]


def tower_attention(kind: str, tokens: int, heads: int, head_dim: int) -> list[Launch]:
    """What stands between the joint projection and `proj` in stages 4 and 5; `kind` is one of ATTENTIONS."""
    if kind == "unfused":
        return mlx_unfused_attention(tokens, heads, head_dim, ITEMSIZE)
    if kind == "padded":
        return padded_attention(tokens, heads, head_dim, max(head_dim, PADDED_HEAD_DIM), ITEMSIZE)
    if kind == "own":
        return own_attention(tokens, heads, head_dim, ITEMSIZE)
    raise ValueError(f"attention is {kind!r}; expected one of {ATTENTIONS}")


def _decoder(config: TextConfig, graph: Graph, rows: int, context: int, weight_bits: float) -> list[Launch]:
    hidden, vocabulary = config.hidden_size, config.vocab_size
    states = rows * hidden * ITEMSIZE
    norm = elementwise("norm", 2 * states, hidden * ITEMSIZE)
    embedding = elementwise("embedding", rows * hidden * weight_bits / 8, states)
    head = linear(1, hidden, vocabulary, ITEMSIZE, weight_bits=weight_bits, op="head")
    logits = vocabulary * ITEMSIZE
    # mlx-vlm also wants log-probabilities: log-sum-exp and a subtraction before the choice.
    sampling = [elementwise("argmax", logits)]
    if not graph.folded:
        sampling = [elementwise("log-sum-exp", logits), elementwise("subtract", 2 * logits), *sampling]
    layers = _decoder_layer(config, graph, rows, context, weight_bits) * config.num_hidden_layers
    return [embedding, *layers, norm, head, *sampling]


def _decoder_layer(config: TextConfig, graph: Graph, rows: int, context: int, weight_bits: float) -> list[Launch]:
    hidden, inner = config.hidden_size, config.intermediate_size
    heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    states = rows * hidden * ITEMSIZE
    norm = elementwise("norm", 2 * states, hidden * ITEMSIZE)
    keys = rows * kv_heads * head_dim * ITEMSIZE
    quantized = weight_bits < 16

    def product(inputs: int, outputs: int, bias: bool = False) -> list[Launch]:
        """A Linear layer; MLX adds the bias of a quantized one in a launch of its own."""
        biased = bias and not quantized
        launches = [linear(rows, inputs, outputs, ITEMSIZE, weight_bits=weight_bits, bias=biased)]
        return launches + ([elementwise("bias", 2 * rows * outputs * ITEMSIZE)] if bias and quantized else [])

    joint = heads + 2 * kv_heads
    if graph.rotary_heads:
        rotate = elementwise("bias, rotary positions, split", (2 * rows + 1) * joint * head_dim * ITEMSIZE)
        projections = [*product(hidden, joint * head_dim), rotate]
    elif graph.folded:
        rotate = elementwise("rotary positions", 2 * rows * (heads + kv_heads) * head_dim * ITEMSIZE)
        projections = [*product(hidden, joint * head_dim, bias=True), rotate]
    else:
        parts = (heads, kv_heads, kv_heads)
        projections = [launch for part in parts for launch in product(hidden, part * head_dim, bias=True)]
        rotated = (heads, kv_heads)
        projections += [elementwise("rotary positions", 2 * rows * part * head_dim * ITEMSIZE) for part in rotated]

    attention = [
        *[elementwise("cache", 2 * keys)] * 2,
        cached_attention(rows, context, heads, kv_heads, head_dim, ITEMSIZE),
        *([elementwise("merge heads", 2 * states)] if rows > 1 else []),
        *product(hidden, hidden),
    ]
    add_and_norm = (
        [elementwise("residual and norm", 4 * states, hidden * ITEMSIZE)]
        if graph.add_rms_norm
        else [elementwise("residual", 3 * states), norm]
    )
    activated = rows * inner * ITEMSIZE
    swiglu = elementwise("SwiGLU", 3 * activated, flops=rows * inner * (EXP_FLOPS + 4))
    if graph.gate_up_swiglu and rows == 1 and quantized:
        gate_up = [linear(rows, hidden, 2 * inner, ITEMSIZE, weight_bits=weight_bits)]
    elif graph.folded:
        gate_up = [*product(hidden, 2 * inner), swiglu]
    else:
        gate_up = [*product(hidden, inner), *product(hidden, inner), swiglu]
    return [*projections, *attention, *add_and_norm, *gate_up, *product(inner, hidden), *add_and_norm]


def _bias(x: Map) -> Launch:
    return elementwise("bias", 2 * x.nbytes)


def _gelu(x: Map) -> Launch:
    return gelu(x.nbytes, x.itemsize)


def _depthwise_launch(x: Map, kernel: int, stride: int, multiplier: int, family: str | None) -> Mapping[str, int]:
    outputs = x.channels * multiplier
    candidates = DEPTHWISE_CONV.launches(
        _zeros(1, x.side, x.side, x.channels), _zeros(outputs, kernel, kernel, 1), _zeros(outputs), stride=stride
    )
    return default_launch(DEPTHWISE_CONV.name, family, candidates)


def _pair_launch(x: Map, family: str | None) -> Mapping[str, int]:
    weights = [array for k in (3, 7) for array in (_zeros(x.channels, k, k, 1), _zeros(x.channels))]
    candidates = DEPTHWISE_PAIR.launches(_zeros(1, x.side, x.side, x.channels), *weights)
    return default_launch(DEPTHWISE_PAIR.name, family, candidates)


def _zeros(*shape: int) -> mx.array:
    """An array for its shape and type; it is never evaluated, so it takes no memory."""
    return mx.zeros(shape, mx.float16)
