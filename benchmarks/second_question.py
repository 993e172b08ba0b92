"""Second question: what another question about the same picture costs, beside the first one and beside mlx-vlm.

Three questions a round: the first one about a picture in a new conversation, a second one in the same conversation, and
that second one as the first of a fresh conversation about the same picture. Each is timed from the call, before the
picture's file is opened, to the first token. Before a round everything that earlier answers left is forgotten.

Beside the times stand how often the vision encoder ran, counted in the process that answers, how many of the prompt's
positions were taken from earlier answers, and whether the answer is the one that a fresh start gives: the same tokens,
and how far the first token's scores differ at most, over the largest of them.

  ours             `Conversation`
  mlx-vlm          as its own chat command asks: stream_generate with its vision cache and its prompt cache
  mlx-vlm-marked   the same with the picture marked in the first question, as FastVLM was trained and as its messages
                   allow; its chat moves the picture into the last question, behind all that was said before

All in one type, greedily, each in a process of its own, in turns; ratios are taken within a round. One round before the
first is not counted. mlx-vlm gets the same weights, exported for it. On a CPU it takes minutes for a round of a
released size, and is asked in the first --slow-repeat counted rounds only, without a warm-up.

A checkpoint with random weights and a made-up tokenizer needs many tokens for a word, and reads an answer back as other
tokens than were drawn; with --words each word is a token of ours, as in the released models.

  mlx-fastvlm bench second-question
  mlx-fastvlm bench second-question apple/FastVLM-0.5B --peers mlx-vlm mlx-vlm-marked --peer-python VENV/bin/python
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from .command import DEFAULT_PROMPT, add_picture, at_least_one, make_parser, progress, run
from .exported_peers import add_options, start_all
from .machine import computes_on_cpu
from .peer_folders import work_folder
from .peers import OURS, ask_in_turns, paired_ratios
from .picture import picture_file
from .report import Summary, format_table, plain, ratios
from .second_question_runners import FIRST, FRESH, QUESTIONS, SECOND
from .ttft import resolve_aside

LIMIT = 0.15  # of the first question's time
PEERS = ("mlx-vlm", "mlx-vlm-marked")
DEFAULT_SECOND = "How many things are there, and which one is the largest?"


def measure(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """See the top of this file."""
    skipped: dict[str, str] = {}
    progress(f"Preparing {args.model}.")
    model = resolve_aside(args.model)
    with ExitStack() as stack:
        picture = stack.enter_context(picture_file(args.image))
        work = stack.enter_context(work_folder(args.work))
        runners = start_all("second-question", (OURS,), model, work, stack, args, skipped, words=args.words)
        request = {
            "image": str(picture.resolve()),
            "first": args.prompt,
            "second": args.second,
            "max_tokens": args.max_tokens,
        }
        limits = dict.fromkeys(PEERS, args.slow_repeat) if computes_on_cpu(args.device) else {}
        rounds = ask_in_turns(runners, request, args.repeat, limits, skipped)
    results = {name: summarize(name, runner.ready, rounds) for name, runner in runners.items() if name not in skipped}
    for result in results.values():
        result["second_over_ours"] = paired_ratios(result["ttft_s"][SECOND], results[OURS]["ttft_s"][SECOND])
    name = Path(args.model).name
    return _report(f"{name}, {args.dtype}: ttft ms", results, skipped), {
        "model": name,
        "dtype": args.dtype,
        "device": args.device,
        "image": None if args.image is None else args.image.name,
        "questions": [args.prompt, args.second],
        "max_tokens": args.max_tokens,
        "words": args.words,
        "blas": args.blas,
        "limit": LIMIT,
        "within_limit": is_within_limit(results[OURS]),
        "skipped": skipped,
        "runners": plain(results),
    }


def summarize(name: str, ready: Mapping[str, Any], rounds: Sequence[Mapping[str, dict[str, Any]]]) -> dict[str, Any]:
    """What one side did in the counted rounds it took part in; what is no time is of the last of them.

    Args:
        name: the side's.
        ready: what its runner said when it was loaded.
        rounds: as `peers.ask_in_turns` returns them.
    """
    counted = [answers[name] for answers in rounds[1:] if name in answers]
    asked = {question: [answer["questions"][question] for answer in counted] for question in QUESTIONS}
    times = {question: Summary.of([answer["ttft"] for answer in asked[question]]) for question in QUESTIONS}
    last = {question: answers[-1] for question, answers in asked.items()}
    first_of_all = next(answers[name] for answers in rounds if name in answers)["questions"]
    return {
        "ttft_s": times,
        "ttft_cpu_s": {
            question: Summary.of([answer["ttft_cpu"] for answer in asked[question]]) for question in QUESTIONS
        },
        "over_first": {question: ratios(times[question], times[FIRST]) for question in (SECOND, FRESH)},
        "stages_s": {question: _stages(asked[question]) for question in QUESTIONS},
        **{
            key: {question: last[question][key] for question in QUESTIONS}
            for key in ("encoder_runs", "prompt_tokens", "cached_tokens", "tokens")
        },
        "from_scratch": {question: first_of_all[question]["scratch"] for question in (SECOND, FRESH)},
        "peak_rss_bytes": counted[-1]["peak_rss"],
        "device_peak_bytes": counted[-1]["device_peak"],
        **{key: value for key, value in ready.items() if key != "ready"},
    }


def is_within_limit(ours: Mapping[str, Any]) -> bool:
    """Whether a second question keeps to the limit, without the encoder, and is answered as from scratch."""
    return (
        ours["over_first"][SECOND].median <= LIMIT
        and ours["encoder_runs"][SECOND] == 0
        and ours["from_scratch"][SECOND]["same_tokens"]
    )


def _stages(answers: Sequence[Mapping[str, Any]]) -> dict[str, Summary] | None:
    """Seconds by stage; None where the library does not tell them."""
    if answers[0]["timings"] is None:
        return None
    return {stage: Summary.of([answer["timings"][stage] for answer in answers]) for stage in answers[0]["timings"]}


def _report(title: str, results: Mapping[str, dict[str, Any]], skipped: Mapping[str, str]) -> str:
    header = [title, "first", "second", "of first", "fresh", "of first", "encoder", "cached", "as scratch", "peak GB"]
    text = format_table(header, [_row(name, result) for name, result in results.items()])
    text += (
        "\nfresh: the second question in a new conversation about the same picture. encoder: its runs for the three "
        "\nquestions. cached: positions of the second one's prompt that were known, of all. as scratch: second, fresh."
    )
    text += "\n\n" + _stage_table(results[OURS]["stages_s"])
    for name, result in results.items():
        for question in (SECOND, FRESH):
            text += f"\n{name}, {question}: {_sentence(result['from_scratch'][question])}"
    ours = results[OURS]
    word = "within" if is_within_limit(ours) else "NOT within"
    text += f"\nOurs is {word} the limit: {ours['over_first'][SECOND].median:.1%} of the first, {LIMIT:.0%} allowed."
    return text + "".join(f"\nSkipped {name}: {reason}" for name, reason in skipped.items())


def _row(name: str, result: Mapping[str, Any]) -> list[str]:
    times, shares = result["ttft_s"], result["over_first"]
    same = [result["from_scratch"][question]["same_tokens"] for question in (SECOND, FRESH)]
    return [
        name,
        times[FIRST].cells(1e3)[0],
        times[SECOND].cells(1e3)[0],
        f"{shares[SECOND].median:.1%}",
        times[FRESH].cells(1e3)[0],
        f"{shares[FRESH].median:.1%}",
        " ".join(str(result["encoder_runs"][question]) for question in QUESTIONS),
        f"{result['cached_tokens'][SECOND]} of {result['prompt_tokens'][SECOND]}",
        " ".join("yes" if equal else "NO" for equal in same),
        f"{result['peak_rss_bytes'] / 1e9:.2f}",
    ]


def _stage_table(stages: Mapping[str, Mapping[str, Summary]]) -> str:
    """Ours by stage: a stage that a question did not need is a dash."""
    names = list(dict.fromkeys(stage for question in QUESTIONS for stage in stages[question]))
    rows = [[f"ours, {question}", *(_cell(stages[question].get(stage)) for stage in names)] for question in QUESTIONS]
    return format_table(["ms by stage", *(name.replace("_", " ") for name in names)], rows)


def _cell(seconds: Summary | None) -> str:
    return "-" if seconds is None else seconds.cells(1e3)[0]


def _sentence(comparison: Mapping[str, Any]) -> str:
    same = "the answer of a fresh start" if comparison["same_tokens"] else "NOT the answer of a fresh start"
    return f"{same}; first token's scores differ by {comparison['scores_differ_by']:.1e} of the largest."


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser("second_question", __doc__)
    add_options(parser, PEERS, default=PEERS[:1])
    add_picture(parser)
    parser.add_argument("--prompt", default=DEFAULT_PROMPT, help=f'the first question ("{DEFAULT_PROMPT}")')
    parser.add_argument("--second", default=DEFAULT_SECOND, help=f'the second one ("{DEFAULT_SECOND}")')
    parser.add_argument(
        "--words", action="store_true", help="each word a token, in ours: for random weights without a tokenizer"
    )
    parser.add_argument("--max-tokens", metavar="N", type=at_least_one, default=16, help="length of the answers (16)")
    run("second_question", parser, measure, argv)


if __name__ == "__main__":
    main()
