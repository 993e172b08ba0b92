"""The turns of a conversation, and the JSON file that holds them with their images."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_fastvlm.errors import ConversationError, ImageError
from mlx_fastvlm.image_content import ImageContent, recognize
from mlx_fastvlm.image_decoding import open_image
from mlx_fastvlm.prompt import IMAGE_MARK
from mlx_fastvlm.replace_file import replace_file

FORMAT = "mlx-fastvlm conversation"
VERSION = 1
MAX_FILE_BYTES = 2**30


@dataclass(frozen=True)
class Turn:
    """A question and its answer.

    Attributes:
        question: the user's words; `<image>` marks where its images are, without marks they come first.
        answer: the model's words; "" while it is not given.
        images: that came with the question.
    """

    question: str
    answer: str = ""
    images: tuple[ImageContent, ...] = ()

    def marked_question(self) -> str:
        """The question with one `<image>` per image."""
        if IMAGE_MARK in self.question:
            return self.question
        return f"{IMAGE_MARK}\n" * len(self.images) + self.question


@dataclass(frozen=True)
class Saved:
    """What a file holds.

    Attributes:
        turns: all turns.
        shown: images for the question that comes next.
        system: the system line; None is the default one.
    """

    turns: Sequence[Turn]
    shown: Sequence[ImageContent] = ()
    system: str | None = None


def save_conversation(path: str | os.PathLike[str], saved: Saved) -> None:
    """Write a conversation, aside and then renamed. Raises ConversationError if it cannot be written."""
    path = Path(os.path.expanduser(path))
    content = {
        "format": FORMAT,
        "version": VERSION,
        "system": saved.system,
        "turns": [
            {
                "question": turn.question,
                "answer": turn.answer,
                "images": [_image_object(image) for image in turn.images],
            }
            for turn in saved.turns
        ],
        "shown": [_image_object(image) for image in saved.shown],
    }
    data = json.dumps(content, ensure_ascii=False, indent=1).encode("utf-8", "replace")
    if len(data) > MAX_FILE_BYTES:
        raise ConversationError(
            f"{path} would take {len(data) / 2**30:.1f} GiB with its images; at most {MAX_FILE_BYTES / 2**30:g} GiB can "
            "be read again: save a branch of it, or use smaller images."
        )
    try:
        replace_file(path, data)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise ConversationError(f"{path} cannot be written ({getattr(error, 'strerror', None) or error}).") from None


def load_conversation(path: str | os.PathLike[str]) -> Saved:
    """Read what `save_conversation` wrote. Raises ConversationError if it is missing, damaged or something else."""
    path = Path(os.path.expanduser(path))
    content = _read(path)
    if content.get("version") != VERSION:
        raise ConversationError(
            f"{path} is in version {content.get('version')!r}; this release reads version {VERSION}: update mlx-fastvlm."
        )
    try:
        turns = [
            Turn(_text(turn["question"]), _text(turn["answer"]), tuple(map(_image, turn["images"])))
            for turn in content["turns"]
        ]
        system = content["system"]
        return Saved(turns, tuple(map(_image, content["shown"])), system if system is None else _text(system))
    except (KeyError, TypeError, ValueError, ImageError) as error:  # ValueError: no base64
        raise ConversationError(f"{path} is damaged ({type(error).__name__}: {error}); use another copy.") from None


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConversationError(f"{path} is larger than {MAX_FILE_BYTES / 2**30:g} GiB: no conversation is.")
        data = path.read_bytes()
    except FileNotFoundError:
        raise ConversationError(f"There is no file {path}: check the path.") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise ConversationError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error}).") from None
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ConversationError(
            f"{path} is not a saved conversation: choose a file that /save or Conversation.save wrote."
        )
    return content


def _image_object(image: ImageContent) -> dict[str, Any]:
    data = base64.b64encode(image.file_bytes()).decode("ascii")
    return {"name": image.name, "is_file": image.is_file, "base64": data}


def _image(stored: dict[str, Any]) -> ImageContent:
    data = base64.b64decode(_text(stored["base64"]), validate=True)
    # What was known by its pixels is known by them again.
    return recognize(data if stored["is_file"] else open_image(data), name=_text(stored["name"]))


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"a {type(value).__name__} where text belongs")
    return value
