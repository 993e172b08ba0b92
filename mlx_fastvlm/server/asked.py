"""What a request asks for, whichever interface it came through: schema.py and messages.py make it, reader.py takes it.

Knows neither models nor images, only what stands in a request.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_fastvlm.prompt import IMAGE_MARK, Message
from mlx_fastvlm.server.api_errors import bad_request


@dataclass(frozen=True)
class ImageField:
    """An image of a request.

    Attributes:
        url: data: or http(s).
        param: where that stands.
        low_detail: whether the client would rather have a fast answer than a close look.
    """

    url: str
    param: str
    low_detail: bool = False


Part = str | ImageField  # of a message


@dataclass(frozen=True)
class Asked:
    """A request whose fields are checked one by one.

    Attributes:
        model: its id.
        messages: as `build_prompt` takes them.
        images: in the order of their places in the messages.
        max_tokens: the longest answer that is named; None for as long as may be.
        max_tokens_field: where that stands.
        options: keywords of `GenerationOptions`, only those that the client gives.
        user: whose request it is, where one address has several.
        stream: whether the answer is wanted piece by piece.
    """

    model: str
    messages: Sequence[Message]
    images: Sequence[ImageField]
    max_tokens: int | None
    max_tokens_field: str = "max_tokens"
    options: Mapping[str, Any] = field(default_factory=dict)
    user: str | None = None
    stream: bool = False

    @property
    def low_detail(self) -> bool:
        """Whether all images may be seen small: those of one request are seen alike."""
        return bool(self.images) and all(image.low_detail for image in self.images)


def turn(role: str, parts: Sequence[Part], place: str) -> Message:
    """A message as `build_prompt` takes it.

    An image that follows its message's words is moved before them, as the model was trained; images between words stay.

    Args:
        role: system, user or assistant.
        parts: its words and images.
        place: where they stand in the request.

    Raises:
        ApiError: an image is not the user's, or the words hold what stands for an image.
    """
    for part in parts:
        if isinstance(part, ImageField):
            if role != "user":
                raise bad_request(f"A message of the {role} has an image; only the user's can.", place)
        elif IMAGE_MARK in part:
            raise bad_request(f"The text has {IMAGE_MARK}, which the model takes for an image; reword it.", place)
    return {"role": role, "content": _in_trained_order(parts)}


def given(**options: Any) -> dict[str, Any]:
    """Those that are not None."""
    return {name: value for name, value in options.items() if value is not None}


def _in_trained_order(parts: Sequence[Part]) -> list[Mapping[str, str]]:
    ordered = sorted(parts, key=lambda part: isinstance(part, str)) if _images_are_together(parts) else parts
    content: list[Mapping[str, str]] = []
    for part in ordered:
        if isinstance(part, ImageField):
            content.append({"type": "image"})
        else:
            follows_text = bool(content) and content[-1]["type"] == "text"
            content.append({"type": "text", "text": ("\n" if follows_text else "") + part})
    return content


def _images_are_together(parts: Sequence[Part]) -> bool:
    """Whether no text stands between two images."""
    places = [place for place, part in enumerate(parts) if isinstance(part, ImageField)]
    return not places or places[-1] - places[0] == len(places) - 1
