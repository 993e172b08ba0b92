"""One row per frame, as a JSON object: what JSON Lines hold, and what a run that goes on reads back."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from mlx_fastvlm.captions.rows import Recipe
from mlx_fastvlm.video.describing import FrameCaption

_DECIMALS = {"change": 4, "latency": 3}
_KINDS = {
    "source": str,
    "time": (int, float),
    "at": str,
    "caption": str,
    "error": str,
    "finish_reason": str,
    "tokens": int,
    "change": (int, float),
    "reused": bool,
    "latency": (int, float),
    "dropped": int,
    "model": str,
    "prompt": str,
    "options": dict,
}


@dataclass(frozen=True)
class FrameRow:
    """A frame's description, with all that tells it from others.

    Attributes:
        source: name of the video.
        frame: what was made of the frame.
        recipe: what it was made with; its options name the choice of frames too.
        at: when the frame came, by the clock, in ISO 8601; None for files, whose rows say nothing of when they were made.
    """

    source: str
    frame: FrameCaption
    recipe: Recipe
    at: str | None = None

    def to_json(self) -> str:
        """One line, without its end. What is empty is left out."""
        frame = self.frame
        values: dict[str, Any] = {
            "source": self.source,
            "time": round(frame.time, 6),
            "at": self.at,
            "caption": frame.text,
            "error": frame.error,
            "finish_reason": frame.finish_reason,
            "tokens": None if frame.text is None else frame.tokens,
            "change": frame.change,
            "reused": frame.reused or None,
            "latency": frame.latency,
            "dropped": frame.dropped,
            "model": self.recipe.model,
            "prompt": self.recipe.prompt,
            "options": dict(self.recipe.options) or None,
        }
        for name, decimals in _DECIMALS.items():
            if values[name] is not None:
                values[name] = round(values[name], decimals)
        values = {name: value for name, value in values.items() if value is not None}
        try:
            line = json.dumps(values, ensure_ascii=False)
            line.encode()
        except UnicodeEncodeError:  # a file name that is not UTF-8: as escapes it stays valid and can be read back
            return json.dumps(values)
        return line

    @classmethod
    def from_json(cls, line: str | bytes) -> FrameRow:
        """Raises ValueError if the line is no row."""
        values = json.loads(line)
        if not isinstance(values, dict) or not values.keys() <= _KINDS.keys():
            raise ValueError("it has other fields")
        if not all(isinstance(value, _KINDS[name]) for name, value in values.items()):
            raise ValueError("its fields have other values")
        if not {"source", "time", "model", "prompt"} <= values.keys() or ("caption" in values) == ("error" in values):
            raise ValueError("a field is missing")
        frame = FrameCaption(
            float(values["time"]),
            values.get("caption"),
            error=values.get("error"),
            finish_reason=values.get("finish_reason"),
            tokens=values.get("tokens", 0),
            change=values.get("change"),
            reused=values.get("reused", False),
            latency=values.get("latency"),
            dropped=values.get("dropped"),
        )
        recipe = Recipe(values["model"], values["prompt"], values.get("options", {}))
        return cls(values["source"], frame, recipe, values.get("at"))
