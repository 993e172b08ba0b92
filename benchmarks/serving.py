"""Serving: what the server adds to the library's time to first token, and what many clients get together.

A real server in a process of its own, asked over HTTP on this machine; every picture is a new one.

  ttft   the same question through HTTP and through `stream_generate` in this process, in turns: from a picture's bytes
         to the first words as the caller sees them. Of small scenes (PNG) and of a camera's frames (1280x960, JPEG).
         On a CPU both have the compiled loops loaded, which a small model does without in a short process
  load   one client that asks one question after the other, then many at once, in turns, through the same server
  fair   of many clients that ask equally much: how many answers each has when half of all are there. And clients that
         ask now and then: how long they wait alone, and beside one that has sent many requests at once
  rss    the server's memory after each round, and how much of it is kept for later requests by intent

One round before the first is not counted.

  mlx-fastvlm bench serving
  mlx-fastvlm bench serving ./converted --dtype bfloat16 --clients 8 --requests 2
"""

from __future__ import annotations

import argparse
import io
import itertools
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from mlx_fastvlm import load, stream_generate
from mlx_fastvlm.kernels import cpu

from .caption_pictures import draw_scene
from .command import DEFAULT_PROMPT, BenchmarkError, at_least_one, make_parser, progress, run
from .machine import computes_on_cpu
from .picture import HEIGHT, WIDTH, draw, png_bytes
from .report import Summary, format_table, plain, ratios
from .serving_client import ServedAnswer, ServedModel, serve
from .ttft import resolve_aside

LIMIT_S = 0.015  # that the server may add to the time to first token
SCENE, FRAME = "scene", "frame"
_PAUSE_SECONDS = 0.1  # threads of a mathematics library spin for a moment after their work
_MODEST_CLIENTS = 4  # that ask now and then, beside a greedy one


@dataclass(frozen=True)
class Picture:
    """A picture file in memory, and its media type."""

    data: bytes
    kind: str


def scenes() -> Iterator[Picture]:
    """Small pictures, no two alike."""
    for number in itertools.count():
        yield Picture(png_bytes(draw_scene(number)), "image/png")


def frames() -> Iterator[Picture]:
    """Pictures as a camera gives them, no two alike."""
    pixels = draw(WIDTH, HEIGHT)
    for number in itertools.count():
        file = io.BytesIO()
        Image.fromarray(pixels[:, (number * 16) % WIDTH :]).resize((WIDTH, HEIGHT)).save(file, "JPEG", quality=90)
        yield Picture(file.getvalue(), "image/jpeg")


class Asker:
    """Asks the same question about ever new pictures.

    Args:
        server: that is asked.
        question, max_tokens: of every request.
    """

    def __init__(self, server: ServedModel, question: str, max_tokens: int):
        self.server, self.question, self.max_tokens = server, question, max_tokens
        self.scenes = scenes()

    def new_scenes(self, count: int) -> list[Picture]:
        """So many pictures that were not shown yet."""
        return list(itertools.islice(self.scenes, count))

    def in_turn(self, name: str, pictures: Sequence[Picture]) -> list[ServedAnswer]:
        """Answers of one client that asks about one picture after the other."""
        return [self.ask(name, picture) for picture in pictures]

    def ask(self, name: str, picture: Picture) -> ServedAnswer:
        """The answer that a client gets about a picture. Raises BenchmarkError if there is none."""
        return self.server.ask(name, picture.data, picture.kind, self.question, self.max_tokens)

    def at_once(self, work: Mapping[str, Sequence[Picture]]) -> dict[str, list[ServedAnswer]]:
        """Answers of many clients, each of which asks about its pictures in turn. Raises BenchmarkError if one fails."""
        with ThreadPoolExecutor(len(work)) as pool:
            asked = {name: pool.submit(self.in_turn, name, pictures) for name, pictures in work.items()}
            return {name: answers.result() for name, answers in asked.items()}


