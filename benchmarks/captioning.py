"""Captioning: pictures per second of `caption_images`, beside a loop over `generate` and beside mlx-vlm.

The same folder of generated pictures for all: colored shapes in many sizes, whose captions differ in length. Timed from
the first file to the last caption, files in the system's cache.

  ours              `caption_images`: read ahead in threads, encoded in batches, decoded together
  ours-loop         a loop over `generate`, in a process that does nothing else: what a user has who writes one
  ours-loop-loaded  the same loop in a process that captioned a batch before: on a Linux CPU that loads compiled loops
                    that a small model does without (elsewhere there is no difference)
  mlx-vlm           a loop over its generate
  mlx-vlm-batch     its batch_generate, in batches of the same size; it takes FastVLM where all prompts are equally long

All in one type, greedily, each in a process of its own, in turns; ratios are taken within a round. One round before the
first is not counted; it stands in the column "first" (of mlx-vlm on a CPU, which is asked --slow-repeat times only, the
first round is counted). mlx-vlm gets the same weights, exported for it; for the demo, whose vision tower is smaller
than the released ones', its constants for the tower's sizes are set, since no file can name them.

  mlx-fastvlm bench captioning
  mlx-fastvlm bench captioning --images 128 --peers mlx-vlm mlx-vlm-batch --peer-python VENV/bin/python
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from .caption_pictures import write_pictures
from .command import DEFAULT_PROMPT, BenchmarkError, at_least_one, make_parser, progress, run
from .exported_peers import add_options, start_all
from .machine import computes_on_cpu
from .peer_folders import work_folder
from .peers import OURS, ask_in_turns, paired_ratios
from .report import Summary, format_table, plain
from .ttft import resolve_aside

LIMIT = 3.0  # times the loop
LOOP, LOADED_LOOP = "ours-loop", "ours-loop-loaded"
PEERS = ("mlx-vlm", "mlx-vlm-batch")


def measure(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """See the top of this file."""
    skipped: dict[str, str] = {}
    progress(f"Preparing {args.model}.")
    model = resolve_aside(args.model)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mlx-fastvlm-")))
        images = [str(path) for path in write_pictures(folder, args.images)]
        work = stack.enter_context(work_folder(args.work))
        runners = start_all("captioning", (OURS, LOOP, LOADED_LOOP), model, work, stack, args, skipped)
        request = {
            "images": images,
            "prompt": args.prompt,
            "max_tokens": args.max_tokens,
            "batch_size": args.batch_size,
        }
        limits = dict.fromkeys(PEERS, args.slow_repeat) if computes_on_cpu(args.device) else {}
        rounds = ask_in_turns(runners, request, args.repeat, limits, skipped, tell_rate)
    results = {name: summarize(name, runner.ready, rounds) for name, runner in runners.items() if name not in skipped}
    texts = compare(results)
    name = Path(args.model).name
    return _report(f"{name}, {args.dtype}: pictures/s", results, texts, skipped), {
        "model": name,
        "dtype": args.dtype,
        "device": args.device,
        "images": args.images,
        "batch_size": args.batch_size,
        "prompt": args.prompt,
        "max_tokens": args.max_tokens,
        "blas": args.blas,
        "limit": LIMIT,
        "within_limit": is_within_limit(results),
        "captions": texts,
        "skipped": skipped,
        "runners": plain(results),
    }


def tell_rate(name: str, answer: Mapping[str, Any]) -> str:
    """For a line of progress. Raises BenchmarkError: a picture has no caption."""
    if any(text is None for text in answer["texts"]):
        raise BenchmarkError(f"{name} could not caption {answer['texts'].count(None)} of the pictures.")
    return f"{len(answer['texts']) / answer['seconds']:.1f} pictures/s"


def summarize(name: str, ready: Mapping[str, Any], rounds: Sequence[Mapping[str, dict[str, Any]]]) -> dict[str, Any]:
    """What one side did in the counted rounds it took part in.

    Args:
        name: the side's.
        ready: what its runner said when it was loaded.
        rounds: as `peers.ask_in_turns` returns them.

    Raises:
        BenchmarkError: it is greedy, yet two of its captions of one picture differ.
    """
    counted = [answers[name] for answers in rounds[1:] if name in answers]
    if any(answer["texts"] != counted[0]["texts"] for answer in counted):
        raise BenchmarkError(f"{name} gave different captions to the same pictures.")
    return {
        "images_per_s": Summary.of([_rate(answer) for answer in counted]),
        "cpu_s_per_image": Summary.of([answer["cpu_seconds"] / len(answer["texts"]) for answer in counted]),
        "first_images_per_s": _rate(next(answers[name] for answers in rounds if name in answers)),
        "peak_rss_bytes": counted[-1]["peak_rss"],
        "device_peak_bytes": counted[-1]["device_peak"],
        "texts": counted[0]["texts"],
        **{key: value for key, value in ready.items() if key != "ready"},
    }


def compare(results: Mapping[str, dict[str, Any]]) -> list[str]:
    """Add to every side's summary how it stands to ours, round by round, and to the loop's captions; returns those."""
    expected = results[LOOP]["texts"]
    for result in results.values():
        result["ours_over"] = paired_ratios(results[OURS]["images_per_s"], result["images_per_s"])
        texts = result.pop("texts")
        result["same_as_loop"] = sum(text == other for text, other in zip(texts, expected, strict=True))
        result["all_as_loop"] = texts == expected
    results[LOADED_LOOP]["first_images_per_s"] = None  # that was the batch
    return expected


def is_within_limit(results: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether `caption_images` is as much faster than the loop as it is to be, and captions the same."""
    return results[LOOP]["ours_over"].median >= LIMIT and results[OURS]["all_as_loop"]


