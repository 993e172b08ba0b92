"""`mlx-fastvlm tune | selftest`: the kernels on the user's own machine, made fast and checked."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlx_fastvlm.cli.terminal import DType, Model, Revision, progress, say
from mlx_fastvlm.errors import ConfigError, FastVLMError, OptionError
from mlx_fastvlm.loading import DEFAULT_MODEL, DEMO, DTYPES

if TYPE_CHECKING:
    from mlx_fastvlm.config import FastVLMConfig
    from mlx_fastvlm.kernels.catalog import Case
    from mlx_fastvlm.kernels.selftest import Check
    from mlx_fastvlm.kernels.tuning import Tuned

_TEXT_TOKENS = 25  # of a prompt around the image's: a short question in the chat template
_GPU_PIXELS, _CPU_PIXELS = 256, 512  # of the self-test's 0.5B; a CPU's loops are for large arrays


def tune(
    model: Model = DEFAULT_MODEL,
    resolution: Annotated[
        list[int] | None,
        typer.Option(min=64, help="Side of the image in pixels; may be given again.", show_default="the model's"),
    ] = None,
    dtype: Annotated[
        list[DType] | None,
        typer.Option(help="Type to compute in; may be given again.", show_default="the model's stored type"),
    ] = None,
    prompt_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Length of the prompt, the image's tokens included.", show_default="a short question"),
    ] = None,
    seconds_per_kernel: Annotated[
        float, typer.Option(min=0.01, help="How long to time the launch shapes of one kernel in one shape.")
    ] = 0.5,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Measure, but store nothing.")] = False,
    clear: Annotated[bool, typer.Option("--clear", help="Delete what was tuned before, and do no more.")] = False,
    revision: Revision = None,
) -> None:
    """Find the fastest way to launch each GPU kernel on this machine, and use it from now on.

    Every launch shape is compared with plain operations, then timed against them; where these are faster, they are
    taken. The winners are kept in the cache folder, for this chip and this version of MLX. Ctrl-C keeps what was found.

    \b
    mlx-fastvlm tune
    mlx-fastvlm tune --model ./my-model --resolution 512 --resolution 1024
    """
    from mlx_fastvlm.kernels import gpu, tuning, winners
    from mlx_fastvlm.kernels.catalog import cases

    if clear:
        count = winners.clear_winners()
        say(f"Deleted {count} file{'' if count == 1 else 's'} of tuned launch shapes.")
        return
    if gpu.backend() is None:
        raise OptionError(
            "MLX computes on a CPU here, where there is nothing to tune; it needs Apple silicon or an NVIDIA GPU."
        )
    config, stored = _read_model(model, revision)
    calls: list[Case] = []
    for side in resolution or [config.vision_config.image_size]:
        tokens = prompt_tokens or _image_tokens(config, side) + _TEXT_TOKENS
        calls += cases(config, side, tokens)
    dtypes = [DTYPES[name] for name in ([chosen.value for chosen in dtype] if dtype else [stored])]
    found: list[Tuned] = []
    try:
        with progress() as on_progress:
            for tuned in tuning.tune(calls, dtypes, seconds_per_kernel, keep=not dry_run, on_progress=on_progress):
                found.append(tuned)
    finally:
        if found:
            say(_tuning_table(found))
            if not dry_run:
                say(f"Kept in {winners.winners_file()}")


def selftest(
    dtype: Annotated[
        list[DType] | None,
        typer.Option(help="Type to check; may be given again.", show_default="all three; float32 on a CPU"),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Only the launch shapes that are used here.")] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write every result as JSON.", show_default=False)
    ] = None,
) -> None:
    """Check every kernel against plain operations on this machine, and show how much faster it is.

    On a GPU each kernel runs in every launch shape it may take, in the shapes of the demo model and FastVLM-0.5B and in
    ragged ones. On a CPU its loops are checked. The last line is JSON; attach --json's file to an issue.

    \b
    mlx-fastvlm selftest
    mlx-fastvlm selftest --quick --json selftest.json
    """
    from mlx_fastvlm import __version__
    from mlx_fastvlm.fidelity.output import check_writable, write_output
    from mlx_fastvlm.kernels import gpu
    from mlx_fastvlm.kernels.selftest import environment
    from mlx_fastvlm.kernels.selftest import selftest as run

    if json_file is not None:
        check_writable(json_file)
    on_gpu = gpu.backend() is not None
    names = [chosen.value for chosen in dtype] if dtype else list(DTYPES) if on_gpu else ["float32"]
    with progress() as on_progress:
        checks = list(run(_selftest_cases(on_gpu), [DTYPES[name] for name in names], quick, on_progress))
    failed = [check.to_dict() for check in checks if check.problem is not None]
    about = {"mlx_fastvlm": __version__, **environment(), "checks": len(checks), "failed": failed}
    say(_selftest_table(checks))
    if not on_gpu:
        say(f"MLX computes on a CPU here: no GPU kernel was run. Loops: {about['cpu_loops']}.")
        say("same: plain operations on both sides, as there are no loops for the op, the type or so small an array.")
    if json_file is not None:
        everything = {**about, "results": [check.to_dict() for check in checks]}
        write_output(json_file, (json.dumps(everything, indent=1) + "\n").encode())
    say(json.dumps(about))
    if failed:
        raise FastVLMError(
            f"{len(failed)} of {len(checks)} checks failed, first {failed[0]['op']} {failed[0]['shape']}: "
            f"{failed[0]['problem']}. MLX_FASTVLM_KERNELS=off avoids the kernels; please report it with --json's file."
        )


def _read_model(model: str, revision: str | None) -> tuple[FastVLMConfig, str]:
    """A model's config, and the type its weights are stored in; a folder in our layout or the hub's is not converted."""
    from mlx_fastvlm.config import MODEL_TYPE, FastVLMConfig, read_config_dict
    from mlx_fastvlm.loading import as_path, resolve_model

    folder = as_path(model)
    if model == DEMO or not folder.is_dir() or read_config_dict(folder).get("model_type") != MODEL_TYPE:
        with progress() as on_progress:
            folder = resolve_model(model, revision, on_progress)
    raw = read_config_dict(folder)
    stored = raw.get("torch_dtype") or raw.get("dtype")
    if stored not in DTYPES:
        raise ConfigError(
            f"{folder}/config.json says torch_dtype {stored!r}; give --dtype, one of {', '.join(DTYPES)}."
        )
    return FastVLMConfig.from_dict(raw), stored


def _image_tokens(config: FastVLMConfig, side: int) -> int:
    """Raises OptionError if the tower cannot take images of `side` pixels."""
    patch = config.vision_config.patch_size
    if side % patch:
        raise OptionError(f"--resolution is {side}; it must be a multiple of {patch}.")
    return (side // patch) ** 2


def _tuning_table(found: Sequence[Tuned]) -> str:
    from mlx_fastvlm.benchmarks.report import format_table

    rows = []
    for tuned in found:
        launch = tuned.winner if isinstance(tuned.winner, str) else _launch_words(tuned.winner)
        gain = tuned.plain_seconds / tuned.best_seconds
        times = [f"{seconds * 1e3:.3f}" for seconds in (tuned.plain_seconds, tuned.best_seconds)]
        rows.append([f"{tuned.call.op} {tuned.label}", tuned.call.dtype, *times, f"{gain:.2f}x", launch])
    text = format_table(["op", "type", "plain ms", "best ms", "speed-up", "launch"], rows)
    rejected = [
        f"Not used: {tuned.call.op} {tuned.label} {tuned.call.dtype} with {_launch_words(launch)}: {reason}"
        for tuned in found
        for launch, reason in tuned.rejected
    ]
    return "\n".join([text, *rejected])


def _selftest_cases(on_gpu: bool) -> list[Case]:
    from mlx_fastvlm.benchmarks.random_model import random_config
    from mlx_fastvlm.kernels.catalog import cases
    from mlx_fastvlm.kernels.selftest import ragged_cases

    released = random_config("0.5b")
    if not on_gpu:
        return cases(released, _CPU_PIXELS, _image_tokens(released, _CPU_PIXELS) + _TEXT_TOKENS)
    demo, _ = _read_model(DEMO, None)
    side = demo.vision_config.image_size
    return [
        *cases(demo, side, _image_tokens(demo, side) + _TEXT_TOKENS),
        *cases(released, _GPU_PIXELS, _image_tokens(released, _GPU_PIXELS) + _TEXT_TOKENS),
        *ragged_cases(),
    ]


def _selftest_table(checks: Sequence[Check]) -> str:
    """A line for each op, shape and type; launch shapes are counted."""
    from mlx_fastvlm.benchmarks.report import format_table

    together: dict[tuple[str, str, str], list[Check]] = defaultdict(list)
    for check in checks:
        together[check.op, check.shape, check.dtype].append(check)
    rows = []
    for (op, shape, dtype), group in together.items():
        passed = sum(check.problem is None for check in group)
        errors = [check.error for check in group if check.error is not None]
        gains = [check.speedup for check in group if check.speedup is not None]
        gain = f"{gains[0]:.2f}x" if gains else "-"
        rows.append(
            [
                f"{op} {shape}",
                dtype,
                "pass" if passed == len(group) else "FAIL",
                f"{passed}/{len(group)}",
                f"{max(errors):.1e}" if errors else "-",
                gain if group[0].launch or any(errors) else "same",
            ]
        )
    return format_table(["op", "type", "result", "passed", "max error", "speed-up"], rows)


def _launch_words(launch: dict[str, int]) -> str:
    return " ".join(f"{name}={value}" for name, value in launch.items())
