"""A comparison for people, as a table; for machines, as JSON; and beside the candidate's weights, for its model card."""

from __future__ import annotations

import json
from pathlib import Path

from mlx_fastvlm.benchmarks.machine import machine_line
from mlx_fastvlm.benchmarks.report import format_table
from mlx_fastvlm.errors import CheckpointError, OptionError
from mlx_fastvlm.fidelity.output import write_output
from mlx_fastvlm.fidelity.results import Cosine, Fidelity, Measured, Speed

CARD_FILE = "fidelity.json"


def format_fidelity(fidelity: Fidelity) -> str:
    """Lines for people: what was asked, what the candidate saves, what it costs in quality."""
    return "\n\n".join([*_sections(fidelity), machine_line(fidelity.machine)])


def card_table(fidelity: Fidelity) -> str:
    """The same for the model card: of the machine, only what the figures depend on for everybody."""
    machine = fidelity.machine
    where = f"{machine['cpu']}, {machine['cores']} cores; MLX {machine['mlx']} on the {machine['mlx_device']}"
    return "\n\n".join([*_sections(fidelity), where])


def _sections(fidelity: Fidelity) -> list[str]:
    return [_what_was_asked(fidelity), _costs(fidelity), _quality(fidelity)]


def save_fidelity(fidelity: Fidelity, path: Path) -> Path:
    """Write the JSON form to `path`, aside and then renamed.

    Raises:
        OptionError: `path` cannot be written, or its folder is missing.
    """
    return write_output(path, (json.dumps(fidelity.to_dict(), indent=2, ensure_ascii=False) + "\n").encode())


def write_card_entry(fidelity: Fidelity, folder: Path) -> Path:
    """Keep the result in the candidate's folder, where its model card finds it: fidelity.json.

    Raises:
        OptionError: the folder is not there or cannot be written.
    """
    if not (folder / "config.json").is_file():
        raise OptionError(f"{folder} is not a model folder, so the result cannot be kept there.")
    return save_fidelity(fidelity, folder / CARD_FILE)


def read_fidelity(path: Path) -> Fidelity:
    """Read what `save_fidelity` or `write_card_entry` wrote.

    Raises:
        CheckpointError: there is no such file, or it is something else.
    """
    try:
        return Fidelity.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is no fidelity result ({error!r}); measure again.") from None


def _what_was_asked(fidelity: Fidelity) -> str:
    prompts = ", ".join(f'"{prompt}"' for prompt in fidelity.prompts)
    lines = [
        f"{fidelity.candidate.name} against {fidelity.reference.name}: {fidelity.num_images} pictures, {prompts}, "
        f"up to {fidelity.max_tokens} tokens, greedy."
    ]
    if fidelity.kv_bits is not None:
        lines.append(f"{fidelity.candidate.name} holds keys and values in {fidelity.kv_bits} bits.")
    if fidelity.pictures == "generated":
        lines.append("The pictures are generated shapes and textures; give your own (--images) to know about yours.")
    return "\n".join(lines)


def _costs(fidelity: Fidelity) -> str:
    models = (fidelity.reference, fidelity.candidate)
    rows = [_row("weights on disk, MB", *(model.weight_bytes / 1e6 for model in models), digits=1)]
    if all(model.speed for model in models):
        for name, field, scale, digits in (
            ("peak memory of the process, GB", "peak_rss_bytes", 1e-9, 3),
            ("peak memory held by MLX, GB", "peak_mlx_bytes", 1e-9, 3),
            ("time to first token, ms", "ttft_s", 1e3, 1),
            ("decoding, tok/s", "decode_tps", 1, 1),
        ):
            rows.append(_row(name, *(_median(model.speed, field) * scale for model in models), digits=digits))
    tokens = fidelity.next_token
    rows.append(
        _row(
            "perplexity of the reference's answers",
            tokens.reference_perplexity,
            tokens.candidate_perplexity,
            digits=4,
        )
    )
    return format_table(["", fidelity.reference.name, fidelity.candidate.name, "change"], rows)


def _row(name: str, reference: float, candidate: float, digits: int) -> list[str]:
    return [name, f"{reference:,.{digits}f}", f"{candidate:,.{digits}f}", f"{candidate / reference - 1:+.1%}"]


def _median(speed: Speed, field: str) -> float:
    measured: Measured = getattr(speed, field)
    return measured.median


def _quality(fidelity: Fidelity) -> str:
    tokens, answers = fidelity.next_token, fidelity.answers
    count = len(answers.first_divergences)
    same = sum(index is None for index in answers.first_divergences)
    parting = "" if same == count else f"; the others part at token {answers.median_divergence + 1:g} (median)"
    rows = [
        ("vision tower's features, cosine", _cosine(fidelity.tower_features)),
        ("image features, cosine", _cosine(fidelity.image_features)),
        (
            "next token, KL divergence",
            f"mean {tokens.kl_mean:.2e}, median {tokens.kl_median:.2e}, max {tokens.kl_max:.2e} nats",
        ),
        ("next token, top-1 agreement", f"{tokens.top1_agreement:.2%} of {tokens.positions} positions"),
        ("greedy answers", f"{same} of {count} the same{parting}"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _cosine(cosine: Cosine | None) -> str:
    return "not comparable: other widths" if cosine is None else f"mean {cosine.mean:.6f}, worst {cosine.worst:.6f}"
