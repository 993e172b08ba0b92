"""The child's side of the benchmarks against peers: loads one implementation, then answers requests, one JSON line each.

Arguments: the implementation's name, and its options as JSON (see `runner_process.RunnerProcess`).

Standard input: one JSON object a line, the arguments of what the loader returned. Standard output: first {"ready": ...}
or {"unavailable": why}, then its result for each request. Everything that libraries print goes to stderr.
`runner_process` is the other side.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from mlx_fastvlm.errors import FastVLMError

from .captioning_runners import CAPTIONING_RUNNERS
from .child import claim_stdout, send
from .headline_runners import HEADLINE_RUNNERS
from .machine import matmul_gflops, peak_rss, use_blas, use_device
from .runners import RUNNERS, Implementation
from .second_question_runners import SECOND_QUESTION_RUNNERS

Answer = Callable[..., dict[str, Any]]  # the fields of a request → the reply
_ANSWERERS = {**HEADLINE_RUNNERS, **SECOND_QUESTION_RUNNERS, **CAPTIONING_RUNNERS}  # name → options → Answer


def main() -> None:
    name, options = sys.argv[1], json.loads(sys.argv[2])
    replies = claim_stdout()
    # Before a peer loads: device and BLAS must be the same whoever computes.
    use_device(options["device"])
    blas = use_blas(options["blas"])
    gflops = matmul_gflops()
    start = time.perf_counter()
    try:
        reply_to = load(name, options)
    except (ImportError, FastVLMError) as error:
        send(replies, {"unavailable": str(error)})
        return
    seconds = time.perf_counter() - start
    send(replies, {"ready": name, "load_seconds": seconds, "blas": blas, "mlx_matmul_gflops": gflops})
    for line in sys.stdin:
        send(replies, reply_to(**json.loads(line)))


def load(name: str, options: dict[str, Any]) -> Answer:
    """What answers requests: a FastVLM that is asked about a picture, or what another benchmark compares."""
    if name in _ANSWERERS:
        return _ANSWERERS[name](options)
    return partial(answer, RUNNERS[name](options))


def answer(implementation: Implementation, image: str, prompt: str, max_tokens: int) -> dict[str, Any]:
    """One answer on one stopwatch: it starts with the call, before the picture's file is opened.

    `ttft_cpu` is the processor time of all threads meanwhile, which a busy machine distorts less.
    """
    start, start_cpu = time.perf_counter(), time.process_time()
    tokens, ttft, ttft_cpu = [], None, None
    for token in implementation.tokens(image, prompt, max_tokens):
        if ttft is None:
            ttft, ttft_cpu = time.perf_counter() - start, time.process_time() - start_cpu
        tokens.append(token)
    return {
        "ttft": ttft,
        "ttft_cpu": ttft_cpu,
        "seconds": time.perf_counter() - start,
        "tokens": tokens,
        "peak_rss": peak_rss(),
        "device_peak": implementation.device_peak(),
    }


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
