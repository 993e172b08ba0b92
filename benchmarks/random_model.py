"""Models of the released sizes with random weights: speed and memory without any checkpoint.

They are written to a file that lives for seconds and loaded as every model is, so that the runtime places the weights
as it would a released model's. Speed does not depend on the values as long as they stay ordinary numbers, which
`random_weights` sees to. The prompt has as many tokens as the released tokenizer gives plain English words, since both
cut such text into words; their ids mean nothing.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from mlx_fastvlm.config import FastVLMConfig, TextConfig, VisionConfig
from mlx_fastvlm.image_processing import ImageProcessor
from mlx_fastvlm.loading import load_model
from mlx_fastvlm.model import FastVLM
from mlx_fastvlm.processor import Processor
from mlx_fastvlm.quantization import QuantizationConfig

from .command import BenchmarkError

_DECODERS = {
    "0.5b": TextConfig(
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        vocab_size=151936,
        tie_word_embeddings=True,
    ),
    "1.5b": TextConfig(
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        vocab_size=151936,
        tie_word_embeddings=True,
    ),
    "7b": TextConfig(
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=152128,
        tie_word_embeddings=False,
    ),
}
SIZES = tuple(_DECODERS)

_TAP_NOISE = 0.02  # of depthwise kernels, around the identity
_GAIN = 0.5  # of matrices: they shrink what they get, so that no residual stream grows out of float16
# Words with the space before them, numbers digit by digit, punctuation, line breaks: as Qwen2 cuts plain English.
_WORDS = r" ?[A-Za-z]+|[0-9]| ?[^\sA-Za-z0-9]+|\s*\n+|\s+"


def random_config(size: str) -> FastVLMConfig:
    """The released model's shape: "0.5b", "1.5b" or "7b" (apple/FastVLM-*'s config.json)."""
    return FastVLMConfig(text_config=_DECODERS[size], vision_config=VisionConfig())


def random_weights(config: FastVLMConfig, dtype: mx.Dtype, seed: int = 0) -> Iterator[tuple[str, mx.array]]:
    """Every parameter of the unquantized model by name, in `dtype`, each made when it is asked for.

    Norms keep what they get, depthwise kernels stay near the identity, matrices shrink: nothing overflows in float16
    and nothing fades into denormal numbers, which CPUs are slow with.
    """
    keys = iter(mx.random.split(mx.random.key(seed), len(tree_flatten(FastVLM(config).parameters()))))
    for name, parameter in tree_flatten(FastVLM(config).parameters()):
        yield name, _random_array(name, parameter.shape, dtype, next(keys))


def load_random(config: FastVLMConfig, dtype: str | None, quantization: QuantizationConfig | None = None) -> FastVLM:
    """A random model, loaded from bfloat16 as the released ones are stored.

    Args:
        config: the model's shape, unquantized.
        dtype: type to compute in; None as `loading.load` decides.
        quantization: which layers to quantize; None leaves all as they are.

    Raises:
        BenchmarkError: the folder for temporary files has no room for the weights.
    """
    with tempfile.TemporaryDirectory(prefix="mlx-fastvlm-") as folder:
        stored = dict(stored_weights(random_weights(config, mx.bfloat16), quantization))
        _check_room(folder, sum(array.nbytes for array in stored.values()))
        mx.save_safetensors(str(Path(folder) / "model.safetensors"), stored)
        del stored
        mx.clear_cache()  # peak memory is to be the runtime's: no room from here is left for what is loaded now
        return load_model(Path(folder), replace(config, quantization=quantization), dtype)


def stored_weights(
    weights: Iterable[tuple[str, mx.array]], quantization: QuantizationConfig | None
) -> Iterator[tuple[str, mx.array]]:
    """Parameters as a quantized model holds them: packed weights with their scales and biases, the others as they are.

    Taken and computed one at a time, so that an unquantized weight can go before the next comes.
    """
    for name, array in weights:
        for stored_name, stored in _stored(name, array, quantization):
            mx.eval(stored)
            yield stored_name, stored


def word_processor(config: FastVLMConfig) -> Processor:
    """A processor whose tokenizer gives every word an id below the vocabulary's size; no token ends an answer.

    Every id but the specials' is a word of its own, so that an answer read back as text is the tokens it was.
    """
    specials = [AddedToken(token) for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    words = range(1, config.text_config.vocab_size - len(specials))
    vocabulary = {"<unk>": 0, **{f" {_letters(number)}": number for number in words}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_WORDS), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(specials)
    return Processor(tokenizer, ImageProcessor(config.vision_config.image_size), frozenset())


def _letters(number: int) -> str:
    """1, 2, ... as a, b, ..., z, aa, ab, ..."""
    letters = ""
    while number:
        number, letter = divmod(number - 1, 26)
        letters = chr(ord("a") + letter) + letters
    return letters


def _check_room(folder: str, nbytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise BenchmarkError(
            f"{Path(folder).parent} has {free / 1e9:.1f} GB free; the random weights need {nbytes / 1e9:.1f} GB for some "
            "seconds. Make room, or set TMPDIR to a folder elsewhere."
        )


def _random_array(name: str, shape: tuple[int, ...], dtype: mx.Dtype, key: mx.array) -> mx.array:
    if name.endswith(".bias"):
        return mx.zeros(shape, dtype)
    if len(shape) == 1:
        return mx.ones(shape, dtype)
    if len(shape) == 4 and shape[-1] == 1:
        noise = mx.random.uniform(-_TAP_NOISE, _TAP_NOISE, shape, dtype, key)
        middle = mx.zeros(shape[1:3], dtype)
        middle[shape[1] // 2, shape[2] // 2] = 1
        return noise + middle[None, :, :, None]
    bound = _GAIN * math.sqrt(3 * shape[0] / math.prod(shape))
    return mx.random.uniform(-bound, bound, shape, dtype, key)


def _stored(name: str, array: mx.array, quantization: QuantizationConfig | None) -> list[tuple[str, mx.array]]:
    """A parameter as the model holds it: itself, or its packed weight with scales and biases."""
    path, _, kind = name.rpartition(".")
    storage = quantization.storage(path) if quantization and kind == "weight" and array.ndim == 2 else None
    if storage is None:
        return [(name, array)]
    packed = mx.quantize(array, group_size=storage.group_size, bits=storage.bits, mode=storage.mode)
    return list(zip((name, f"{path}.scales", f"{path}.biases"), packed, strict=False))
