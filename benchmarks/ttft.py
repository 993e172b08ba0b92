"""Time to first token by stage, decoding speed and memory of one model.

The clock runs from the image's bytes to the first token: decode, resize, encode, project, tokenize, prefill, first
token. The paper's narrower figure (encode + project + prefill) is printed beside it. One answer before the first is
not counted; its time is shown, since it includes what MLX does once.

A released model, or one of its size with random weights (speed does not depend on the values):

  python -m mlx_fastvlm.benchmarks.ttft --model apple/FastVLM-0.5B --save
  python -m tests.reference.hub_checkpoint random-0.5b --config 0.5b      (from the repository root; or 1.5b, 7b)
  python -m mlx_fastvlm.benchmarks.ttft --model random-0.5b --repeat 5 --save ttft-0.5b

Peak memory is the whole process's, loading included; a checkpoint is converted beforehand, in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx.utils import tree_flatten

from mlx_fastvlm.generate import GenerationResponse, stream_generate
from mlx_fastvlm.loading import DTYPES, load

from .child import code_command
from .command import DEFAULT_PROMPT, BenchmarkError, add_picture, at_least_one, make_parser, progress, run
from .machine import matmul_gflops, peak_rss
from .picture import picture_file
from .report import Summary, format_table

STAGES = ("decode", "resize", "encode", "project", "tokenize", "prefill", "first_token")
PAPER_STAGES = ("encode", "project", "prefill")
_RESOLVE = """
import json, sys
from mlx_fastvlm.errors import FastVLMError
from mlx_fastvlm.loading import resolve_model
try:
    print(json.dumps(str(resolve_model(sys.argv[1]))))
except FastVLMError as error:
    sys.exit(" ".join(str(error).split()))
"""


def measure(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """See the top of this file."""
    with picture_file(args.image) as picture:
        image_bytes = picture.read_bytes()
    progress(f"Preparing {args.model}.")
    folder = resolve_aside(args.model)
    model, processor = load(folder, dtype=args.dtype)
    loaded_rss = peak_rss()
    weights = [array for _, array in tree_flatten(model.parameters())]
    weight_bytes = sum(array.nbytes for array in weights)

    responses = []
    for turn in range(args.repeat + 1):
        *_, last = stream_generate(model, processor, args.prompt, image=image_bytes, max_tokens=args.max_tokens)
        check_answer(last)
        progress(f"{'not counted' if turn == 0 else f'{turn}/{args.repeat}'}: {last.ttft * 1e3:,.0f} ms")
        responses.append(last)
    once, *counted = responses

    times = stage_summaries(counted)
    rows = [[name, *summary.cells(1e3)] for name, summary in times.items()]
    rows.append(["first answer of the process", f"{once.ttft * 1e3:,.1f}", ""])
    rates = Summary.of([response.generation_tps for response in counted])
    peak = peak_rss()
    label = f"{Path(args.model).name}, {args.dtype or str(model.dtype).removeprefix('mlx.core.')}"
    table = format_table([f"{label}: ms", "median", "min-max"], rows)
    table += (
        f"\nPrompt {once.prompt_tokens} tokens. Decoding {rates.median:,.1f} tok/s "
        f"({rates.low:,.1f}-{rates.high:,.1f}) over {counted[-1].generation_tokens} tokens."
        f"\nPeak memory {peak / 1e9:.2f} GB ({loaded_rss / 1e9:.2f} after loading), "
        f"{peak / weight_bytes:.2f} times the weights' {weight_bytes / 1e9:.2f} GB."
    )
    return table, {
        "model": Path(args.model).name,
        "dtype": str(model.dtype).removeprefix("mlx.core."),
        "matmul_gflops": matmul_gflops(),
        "prompt_tokens": once.prompt_tokens,
        "generation_tokens": counted[-1].generation_tokens,
        "times_s": {name: summary.to_dict() for name, summary in times.items()},
        "first_answer_ttft_s": once.ttft,
        "decode_tps": rates.to_dict(),
        "weight_bytes": weight_bytes,
        "peak_rss_bytes": peak,
        "loaded_rss_bytes": loaded_rss,
    }


def resolve_aside(model: str) -> Path:
    """`resolve_model` in a process of its own, so that a conversion's memory is not taken for the runtime's.

    Raises:
        BenchmarkError: it fails; its own message is repeated.
    """
    done = subprocess.run(code_command(_RESOLVE, model), capture_output=True, text=True)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        raise BenchmarkError(lines[-1] if lines else f"Preparing {model} failed: exit code {done.returncode}")
    return Path(json.loads(done.stdout.splitlines()[-1]))


def check_answer(response: GenerationResponse) -> None:
    """Refuse to time an answer that did not look at the image anew.

    Raises:
        BenchmarkError: a stage is missing.
    """
    missing = [stage for stage in STAGES if stage not in response.timings]
    if missing:
        raise BenchmarkError(f"The answer has no time for {', '.join(missing)}: something was reused.")


def stage_summaries(responses: Sequence[GenerationResponse]) -> dict[str, Summary]:
    """Seconds by stage, in order, then the total and the paper's narrower figure."""
    times = {stage: Summary.of([response.timings[stage] for response in responses]) for stage in STAGES}
    times["ttft"] = Summary.of([response.ttft for response in responses])
    times["encode + project + prefill"] = Summary.of(
        [sum(response.timings[stage] for stage in PAPER_STAGES) for response in responses]
    )
    return times


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser("ttft", __doc__)
    parser.add_argument("--model", default="demo", help='"demo" (default), a model or checkpoint folder, or a hub id')
    add_picture(parser)
    parser.add_argument("--prompt", default=DEFAULT_PROMPT, help=f'the question ("{DEFAULT_PROMPT}")')
    parser.add_argument("--dtype", choices=DTYPES, help="type to compute in (default: the runtime's choice)")
    parser.add_argument("--max-tokens", metavar="N", type=at_least_one, default=32, help="length of the answer (32)")
    parser.add_argument("--repeat", metavar="N", type=at_least_one, default=5, help="counted answers (5)")
    run("ttft", parser, measure, argv)


if __name__ == "__main__":
    main()
