"""Peers: the same weights, picture and question through this package, mlx-vlm and PyTorch, taken in turns.

Everything in float32 and greedy. Each implementation loads once in a process of its own and then answers when asked, so
that one round asks each of them once: drift of the machine meets all alike, and ratios are taken within a round. The
clock is the same for all: from the call, with the picture's file in the system's cache, to the first token. One round
before the first is not counted ("first" in the table). "cpu" is the processor time of all threads up to the first
token. An implementation that is not installed is skipped, with the reason.

  ours      this package on a converted copy
  mlx-vlm   its load and stream_generate, unpatched (pip install mlx-vlm; tried with 0.7.10)
  torch     timm's tower and transformers' Qwen2, from tests/reference: run from the repository root
            (pip install torch timm transformers)

On a Linux CPU both MLX programs get the same BLAS, this package's (--blas off: MLX's own for both, and no compiled
loops for ours). mlx-vlm takes about a minute of two cores there for one picture at full size: ask it few times.

  python -m tests.reference.hub_checkpoint random-0.5b --config 0.5b
  python -m mlx_fastvlm.benchmarks.peers random-0.5b --repeat 3 --save peers-0.5b
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from .command import DEFAULT_PROMPT, BenchmarkError, add_picture, at_least_one, make_parser, progress, run
from .peer_folders import make_mlx_vlm, make_ours
from .picture import picture_file
from .report import Summary, format_table, ratios
from .runner_process import RunnerProcess, Unavailable

PEERS = ("mlx-vlm", "torch")
_PAUSE_SECONDS = 0.5  # threads of a mathematics library spin for a moment after their work


def measure(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """See the top of this file."""
    if not args.checkpoint.is_dir():
        raise BenchmarkError(f"{args.checkpoint} is not a folder; give a checkpoint in the hub's layout.")
    pythons = {"ours": sys.executable, "mlx-vlm": args.peer_python, "torch": args.torch_python}
    skipped: dict[str, str] = {}
    with ExitStack() as stack:
        picture = stack.enter_context(picture_file(args.image))
        work = stack.enter_context(_work_folder(args.work))
        runners = {}
        for name in ("ours", *args.peers):
            progress(f"Loading {name}.")
            try:
                runner = RunnerProcess(name, prepare(name, args.checkpoint, work), pythons[name], args.blas)
            except Unavailable as error:
                if name == "ours":
                    raise BenchmarkError(str(error)) from None
                skipped[name] = str(error)
                progress(f"Skipping {name}: {error}")
            else:
                runners[name] = stack.enter_context(runner)
        rounds = ask_in_turns(runners, picture, args.prompt, args.max_tokens, args.repeat)
    results = {name: summarize(runner, [answers[name] for answers in rounds]) for name, runner in runners.items()}
    for result in results.values():
        result["ttft_over_ours"] = ratios(result["ttft_s"], results["ours"]["ttft_s"])
        result["same_tokens_as_ours"] = result["tokens"] == results["ours"]["tokens"]
        result["same_first_tokens"] = _common_start(result["tokens"], results["ours"]["tokens"])
    table = _table(f"{args.checkpoint.resolve().name}, float32: ttft ms", results)
    table += "".join(f"\nSkipped {name}: {reason}" for name, reason in skipped.items())
    return table, {
        "checkpoint": args.checkpoint.resolve().name,
        "max_tokens": args.max_tokens,
        "blas": args.blas,
        "skipped": skipped,
        "runners": {name: _plain(result) for name, result in results.items()},
    }


def prepare(name: str, checkpoint: Path, work: Path) -> Path:
    """The folder that one implementation reads; see peer_folders."""
    if name == "ours":
        return make_ours(checkpoint, work / f"{checkpoint.resolve().name}-ours")
    if name == "mlx-vlm":
        return make_mlx_vlm(checkpoint, work / f"{checkpoint.resolve().name}-mlx-vlm")
    return checkpoint


def ask_in_turns(
    runners: dict[str, RunnerProcess], picture: Path, prompt: str, max_tokens: int, repeat: int
) -> list[dict[str, dict[str, Any]]]:
    """`repeat` + 1 rounds of runner name → answer; the first round is the one that is not to be counted.

    Raises:
        BenchmarkError: an answer is empty, or a runner breaks.
    """
    rounds = []
    for turn in range(repeat + 1):
        answers = {}
        for name, runner in runners.items():
            time.sleep(_PAUSE_SECONDS)
            answers[name] = runner.ask(picture, prompt, max_tokens)
            if not answers[name]["tokens"]:
                raise BenchmarkError(f"{name} ended its answer before the first token; ask something else.")
        shown = ", ".join(f"{name} {answer['ttft'] * 1e3:,.0f} ms" for name, answer in answers.items())
        progress(f"{'not counted' if turn == 0 else f'{turn}/{repeat}'}: {shown}")
        rounds.append(answers)
    return rounds


def summarize(runner: RunnerProcess, answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What one runner did, over all rounds but the first.

    Raises:
        BenchmarkError: it is greedy, yet two of its answers differ.
    """
    once, *counted = answers
    if any(answer["tokens"] != once["tokens"] for answer in counted):
        raise BenchmarkError(f"{runner.name} gave different answers to the same question.")
    rates = [
        (len(answer["tokens"]) - 1) / (answer["seconds"] - answer["ttft"])
        for answer in counted
        if len(answer["tokens"]) > 1
    ]
    return {
        "start_s": runner.start_seconds,
        "first_ttft_s": once["ttft"],
        "ttft_s": Summary.of([answer["ttft"] for answer in counted]),
        "ttft_cpu_s": Summary.of([answer["ttft_cpu"] for answer in counted]),
        "decode_tps": Summary.of(rates) if rates else None,
        "peak_rss_bytes": counted[-1]["peak_rss"],
        "tokens": once["tokens"],
        **{key: value for key, value in runner.ready.items() if key != "ready"},
    }


