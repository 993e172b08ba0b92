"""The child's side of the peers benchmark: loads one implementation, then answers requests, one JSON line each.

Arguments: ours|mlx-vlm|torch FOLDER auto|off

Standard input: {"image": file, "prompt": question, "max_tokens": n} a line. Standard output: first {"ready": ...} or
{"unavailable": why}, then {"ttft", "ttft_cpu", "seconds", "tokens", "peak_rss"} for each request. Everything that libraries print
goes to stderr. `runner_process` is the other side.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from mlx_fastvlm.errors import FastVLMError

from .machine import matmul_gflops, peak_rss, use_blas
from .runners import RUNNERS, TokenStream


def main() -> None:
    name, folder, blas_choice = sys.argv[1:]
    replies = _claim_stdout()
    # Before a peer loads: the BLAS must be the same whoever computes.
    blas = use_blas(blas_choice)
    gflops = matmul_gflops()
    start = time.perf_counter()
    try:
        stream = RUNNERS[name](Path(folder))
    except (ImportError, FastVLMError) as error:
        _send(replies, {"unavailable": str(error)})
        return
    seconds = time.perf_counter() - start
    _send(replies, {"ready": name, "load_seconds": seconds, "blas": blas, "mlx_matmul_gflops": gflops})
    for line in sys.stdin:
        _send(replies, answer(stream, **json.loads(line)))


def answer(stream: TokenStream, image: str, prompt: str, max_tokens: int) -> dict[str, Any]:
    """One answer on one stopwatch: it starts with the call, before the picture's file is opened.

    `ttft_cpu` is the processor time of all threads meanwhile, which a busy machine distorts less.
    """
    start, start_cpu = time.perf_counter(), time.process_time()
    tokens, ttft, ttft_cpu = [], None, None
    for token in stream(image, prompt, max_tokens):
        if ttft is None:
            ttft, ttft_cpu = time.perf_counter() - start, time.process_time() - start_cpu
        tokens.append(token)
    seconds = time.perf_counter() - start
    return {"ttft": ttft, "ttft_cpu": ttft_cpu, "seconds": seconds, "tokens": tokens, "peak_rss": peak_rss()}


def _claim_stdout() -> TextIO:
    """Keep stdout for replies: whatever else writes to it reaches stderr."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return replies


def _send(replies: TextIO, message: dict[str, Any]) -> None:
    replies.write(json.dumps(message) + "\n")
    replies.flush()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
