"""Peers: the same weights, picture and question through this package, mlx-vlm and PyTorch, taken in turns.

Everything in one type and greedy. Each implementation loads once in a process of its own and then answers when asked,
so that one round asks each of them once: drift of the machine meets all alike, and ratios are taken within a round. The
clock is the same for all: from the call, with the picture's file in the system's cache, to the first token. One round
before the first is not counted ("first" in the table). "cpu" is the processor time of all threads up to the first
token. A peer that is not installed, or breaks, is left out, with the reason.

  ours            this package on a converted copy
  mlx-vlm         its load and stream_generate, unpatched (pip install mlx-vlm; tried with 0.7.10)
  mlx-vlm-as-installed   the same, on a Linux CPU with the BLAS that MLX brings: what pip install gives its users
  torch           timm's tower and transformers' Qwen2, from tests/reference: run from the repository root
                  (pip install torch timm transformers)
  torch-bfloat16  the same in bfloat16, whatever --dtype is
  torch-compiled  the same through torch.compile

MLX computes on its default device and PyTorch on the same (cuda or mps beside MLX on a GPU), unless --device cpu. On a
Linux CPU ours and mlx-vlm get the same BLAS, this package's (--blas off: MLX's own for all, and no compiled loops for
ours), and only float32 is fast in MLX. There mlx-vlm takes about a minute of two cores for one picture at full size,
and as installed many: it is asked in the first --slow-repeat counted rounds only, and not in the uncounted one.

  python -m tests.reference.hub_checkpoint random-0.5b --config 0.5b
  mlx-fastvlm bench peers random-0.5b --repeat 3 --save peers-0.5b
  mlx-fastvlm bench peers random-0.5b --peers mlx-vlm mlx-vlm-as-installed torch --max-tokens 8
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from mlx_fastvlm.loading import DTYPES

from .command import DEFAULT_PROMPT, BenchmarkError, add_picture, at_least_one, make_parser, progress, run
from .machine import computes_on_cpu
from .peer_folders import make_mlx_vlm, make_ours, work_folder
from .picture import picture_file
from .report import Summary, as_factor, format_table, plain, ratios
from .runner_process import RunnerProcess, Unavailable
from .runners import RUNNERS

OURS = "ours"
PEERS = tuple(name for name in RUNNERS if name != OURS)
DEFAULT_PEERS = ("mlx-vlm", "torch")
SLOW = "mlx-vlm-as-installed"
_PAUSE_SECONDS = 0.5  # threads of a mathematics library spin for a moment after their work


def measure(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """See the top of this file."""
    if not args.checkpoint.is_dir():
        raise BenchmarkError(f"{args.checkpoint} is not a folder; give a checkpoint in the hub's layout.")
    skipped: dict[str, str] = {}
    with ExitStack() as stack:
        picture = stack.enter_context(picture_file(args.image))
        work = stack.enter_context(work_folder(args.work))
        runners = {}
        for name in (OURS, *args.peers):
            progress(f"Loading {name}.")
            try:
                runner = start(name, work, args)
            except (Unavailable, BenchmarkError) as error:
                if name == OURS:
                    raise BenchmarkError(str(error)) from None
                skipped[name] = str(error)
                progress(f"Skipping {name}: {error}")
            else:
                runners[name] = stack.enter_context(runner)
        request = {"image": str(picture.resolve()), "prompt": args.prompt, "max_tokens": args.max_tokens}
        limits = {SLOW: args.slow_repeat} if computes_on_cpu(args.device) else {}
        rounds = ask_in_turns(runners, request, args.repeat, limits, skipped)
    results = {name: summarize(name, runner, rounds) for name, runner in runners.items() if name not in skipped}
    for result in results.values():
        compare(result, results[OURS])
    name = args.checkpoint.resolve().name
    return _report(f"{name}, {args.dtype}: ttft ms", results, skipped), {
        "checkpoint": name,
        "dtype": args.dtype,
        "device": args.device,
        "image": None if args.image is None else args.image.name,
        "prompt": args.prompt,
        "max_tokens": args.max_tokens,
        "blas": args.blas,
        "skipped": skipped,
        "runners": plain(results),
    }


def start(name: str, work: Path, args: argparse.Namespace) -> RunnerProcess:
    """One implementation, loading.

    Raises:
        Unavailable: it is not installed.
    """
    folder = prepare(name, args.checkpoint, work, args.dtype)
    blas = "off" if name == SLOW else args.blas
    python = sys.executable
    if name.startswith("mlx-vlm"):
        python = args.peer_python
    elif name.startswith("torch"):
        python = args.torch_python
    options = {"folder": str(folder.resolve()), "dtype": args.dtype, "device": args.device, "blas": blas}
    return RunnerProcess(name, python, options)


def prepare(name: str, checkpoint: Path, work: Path, dtype: str) -> Path:
    """The folder that one implementation reads; see peer_folders."""
    copy = work / f"{checkpoint.resolve().name}-{dtype}"
    if name == OURS:
        return make_ours(checkpoint, copy.with_name(f"{copy.name}-ours"), dtype)
    if name.startswith("mlx-vlm"):
        return make_mlx_vlm(checkpoint, copy.with_name(f"{copy.name}-mlx-vlm"), dtype)
    return checkpoint


def ask_in_turns(
    runners: Mapping[str, RunnerProcess],
    request: Mapping[str, Any],
    repeat: int,
    limits: Mapping[str, int],
    broken: dict[str, str] | None = None,
    tell: Callable[[str, dict[str, Any]], str] | None = None,
) -> list[dict[str, dict[str, Any]]]:
    """`repeat` + 1 rounds of runner name → answer; the first round is the one that is not to be counted.

    Args:
        runners: asked in this order in every round.
        request: what `RunnerProcess.ask` takes.
        repeat: counted rounds.
        limits: runner name → how many counted rounds it takes part in, from the first on; not in the uncounted one.
        broken: filled with peers that break, name → reason; they are asked no more, and the others go on. Without it any
            break ends the benchmark, as does one of ours.
        tell: what to say of a runner's answer; BenchmarkError where it is of no use. None is `_first_token`.

    Raises:
        BenchmarkError: an answer is of no use, or a runner breaks.
    """
    tell = tell or _first_token
    rounds = []
    for turn in range(repeat + 1):
        answers = {}
        for name, runner in runners.items():
            if name in (broken or {}) or (name in limits and not 1 <= turn <= limits[name]):
                continue
            time.sleep(_PAUSE_SECONDS)
            try:
                answer = runner.ask(**request)
                told = tell(name, answer)
            except BenchmarkError as error:
                if broken is None or name.startswith(OURS):
                    raise
                broken[name] = str(error)
                progress(f"Going on without {name}: {error}")
                continue
            answers[name] = answer
            progress(f"{'not counted' if turn == 0 else f'{turn}/{repeat}'}: {name} {told}")
        rounds.append(answers)
    return rounds


def _first_token(name: str, answer: Mapping[str, Any]) -> str:
    if not answer["tokens"]:
        raise BenchmarkError(f"{name} ended its answer before the first token; ask something else.")
    return f"{answer['ttft'] * 1e3:,.0f} ms"


def summarize(name: str, runner: RunnerProcess, rounds: Sequence[Mapping[str, dict[str, Any]]]) -> dict[str, Any]:
    """What one runner did in the counted rounds that it took part in, the first ones.

    Raises:
        BenchmarkError: it is greedy, yet two of its answers differ.
    """
    counted = [answers[name] for answers in rounds[1:] if name in answers]
    answers = [answers[name] for answers in rounds if name in answers]
    if any(answer["tokens"] != answers[0]["tokens"] for answer in answers):
        raise BenchmarkError(f"{name} gave different answers to the same question.")
    rates = [
        (len(answer["tokens"]) - 1) / (answer["seconds"] - answer["ttft"])
        for answer in counted
        if len(answer["tokens"]) > 1
    ]
    return {
        "start_s": runner.start_seconds,
        "first_ttft_s": answers[0]["ttft"],
        "ttft_s": Summary.of([answer["ttft"] for answer in counted]),
        "ttft_cpu_s": Summary.of([answer["ttft_cpu"] for answer in counted]),
        "decode_tps": Summary.of(rates) if rates else None,
        "peak_rss_bytes": counted[-1]["peak_rss"],
        "device_peak_bytes": counted[-1]["device_peak"],
        "tokens": answers[0]["tokens"],
        **{key: value for key, value in runner.ready.items() if key != "ready"},
    }


def compare(result: dict[str, Any], ours: dict[str, Any]) -> None:
    """Add to a summary how it stands to ours, round by round: its time over ours, our rate over its, equal tokens."""
    result["ttft_over_ours"] = paired_ratios(result["ttft_s"], ours["ttft_s"])
    rates, our_rates = result["decode_tps"], ours["decode_tps"]
    result["our_decode_tps_over"] = paired_ratios(our_rates, rates) if rates and our_rates else None
    result["same_tokens_as_ours"] = result["tokens"] == ours["tokens"]
    result["same_first_tokens"] = _common_start(result["tokens"], ours["tokens"])


def paired_ratios(one: Summary, other: Summary) -> Summary:
    """Ratios over the first rounds, those that both took part in."""
    rounds = min(len(one.samples), len(other.samples))
    return ratios(Summary.of(one.samples[:rounds]), Summary.of(other.samples[:rounds]))


def _report(title: str, results: Mapping[str, dict[str, Any]], skipped: Mapping[str, str]) -> str:
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
    text = format_table(header, [_row(name, result) for name, result in results.items()])
    text += "".join(f"\n{_sentence(name, result)}" for name, result in results.items() if name != OURS)
    return text + "".join(f"\nSkipped {name}: {reason}" for name, reason in skipped.items())


def _row(name: str, result: dict[str, Any]) -> list[str]:
    same, count = result["same_first_tokens"], len(result["tokens"])
    return [
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


def _sentence(name: str, result: dict[str, Any]) -> str:
    """Ours against one peer in words, with the spread over the rounds."""
    text = f"Ours against {name}: time to first token {as_factor(result['ttft_over_ours'], 'less', 'more')}"
    if result["our_decode_tps_over"]:
        text += f"; decoding {as_factor(result['our_decode_tps_over'], 'faster', 'slower')}"
    rounds = len(result["ttft_s"].samples)
    return f"{text}; {rounds} round{'s' if rounds > 1 else ''}."


def _common_start(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two answers share from the beginning."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser("peers", __doc__)
    parser.add_argument(
        "checkpoint", metavar="FOLDER", type=Path, help="checkpoint in the hub's layout, inference form"
    )
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=DEFAULT_PEERS, help="whom (mlx-vlm torch)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="type that all compute in (float32)")
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto", help="MLX's default, or the CPU (auto)")
    parser.add_argument("--peer-python", metavar="PATH", default=sys.executable, help="has mlx-vlm and this package")
    parser.add_argument("--torch-python", metavar="PATH", default=sys.executable, help="has torch, timm, transformers")
    parser.add_argument("--blas", choices=("auto", "off"), default="auto", help="of ours and mlx-vlm (auto)")
    parser.add_argument("--work", metavar="FOLDER", type=Path, help="keep the copies here for the next time")
    add_picture(parser)
    parser.add_argument("--prompt", default=DEFAULT_PROMPT, help=f'the question ("{DEFAULT_PROMPT}")')
    parser.add_argument("--max-tokens", metavar="N", type=at_least_one, default=16, help="length of the answers (16)")
    parser.add_argument("--repeat", metavar="N", type=at_least_one, default=5, help="counted rounds (5)")
    parser.add_argument(
        "--slow-repeat", metavar="N", type=at_least_one, default=1, help=f"counted rounds of {SLOW} (1)"
    )
    run("peers", parser, measure, argv)


if __name__ == "__main__":
    main()
