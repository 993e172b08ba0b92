"""The child's side of the ttft benchmark: one variant of one model, answered again and again, in a process of its own.

So the first answer and the peak memory are the variant's own. Argument: a `Request` as JSON. Standard output: one JSON
line, `measure`'s result or {"error": what the user can mend}. Progress goes to stderr.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map

from mlx_fastvlm.config import FastVLMConfig
from mlx_fastvlm.convert.recipes import RECIPES, plan
from mlx_fastvlm.errors import FastVLMError
from mlx_fastvlm.generate import GenerationResponse, prefill, stream_generate
from mlx_fastvlm.loading import load
from mlx_fastvlm.model import FastVLM
from mlx_fastvlm.processor import Processor
from mlx_fastvlm.quantization import QuantizationConfig

from .child import claim_stdout, module_command, send
from .command import BenchmarkError, progress
from .machine import matmul_gflops, peak_rss
from .random_model import load_random, random_config, stored_weights, word_processor

STAGES = ("tokenize", "decode", "resize", "encode", "project", "prefill", "first_token")
BITS = ("none", "8", "6", "5", "4", "3", "2")
_FILLER = " a"  # a token of its own in every byte-level vocabulary with a letter and a space in it


@dataclass(frozen=True)
class Variant:
    """What is varied. None takes what the model, the runtime or the question has by itself.

    Attributes:
        dtype: type to compute in.
        bits: of the recipe int8, int6, ... that the model is quantized by in memory; "none" leaves it as it is.
        resolution: side of the tower's square input in pixels, a multiple of 64.
        prompt_tokens: text tokens of the whole prompt, template included; the image's rows come on top.
    """

    dtype: str | None = None
    bits: str = "none"
    resolution: int | None = None
    prompt_tokens: int | None = None


@dataclass(frozen=True)
class Request:
    """One variant and how to measure it.

    Attributes:
        model: folder of a converted model; None builds a random one of the size `random_weights`.
        image: picture file.
        prompt: the question, where the variant does not ask for a length.
        max_tokens: length of an answer.
        repeat: counted answers, after one that is not.
    """

    model: str | None
    random_weights: str | None
    variant: Variant
    image: str
    prompt: str
    max_tokens: int
    repeat: int

    def command(self) -> list[str]:
        """The command line of the child that measures it."""
        return module_command("mlx_fastvlm.benchmarks.ttft_variant", json.dumps(asdict(self)))

    @classmethod
    def from_json(cls, text: str) -> Request:
        fields = json.loads(text)
        return cls(**{**fields, "variant": Variant(**fields["variant"])})


def measure(request: Request) -> dict[str, Any]:
    """Answer `repeat` + 1 times.

    Returns:
        Facts about the variant and, under "samples", one dict of seconds an answer: `STAGES`, "ttft", and
        "image_prefill", the prefill of the image's rows alone. The first answer is "first_answer_ttft_s", not a sample.

    Raises:
        FastVLMError: the model, the picture or the variant is not as it should be.
    """
    start = time.perf_counter()
    model, processor = prepare_model(request)
    load_seconds, loaded_rss = time.perf_counter() - start, peak_rss()
    if request.variant.resolution is not None:
        # The tower is convolutional but for attention that knows no positions: any multiple of its patch size runs.
        processor.image_processor = replace(processor.image_processor, image_size=request.variant.resolution)
    rows = image_rows(model, processor)
    question = request.prompt
    if request.variant.prompt_tokens is not None:
        question = question_of(processor, request.variant.prompt_tokens)
    image = Path(request.image).read_bytes()
    mx.reset_peak_memory()

    first, *responses = answers(model, processor, question, image, request)
    samples = []
    for response, image_prefill in responses:
        times = {stage: response.timings[stage] for stage in STAGES}
        samples.append({**times, "ttft": response.ttft, "image_prefill": image_prefill})
    last = responses[-1][0]
    return {
        "dtype": str(model.dtype).removeprefix("mlx.core."),
        "quantization": model.config.quantization and model.config.quantization.recipe,
        "resolution": processor.image_processor.image_size,
        "image_tokens": rows,
        "text_tokens": last.prompt_tokens - rows,
        "prompt_tokens": last.prompt_tokens,
        "generation_tokens": last.generation_tokens,
        "samples": samples,
        "decode_tps": [response.generation_tps for response, _ in responses if response.generation_tokens > 1],
        "first_answer_ttft_s": first[0].ttft,
        "load_s": load_seconds if request.model else None,  # a random model is also made meanwhile
        "weight_bytes": sum(array.nbytes for _, array in tree_flatten(model.parameters())),
        "loaded_rss_bytes": loaded_rss,
        "peak_rss_bytes": peak_rss(),
        "mlx_peak_bytes": mx.get_peak_memory(),
        "matmul_gflops": matmul_gflops(),
    }


def answers(
    model: FastVLM, processor: Processor, question: str, image: bytes, request: Request
) -> Iterator[tuple[GenerationResponse, float]]:
    """The last response of each answer, and the seconds that the image's rows alone take in the decoder.

    Raises:
        BenchmarkError: something was reused, so that a stage is missing.
    """
    for turn in range(request.repeat + 1):
        *_, last = stream_generate(model, processor, question, image=image, max_tokens=request.max_tokens)
        check_answer(last)
        alone = time_image_prefill(model, image_rows(model, processor))
        progress(f"  {'not counted' if turn == 0 else f'{turn}/{request.repeat}'}: {last.ttft * 1e3:,.0f} ms")
        yield last, alone


def prepare_model(request: Request) -> tuple[FastVLM, Processor]:
    """The model of a request, quantized in memory if its variant asks for it."""
    variant = request.variant
    if request.model is None:
        config = random_config(request.random_weights)
        return load_random(config, variant.dtype, _plan(config, variant.bits)), word_processor(config)
    model, processor = load(request.model, dtype=variant.dtype)
    if variant.bits != "none":
        model = quantize_in_memory(model, variant.bits)
    return model, processor


def quantize_in_memory(model: FastVLM, bits: str) -> FastVLM:
    """A quantized copy; each weight is dropped from `model` when its copy is there.

    Raises:
        BenchmarkError: the model is quantized already.
    """
    if model.config.quantization is not None:
        raise BenchmarkError(
            f"The model is quantized already, by recipe {model.config.quantization.recipe}; leave --bits out."
        )
    dtype, config = model.dtype, replace(model.config, quantization=_plan(model.config, bits))
    weights = dict(tree_flatten(model.parameters()))
    model.update(tree_map(lambda _: mx.zeros(()), model.parameters()))  # from here on only `weights` holds them
    quantized = FastVLM(config)
    quantized.load_weights(list(stored_weights(_taken(weights, config.quantization, dtype), config.quantization)))
    quantized.eval()
    return quantized


def image_rows(model: FastVLM, processor: Processor) -> int:
    """How many rows an image becomes at the processor's size."""
    return (processor.image_processor.image_size // model.config.vision_config.patch_size) ** 2


def question_of(processor: Processor, text_tokens: int) -> str:
    """A question about one image with which the prompt has so many text tokens.

    Raises:
        BenchmarkError: the template alone has more, or the tokenizer cannot make exactly as many.
    """

    def count(words: int) -> int:
        return len(processor.tokenize((_FILLER * words).strip(), 1)) - 1

    words = text_tokens - count(0)
    if words < 0:
        raise BenchmarkError(f"The prompt's template alone has {count(0)} tokens; ask for that many or more.")
    while words and (excess := count(words) - text_tokens) > 0:
        words -= max(1, excess // 2)
    if count(words) != text_tokens:
        raise BenchmarkError(
            f"This tokenizer makes {count(words)} or {count(words + 1)} text tokens, not {text_tokens}; ask for one of these."
        )
    return (_FILLER * words).strip()


def time_image_prefill(model: FastVLM, rows: int) -> float:
    """Seconds that the decoder takes for an image's rows and nothing else, up to the logits behind them.

    The rows are random: their values make no difference.
    """
    embeddings = mx.random.normal((1, rows, model.config.text_config.hidden_size), dtype=model.dtype)
    mx.eval(embeddings)
    start = time.perf_counter()
    mx.eval(prefill(model, embeddings, model.make_cache()))
    return time.perf_counter() - start


def check_answer(response: GenerationResponse) -> None:
    """Refuse to time an answer that did not look at the image anew.

    Raises:
        BenchmarkError: a stage is missing.
    """
    missing = [stage for stage in STAGES if stage not in response.timings]
    if missing:
        raise BenchmarkError(f"The answer has no time for {', '.join(missing)}: something was reused.")


def _plan(config: FastVLMConfig, bits: str) -> QuantizationConfig | None:
    return None if bits == "none" else plan(config, RECIPES[f"int{bits}"])


def _taken(
    weights: dict[str, mx.array], quantization: QuantizationConfig, dtype: mx.Dtype
) -> Iterator[tuple[str, mx.array]]:
    """Weights out of a dict, those to be quantized in the type to compute in, which their scales will have too."""
    for name in list(weights):
        array = weights.pop(name)
        packs = name.endswith(".weight") and array.ndim == 2 and quantization.storage(name.removesuffix(".weight"))
        yield name, array.astype(dtype) if packs else array


def main(argv: Sequence[str]) -> None:
    replies = claim_stdout()
    try:
        send(replies, measure(Request.from_json(argv[0])))
    except FastVLMError as error:
        send(replies, {"error": str(error)})


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main(sys.argv[1:])