def _rate(answer: Mapping[str, Any]) -> float:
    return len(answer["texts"]) / answer["seconds"]


def _report(
    title: str,
    results: Mapping[str, Mapping[str, Any]],
    texts: Sequence[str],
    skipped: Mapping[str, str],
) -> str:
    header = [
        title,
        "median",
        "min-max",
        "ours over it",
        "min-max",
        "first",
        "cpu ms each",
        "peak GB",
        "captions as the loop",
    ]
    text = format_table(header, [_row(name, result, len(texts)) for name, result in results.items()])
    lengths = sorted(len(caption.split()) for caption in texts)
    text += f"\n{len(texts)} pictures; captions of {lengths[0]} to {lengths[-1]} words, such as: {texts[0]}"
    word = "within" if is_within_limit(results) else "NOT within"
    text += f"\nOurs is {word} the limit: {results[LOOP]['ours_over'].median:.2f} times the loop, {LIMIT:.0f} asked."
    return text + "".join(f"\nSkipped {name}: {reason}" for name, reason in skipped.items())


def _row(name: str, result: Mapping[str, Any], images: int) -> list[str]:
    return [
        name,
        *result["images_per_s"].cells(digits=2),
        *result["ours_over"].cells(digits=2),
        f"{result['first_images_per_s']:.2f}" if result["first_images_per_s"] else "",
        result["cpu_s_per_image"].cells(1e3)[0],
        f"{result['peak_rss_bytes'] / 1e9:.2f}",
        f"all {images}" if result["all_as_loop"] else f"{result['same_as_loop']} of {images}",
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser("captioning", __doc__)
    add_options(parser, PEERS, default=PEERS)
    parser.add_argument("--images", metavar="N", type=at_least_one, default=64, help="pictures (64)")
    parser.add_argument(
        "--batch-size", metavar="N", type=at_least_one, default=16, help="as caption_images has it (16)"
    )
    parser.add_argument("--prompt", default=DEFAULT_PROMPT, help=f'what is asked about each ("{DEFAULT_PROMPT}")')
    parser.add_argument("--max-tokens", metavar="N", type=at_least_one, default=64, help="longest caption (64)")
    run("captioning", parser, measure, argv)


if __name__ == "__main__":
    main()