def measure(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """See the top of this file."""
    progress(f"Preparing {args.model}.")
    folder = resolve_aside(args.model)
    with serve(str(folder), args.dtype) as server:
        asker = Asker(server, args.prompt, args.max_tokens)
        ttft = measure_ttft(asker, folder, args.dtype, args.ttft_repeat)
        load_result = measure_load(asker, args.clients, args.requests, args.repeat)
        greed = measure_greed(asker, args.greedy, args.repeat)
    result = {
        "model": Path(args.model).name,
        "dtype": args.dtype,
        "prompt": args.prompt,
        "max_tokens": args.max_tokens,
        "limit_s": LIMIT_S,
        "within_limit": is_within_limit(ttft),
        "ttft": ttft,
        "load": load_result,
        "greed": greed,
    }
    return _report(result), plain(result)


def measure_ttft(asker: Asker, folder: Path, dtype: str, repeat: int) -> dict[str, Any]:
    """Seconds to the first words, by kind of picture: through HTTP, in this process, and the one less the other."""
    model, processor = load(folder, dtype=dtype)
    if computes_on_cpu("auto"):
        cpu.warm_up(quantized=model.config.quantization is not None)  # as the server does

    def in_process(picture: Picture) -> float:
        start = time.perf_counter()
        answer = stream_generate(model, processor, asker.question, picture.data, max_tokens=asker.max_tokens)
        for response in answer:
            if response.text:
                return time.perf_counter() - start
        raise BenchmarkError("The model says nothing; ask for more tokens.")

    results = {}
    for name, pictures in ((SCENE, asker.scenes), (FRAME, frames())):
        pairs, stages = [], []
        for round_number in range(repeat + 1):
            picture = next(pictures)
            time.sleep(_PAUSE_SECONDS)
            library = in_process(picture)
            time.sleep(_PAUSE_SECONDS)
            answer = asker.ask("ttft", picture)
            if round_number:  # the first one loads what is loaded late
                pairs.append((answer.ttft, library))
                stages.append(answer.stages)
        server, library = (Summary.of(times) for times in zip(*pairs, strict=True))
        results[name] = {
            "server_s": server,
            "library_s": library,
            "overhead_s": Summary.of([one - other for one, other in pairs]),
            "server_stages_s": {stage: Summary.of([each.get(stage, 0.0) for each in stages]) for stage in stages[0]},
        }
        progress(f"ttft, {name}: {results[name]['overhead_s'].median * 1e3:.1f} ms more than the library")
    return results


def is_within_limit(ttft: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether the server adds as little as it is to, with small pictures and large ones."""
    return all(result["overhead_s"].median < LIMIT_S for result in ttft.values())


def measure_load(asker: Asker, clients: int, requests: int, repeat: int) -> dict[str, Any]:
    """Rates of one client that asks one by one, and of many at once; the server's memory after each round."""
    rounds = []
    for _ in range(repeat + 1):
        alone = asker.at_once({"one": asker.new_scenes(clients)})
        together = asker.at_once({f"client-{number}": asker.new_scenes(requests) for number in range(clients)})
        figures = asker.server.figures()
        kept = figures["kept_image_bytes"] + figures["kept_prefix_bytes"]
        one, many = Rates.of(alone), Rates.of(together)
        progress(f"load: {one.tokens_per_s:.0f} tokens/s one by one, {many.tokens_per_s:.0f} together")
        rounds.append((one, many, {"rss": asker.server.rss(), "kept": kept}))
    counted = rounds[1:]
    one, many = ([each[side] for each in counted] for side in (0, 1))
    return {
        "clients": clients,
        "requests_a_client": requests,
        "one_by_one": _summaries(one),
        "together": _summaries(many),
        "tokens_over_one_by_one": Summary.of([b.tokens_per_s / a.tokens_per_s for a, b in zip(one, many, strict=True)]),
        "answers_at_half": [min(each.answers_at_half[0] for each in many), max(e.answers_at_half[1] for e in many)],
        "memory_bytes": [each[2] for each in rounds],
    }


@dataclass(frozen=True)
class Rates:
    """What the clients of one round got.

    Attributes:
        tokens_per_s, requests_per_s: from the first request's start to the last one's end.
        ttfts: seconds to the first words, in ascending order.
        answers_at_half: the fewest and the most answers that a client has when half of all are there.
    """

    tokens_per_s: float
    requests_per_s: float
    ttfts: list[float]
    answers_at_half: tuple[int, int]

    @classmethod
    def of(cls, answers: Mapping[str, Sequence[ServedAnswer]]) -> Rates:
        """From the answers by client."""
        every = [answer for mine in answers.values() for answer in mine]
        seconds = max(answer.end for answer in every) - min(answer.start for answer in every)
        half = sorted(answer.end for answer in every)[(len(every) - 1) // 2]
        counts = [sum(answer.end <= half for answer in mine) for mine in answers.values()]
        return cls(
            sum(answer.tokens for answer in every) / seconds,
            len(every) / seconds,
            sorted(answer.ttft for answer in every),
            (min(counts), max(counts)),
        )


def _summaries(rounds: Sequence[Rates]) -> dict[str, Summary]:
    return {
        "tokens_per_s": Summary.of([each.tokens_per_s for each in rounds]),
        "requests_per_s": Summary.of([each.requests_per_s for each in rounds]),
        "ttft_median_s": Summary.of([statistics.median(each.ttfts) for each in rounds]),
        "ttft_p95_s": Summary.of([each.ttfts[-(-len(each.ttfts) * 95 // 100) - 1] for each in rounds]),
    }


def measure_greed(asker: Asker, greedy: int, repeat: int) -> dict[str, Any]:
    """Seconds to an answer for clients that ask now and then: alone, and beside one that sends many requests at once."""
    rounds = []
    for _ in range(repeat + 1):
        alone = asker.at_once(_modest_work(asker))
        with ThreadPoolExecutor(greedy) as pool:
            sent = [pool.submit(asker.in_turn, "greedy", asker.new_scenes(1)) for _ in range(greedy)]
            beside = asker.at_once(_modest_work(asker))
            ends = [future.result()[0].end for future in sent]
        mine = [answer for answers in beside.values() for answer in answers]
        rounds.append(
            (
                _median_seconds(alone),
                _median_seconds(beside),
                statistics.median(sum(one.start < end < one.end for end in ends) for one in mine),
            )
        )
        progress(f"greed: {rounds[-1][0] * 1e3:.0f} ms an answer alone, {rounds[-1][1] * 1e3:.0f} ms beside the greedy")
    alone, beside, between = (Summary.of(figures) for figures in zip(*rounds[1:], strict=True))
    return {
        "greedy_requests": greedy,
        "modest_clients": _MODEST_CLIENTS,
        "alone_s": alone,
        "beside_s": beside,
        "beside_over_alone": ratios(beside, alone),
        "greedy_answers_meanwhile": between,
    }


def _modest_work(asker: Asker) -> dict[str, list[Picture]]:
    return {f"modest-{number}": asker.new_scenes(2) for number in range(_MODEST_CLIENTS)}


def _median_seconds(answers: Mapping[str, Sequence[ServedAnswer]]) -> float:
    return statistics.median(answer.end - answer.start for mine in answers.values() for answer in mine)


def _report(result: Mapping[str, Any]) -> str:
    tables = [_ttft_table(result), _load_table(result["load"])]
    greed, load_result = result["greed"], result["load"]
    fewest, most = load_result["answers_at_half"]
    first, last = load_result["memory_bytes"][0], load_result["memory_bytes"][-1]
    word = "within" if result["within_limit"] else "NOT within"
    return "\n\n".join(tables) + (
        f"\nThe server is {word} the limit of {LIMIT_S * 1e3:.0f} ms over the library."
        f"\nTogether: {load_result['tokens_over_one_by_one'].cells(digits=2)[0]} times the tokens/s of one by one. "
        f"When half of the answers are there, a client has {fewest} to {most} of {load_result['requests_a_client']}."
        f"\nBeside one that sends {greed['greedy_requests']} requests at once, {greed['modest_clients']} modest clients "
        f"wait {greed['beside_s'].median * 1e3:.0f} ms for an answer, alone {greed['alone_s'].median * 1e3:.0f}; "
        f"{greed['greedy_answers_meanwhile'].median:.0f} of the many are answered meanwhile."
        f"\nMemory after the first round {first['rss'] / 1e6:.0f} MB, after the last {last['rss'] / 1e6:.0f}; "
        f"kept for later requests {first['kept'] / 1e6:.0f} and {last['kept'] / 1e6:.0f}."
    )


def _ttft_table(result: Mapping[str, Any]) -> str:
    header = [
        f"{result['model']}, {result['dtype']}: ttft ms",
        "server",
        "min-max",
        "library",
        "min-max",
        "more",
        "min-max",
    ]
    sides = ("server_s", "library_s", "overhead_s")
    return format_table(
        header,
        [[name, *(cell for side in sides for cell in row[side].cells(1e3))] for name, row in result["ttft"].items()],
    )


def _load_table(load_result: Mapping[str, Any]) -> str:
    header = ["load", "tokens/s", "min-max", "requests/s", "min-max", "ttft ms", "min-max", "95 of 100", "min-max"]
    rows = [("one by one", "one_by_one"), (f"{load_result['clients']} clients", "together")]
    columns = (("tokens_per_s", 1), ("requests_per_s", 1), ("ttft_median_s", 1e3), ("ttft_p95_s", 1e3))
    return format_table(
        header,
        [
            [title, *(cell for column, scale in columns for cell in load_result[side][column].cells(scale))]
            for title, side in rows
        ],
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser("serving", __doc__)
    parser.add_argument(
        "model", metavar="MODEL", nargs="?", default="demo", help='"demo" (default), a folder or a hub id'
    )
    parser.add_argument("--dtype", default="float32", help="type to compute in (float32)")
    parser.add_argument("--prompt", default=DEFAULT_PROMPT, help=f'what is asked about each ("{DEFAULT_PROMPT}")')
    parser.add_argument("--max-tokens", metavar="N", type=at_least_one, default=64, help="longest answer (64)")
    parser.add_argument("--ttft-repeat", metavar="N", type=at_least_one, default=25, help="pairs of each kind (25)")
    parser.add_argument("--clients", metavar="N", type=at_least_one, default=32, help="that ask at once (32)")
    parser.add_argument("--requests", metavar="N", type=at_least_one, default=4, help="of each client in a round (4)")
    parser.add_argument(
        "--greedy", metavar="N", type=at_least_one, default=60, help="requests sent at once by one (60)"
    )
    parser.add_argument("--repeat", metavar="N", type=at_least_one, default=5, help="counted rounds (5)")
    run("serving", parser, measure, argv)


if __name__ == "__main__":
    main()
