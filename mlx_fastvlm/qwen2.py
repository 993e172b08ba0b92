"""The Qwen2 decoder: grouped-query attention with rotary positions, SwiGLU, RMSNorm.

q/k/v and gate/up are one matmul each; the converter has stacked their weights. Source: transformers'
models/qwen2/modeling_qwen2.py; attribute names equal its keys but for the stacked ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from mlx_fastvlm.cache import Cache, KVCache, LayerCache, QuantizedKVCache
from mlx_fastvlm.config import TextConfig
from mlx_fastvlm.kernels import add_rms_norm, rotary_heads, swiglu, swiglu_feed_forward
from mlx_fastvlm.layers import Embedding, Linear, QuantizedLinear, product_and_bias


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = mx.ones((size,))
        self._eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        return mx.fast.rms_norm(x, self.weight, self._eps)

    def of_sum(self, x: mx.array, change: mx.array) -> tuple[mx.array, mx.array]:
        """x + change, and its norm."""
        return add_rms_norm(x, change, self.weight, self._eps)


class Attention(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self._num_heads = config.num_attention_heads
        self._num_kv_heads = config.num_key_value_heads
        self._head_dim = config.head_dim
        self._rope_theta = config.rope_theta
        width = (self._num_heads + 2 * self._num_kv_heads) * self._head_dim
        self.qkv_proj = Linear(config.hidden_size, width)
        self.o_proj = Linear(config.hidden_size, config.hidden_size, bias=False)

    def __call__(self, x: mx.array, cache: LayerCache) -> mx.array:
        """(B, L, hidden) → (B, L, hidden); the L positions follow those in `cache` and are added to it."""
        batch, length, _ = x.shape
        product, bias = product_and_bias(self.qkv_proj, x)
        queries, keys, values = rotary_heads(
            product, bias, cache.offset, self._num_heads, self._num_kv_heads, self._rope_theta
        )
        out = cache.attend(queries, keys, values, self._head_dim**-0.5)
        return self.o_proj(out.transpose(0, 2, 1, 3).reshape(batch, length, -1))


class MLP(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.gate_up_proj = Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        if isinstance(self.gate_up_proj, Linear) and isinstance(self.down_proj, Linear):
            return swiglu_feed_forward(x, self.gate_up_proj.weight, self.down_proj.weight)
        if isinstance(self.gate_up_proj, QuantizedLinear):
            return self.down_proj(self.gate_up_proj.swiglu(x))
        return self.down_proj(swiglu(self.gate_up_proj(x)))  # calibration watches these layers


class DecoderLayer(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def __call__(self, x: mx.array, cache: LayerCache) -> mx.array:
        """(B, L, hidden) → (B, L, hidden), the layer by itself."""
        x, change = self.parts(x, self.input_layernorm(x), cache)
        return x + change

    def parts(self, x: mx.array, normed: mx.array, cache: LayerCache) -> tuple[mx.array, mx.array]:
        """The layer but for its last addition, which the next norm does in one pass.

        Args:
            x: (B, L, hidden).
            normed: `input_layernorm` of x.
            cache: extended by L positions.

        Returns:
            x with the attention added, and what the MLP adds to that.
        """
        x, normed = self.post_attention_layernorm.of_sum(x, self.self_attn(normed, cache))
        return x, self.mlp(normed)


class Qwen2(nn.Module):
    """The decoder with its embedding table and output head (the same table when tied)."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = [DecoderLayer(config) for _ in range(config.num_hidden_layers)]
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self._head_dim = config.head_dim

    def make_cache(self, kv_bits: int | None = None) -> list[Cache]:
        """An empty cache for each layer, quantized if `kv_bits` is given (OptionError if it cannot be)."""
        if kv_bits is None:
            return [KVCache() for _ in self.layers]
        return [QuantizedKVCache(kv_bits, self._head_dim) for _ in self.layers]

    def hidden_states(self, inputs_embeds: mx.array, cache: Sequence[LayerCache]) -> mx.array:
        """(B, L, hidden) embeddings → (B, L, hidden) normalized states, extending `cache` by L positions."""
        x = inputs_embeds.astype(self.norm.weight.dtype)
        normed = self.layers[0].input_layernorm(x)
        next_norms = [*(layer.input_layernorm for layer in self.layers[1:]), self.norm]
        for layer, layer_cache, next_norm in zip(self.layers, cache, next_norms, strict=True):
            x, change = layer.parts(x, normed, layer_cache)
            x, normed = next_norm.of_sum(x, change)
        return normed

    def logits(self, hidden_states: mx.array) -> mx.array:
        """(..., hidden) → (..., vocab_size)."""
        if "lm_head" in self:
            return self.lm_head(hidden_states)
        return self.embed_tokens.as_linear(hidden_states)