def _table(title: str, results: dict[str, dict[str, Any]]) -> str:
    header = [
        title,
        "median",
        "min-max",
        "ours=1",
        "min-max",
        "cpu",
        "first",
        "start s",
        "tok/s",
        "peak GB",
        "tokens as ours",
    ]
    rows = []
    for name, result in results.items():
        same, count = result["same_first_tokens"], len(result["tokens"])
        rows.append(
            [
                name,
                *result["ttft_s"].cells(1e3),
                *result["ttft_over_ours"].cells(digits=2),
                f"{result['ttft_cpu_s'].median * 1e3:,.1f}",
                f"{result['first_ttft_s'] * 1e3:,.1f}",
                f"{result['start_s']:.1f}",
                f"{result['decode_tps'].median:.1f}" if result["decode_tps"] else "",
                f"{result['peak_rss_bytes'] / 1e9:.2f}",
                f"all {count}" if result["same_tokens_as_ours"] else f"first {same} of {count}",
            ]
        )
    return format_table(header, rows)


def _plain(result: dict[str, Any]) -> dict[str, Any]:
    return {key: value.to_dict() if isinstance(value, Summary) else value for key, value in result.items()}


def _common_start(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two answers share from the beginning."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


@contextmanager
def _work_folder(given: Path | None) -> Iterator[Path]:
    """Where the copies go: a folder that is kept, or one that is deleted at the end."""
    if given is not None:
        if not given.is_dir():
            raise BenchmarkError(f"{given} is not a folder; make it first.")
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="mlx-fastvlm-") as folder:
        yield Path(folder)


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser("peers", __doc__)
    parser.add_argument(
        "checkpoint", metavar="FOLDER", type=Path, help="checkpoint in the hub's layout, inference form"
    )
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=PEERS, help="whom to compare with (all)")
    parser.add_argument("--peer-python", metavar="PATH", default=sys.executable, help="has mlx-vlm and this package")
    parser.add_argument("--torch-python", metavar="PATH", default=sys.executable, help="has torch, timm, transformers")
    parser.add_argument("--blas", choices=("auto", "off"), default="auto", help="for both MLX programs (auto)")
    parser.add_argument("--work", metavar="FOLDER", type=Path, help="keep the float32 copies here for the next time")
    add_picture(parser)
    parser.add_argument("--prompt", default=DEFAULT_PROMPT, help=f'the question ("{DEFAULT_PROMPT}")')
    parser.add_argument("--max-tokens", metavar="N", type=at_least_one, default=16, help="length of the answers (16)")
    parser.add_argument("--repeat", metavar="N", type=at_least_one, default=5, help="counted rounds (5)")
    run("peers", parser, measure, argv)


if __name__ == "__main__":
    main()
