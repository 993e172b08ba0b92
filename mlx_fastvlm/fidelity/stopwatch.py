"""Memory and speed of models, each taken in a process that holds nothing else; `timed_answer` is that process.

A fresh process for each round and model, one after the other in turns: peaks are the model's own, only one model is in
memory at a time, and drift of the machine meets all alike. (The peers benchmark keeps its processes and asks them
again; here the peak of loading counts too, and two large models might not fit side by side.)
"""

from __future__ import annotations

import json
import statistics
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mlx_fastvlm.benchmarks.child import module_command
from mlx_fastvlm.benchmarks.command import BenchmarkError
from mlx_fastvlm.fidelity.results import Measured, Speed

SPEED_TOKENS = 32  # every timed answer is this long: the end-of-answer token does not end it


def time_in_turns(
    folders: Mapping[str, Path],
    image: Path,
    prompt: str,
    dtype: str | None,
    rounds: int,
    on_progress: Callable[[str, int, int], None] | None = None,
    kv_bits: Mapping[str, int | None] | None = None,
) -> dict[str, Speed]:
    """Time each model once in each round, in the order given.

    Args:
        folders: label → converted model.
        image: picture file to ask about.
        prompt: the question.
        dtype: type to compute in, see `load`.
        rounds: 1 or more; medians are taken over them.
        on_progress: told how many processes are done.
        kv_bits: label → bits of keys and values; None, or a label that is missing, does not quantize them.

    Returns:
        label → what was measured.

    Raises:
        BenchmarkError: a process fails; its own message is repeated.
    """
    samples: dict[str, list[dict[str, Any]]] = {label: [] for label in folders}
    for turn in range(rounds):
        for position, (label, folder) in enumerate(folders.items()):
            if on_progress:
                on_progress("timing", turn * len(folders) + position, rounds * len(folders))
            samples[label].append(
                _ask(
                    folder=str(folder),
                    image=str(image),
                    prompt=prompt,
                    max_tokens=SPEED_TOKENS,
                    dtype=dtype,
                    kv_bits=(kv_bits or {}).get(label),
                )
            )
    if on_progress:
        on_progress("timing", rounds * len(folders), rounds * len(folders))
    return {label: _summarize(taken) for label, taken in samples.items()}


def _ask(**request: Any) -> dict[str, Any]:
    command = module_command("mlx_fastvlm.fidelity.timed_answer")
    # Ctrl-C and any other exception end the process: subprocess.run kills it before it lets them through.
    done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        raise BenchmarkError(f"Timing failed: {lines[-1] if lines else f'exit code {done.returncode}'}")
    return json.loads(done.stdout.splitlines()[-1])


def _summarize(samples: list[dict[str, Any]]) -> Speed:
    columns = {name: tuple(sample[name] for sample in samples) for name in Speed.__dataclass_fields__}
    return Speed(**{name: Measured(statistics.median(values), values) for name, values in columns.items()})
