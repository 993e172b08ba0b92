"""The process behind `stopwatch`: loads one model, answers twice, says what it took, and ends.

A JSON request on standard input, a JSON line on standard output.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import mlx.core as mx

from mlx_fastvlm.benchmarks.machine import peak_rss
from mlx_fastvlm.errors import FastVLMError
from mlx_fastvlm.generate import stream_generate
from mlx_fastvlm.loading import load


def answer(
    folder: str, image: str, prompt: str, max_tokens: int, dtype: str | None, kv_bits: int | None
) -> dict[str, Any]:
    """Time a model's second answer (the first pays for what MLX does once). Keys as in `results.Speed`."""
    model, processor = load(folder, dtype=dtype)
    processor.eos_token_ids = frozenset()  # an answer of max_tokens, whatever the model would say
    for _ in range(2):
        *_, last = stream_generate(model, processor, prompt, image=image, max_tokens=max_tokens, kv_bits=kv_bits)
    return {
        "ttft_s": last.ttft,
        "decode_tps": last.generation_tps,
        "peak_rss_bytes": peak_rss(),
        "peak_mlx_bytes": mx.get_peak_memory(),
    }


def main() -> None:
    try:
        print(json.dumps(answer(**json.load(sys.stdin))))
    except FastVLMError as error:
        sys.exit(" ".join(str(error).split()))
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
