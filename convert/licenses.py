"""Under which license a checkpoint is: what its model card or license text states."""

from __future__ import annotations

import re
from pathlib import Path

APPLE_LICENSE = "apple-amlr"
NO_LICENSE = "not stated by the source"
_APPLE_TITLE = "Apple Machine Learning Research Model"
_HEAD = 2000  # characters in which a license's text names itself


def stated_license(folder: Path) -> str:
    """The license the source's model card states, else where to look for it."""
    card = folder / "README.md"
    if card.is_file():
        text = card.read_text(encoding="utf-8", errors="replace")
        front_matter = re.match(r"---\n(.*?\n)---", text, re.DOTALL)
        lines = front_matter[1] if front_matter else ""
        stated = dict(re.findall(r"^(license|license_name):\s*['\"]?([\w.-]+)", lines, re.MULTILINE))
        if stated.get("license", "unknown") != "unknown":
            return stated.get("license_name", stated["license"])
    texts = sorted(folder.glob("LICENSE*"))
    if any(_APPLE_TITLE in path.read_text(encoding="utf-8", errors="replace")[:_HEAD] for path in texts):
        return APPLE_LICENSE
    return "see LICENSE" if texts else NO_LICENSE
