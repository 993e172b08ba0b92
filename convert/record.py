"""conversion.json: where a converted model came from, what was done to it, and the checksums of its files."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mlx_fastvlm.errors import CheckpointError

RECORD = "conversion.json"
# Files that may change after the conversion without touching the model.
UNCHECKED = (RECORD, "README.md", "fidelity.json")
_BLOCK = 2**22


def stamp() -> dict[str, str]:
    """What made a record, and when."""
    return {
        "converter": f"mlx-fastvlm {version('mlx-fastvlm')}",
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def read_record(folder: Path) -> dict[str, Any]:
    """A converted folder's conversion.json. Raises CheckpointError if it is missing or damaged."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {RECORD}, so it is not a model that mlx-fastvlm converted.") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / RECORD} is damaged ({error}); convert the model again.") from None
    if not isinstance(record, dict):
        raise CheckpointError(f"{folder / RECORD} is damaged; convert the model again.")
    return record


def checksums(folder: Path, on_bytes: Callable[[int], None] | None = None) -> dict[str, str]:
    """SHA-256 of every file that makes up the model, by name; `on_bytes` is told how much was read."""
    sums = {}
    for path in sorted(folder.iterdir()):
        if path.name in UNCHECKED or not path.is_file():
            continue
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
                if on_bytes:
                    on_bytes(len(block))
        sums[path.name] = digest.hexdigest()
    return sums


def stated_license(folder: Path) -> str:
    """The license the source's model card states, else where to look for it."""
    card = folder / "README.md"
    if card.is_file():
        text = card.read_text(encoding="utf-8", errors="replace")
        front_matter = re.match(r"---\n(.*?\n)---", text, re.DOTALL)
        lines = front_matter[1] if front_matter else ""
        stated = dict(re.findall(r"^(license|license_name):\s*['\"]?([\w.-]+)", lines, re.MULTILINE))
        if "license" in stated:
            return stated.get("license_name", stated["license"])
    return "see LICENSE" if any(folder.glob("LICENSE*")) else "not stated by the source"
