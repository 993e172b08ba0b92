"""The model card of a converted folder: README.md as hubs read it, from conversion.json and fidelity.json."""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .licenses import APPLE_LICENSE
from .record import read_record

CARD = "README.md"
FIDELITY = "fidelity.json"
# The notice and the disclosure that Apple's license asks of everyone who passes the model on.
_APPLE_NOTICE = (
    "Apple Machine Learning Research Model is licensed under the "
    "Apple Machine Learning Research Model License Agreement."
)
_APPLE_LICENSE_ADDRESS = "https://github.com/apple/ml-fastvlm/blob/main/LICENSE_MODEL"


def write_card(folder: Path, name: str) -> None:
    """Write the card of the model called `name` anew. Raises CheckpointError if the record is damaged."""
    aside = folder / f".{CARD}.{uuid.uuid4().hex[:8]}.partial"
    try:
        aside.write_text(render_card(folder, name), encoding="utf-8")
        os.replace(aside, folder / CARD)
    finally:
        aside.unlink(missing_ok=True)


def write_export_card(folder: Path, name: str, record: dict[str, Any]) -> None:
    """Write the card of a folder in another program's layout; `record` is its export.json."""
    sections = [
        _front_matter(folder, record, ("fastvlm",)),
        f"# {name}",
        f"FastVLM in the layout {record['layout']}, exported by {record['converter']} from {record['source']}, stored as "
        f"{record['dtype']}. The vision tower is in inference form: its training branches, BatchNorms and layer scales are "
        "folded into its weights.",
        *record["notices"],
        "## License\n\n" + _license_text(folder, record),
    ]
    (folder / CARD).write_text("\n\n".join(sections) + "\n", encoding="utf-8")


def render_card(folder: Path, name: str) -> str:
    """The card's Markdown."""
    record = read_record(folder)
    fidelity = folder / FIDELITY
    sections = [
        _front_matter(folder, record, ("mlx", "mlx-fastvlm", "fastvlm")),
        f"# {name}",
        "FastVLM converted for [mlx-fastvlm](https://pypi.org/project/mlx-fastvlm/): a vision-language model for MLX.",
        f"```\nmlx-fastvlm describe picture.jpg --model {name}\n```",
        "## What was changed\n\n" + "\n".join(f"- {line}" for line in changes(record)),
    ]
    if fidelity.exists():
        sections.append(_fidelity_section(fidelity))
    sections.append("## License\n\n" + _license_text(folder, record))
    return "\n\n".join(sections) + "\n"


def changes(record: dict[str, Any]) -> list[str]:
    """What the conversion did, one sentence a line."""
    folded = record["folded"]
    lines = [f"Source: {record['source']}" + (f" at {record['revision']}" if record.get("revision") else "")]
    if any(folded.values()):
        said = ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in folded.items() if count)
        error = record["self_check"]["max_relative_error"]
        lines.append(
            f"Folded into the weights, in float32: {said}. This changes their outputs by at most {error:.0e} (relative)."
        )
    lines.append(f"Stored as {record['dtype']}.")
    quantization = record.get("quantization")
    if quantization:
        images = quantization["calibration_images"]
        calibration = f", calibrated on {images} images" if images else ""
        lines.append(
            f"Quantized by recipe {quantization['recipe']}: {quantization['bits_per_weight']:.2f} bits per weight on "
            f"average{calibration}."
        )
    return lines + record["notices"]


def _front_matter(folder: Path, record: dict[str, Any], tags: Sequence[str]) -> str:
    lines = ["pipeline_tag: image-text-to-text", f"tags: [{', '.join(tags)}]"]
    if "mlx" in tags:
        lines.insert(0, "library_name: mlx")
    if record.get("base_model"):
        lines.insert(0, f"base_model: {record['base_model']}")
    if _is_apples(record):
        lines += ["license: other", f"license_name: {APPLE_LICENSE}", f"license_link: {_license_link(folder)}"]
    elif record["license"].startswith(("see ", "not ")):
        lines.append("license: unknown")
    else:
        lines.append(f"license: {record['license']}")
    return "\n".join(["---", *lines, "---"])


def _is_apples(record: dict[str, Any]) -> bool:
    return record["license"] == APPLE_LICENSE or str(record.get("base_model")).startswith("apple/")


def _license_link(folder: Path) -> str:
    return next((path.name for path in sorted(folder.glob("LICENSE*"))), _APPLE_LICENSE_ADDRESS)


def _license_text(folder: Path, record: dict[str, Any]) -> str:
    if not _is_apples(record):
        return f"The source's: {record['license']}. The conversion adds no terms of its own."
    return (
        f"{_APPLE_NOTICE} It is for research only; this folder is a Model Derivative of it, changed as stated above. "
        f"The agreement's text: {_license_link(folder)}. Whoever passes this folder on must pass it on too."
    )


def _fidelity_section(path: Path) -> str:
    # Imported here: most cards have none, and the report brings more than a conversion needs.
    from mlx_fastvlm.fidelity.report import card_table, read_fidelity

    return f"## Fidelity\n\nMeasured with `mlx-fastvlm fidelity`.\n\n```\n{card_table(read_fidelity(path))}\n```"
