"""Words → the string and the ids FastVLM was trained on: Qwen's chat template with LLaVA's image placeholders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mlx_fastvlm.config import IMAGE_TOKEN_INDEX
from mlx_fastvlm.errors import OptionError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

IMAGE_MARK = "<image>"
DEFAULT_SYSTEM = "You are a helpful assistant."
ROLES = ("system", "user", "assistant")

Message = Mapping[str, Any]  # {"role": "user", "content": str | [{"type": "text" | "image", ...}, ...]}


def build_prompt(prompt: str | Sequence[Message], num_images: int = 0, system: str | None = None) -> str:
    """Frame a question or a conversation as the model expects it, ending where the answer begins.

    Args:
        prompt: the user's words, or messages {"role": ..., "content": ...}, where content is text or a list of parts of
            type "text" and "image". `<image>` marks where an image goes; without marks the images come first, each on a
            line of its own, as LLaVA was trained.
        num_images: how many images go with it.
        system: the system line; None is FastVLM's default. Messages may bring their own instead.

    Returns:
        The prompt with one `<image>` per image.

    Raises:
        OptionError: marks and images differ in number, or a message is malformed.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    turns = [(_role(message), _content_text(message)) for message in messages]
    if not turns or turns[0][0] != "system":
        turns.insert(0, ("system", DEFAULT_SYSTEM if system is None else system))
    elif system is not None:
        raise OptionError("The messages begin with a system message and `system` is given too; give one of them.")
    for _, text in turns:
        _check_unicode(text)
    marks = sum(text.count(IMAGE_MARK) for _, text in turns)
    if marks == 0 and num_images:
        first_user = next((i for i, (role, _) in enumerate(turns) if role == "user"), None)
        if first_user is None:
            raise OptionError("There are images but no user message to put them in.")
        turns[first_user] = ("user", f"{IMAGE_MARK}\n" * num_images + turns[first_user][1])
    elif marks != num_images:
        raise OptionError(
            f"The numbers of {IMAGE_MARK} marks in the prompt, {marks}, and of images, {num_images}, differ; "
            "give one mark per image, or none."
        )
    framed = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns)
    return f"{framed}<|im_start|>assistant\n"


def tokenize_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Ids of a built prompt; the text between `<image>` marks is tokenized piece by piece, each mark becomes -200."""
    ids: list[int] = []
    for i, piece in enumerate(prompt.split(IMAGE_MARK)):
        if i:
            ids.append(IMAGE_TOKEN_INDEX)
        ids += tokenizer.encode(piece, add_special_tokens=False).ids
    return ids


def _role(message: Message) -> str:
    role = message.get("role")
    if role not in ROLES:
        raise OptionError(f"A message has role {role!r}; expected one of {', '.join(ROLES)}.")
    return role


def _content_text(message: Message) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise OptionError(f"A message's content is {type(content).__name__}; expected text or a list of parts.")
    text = ""
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind == "text" and isinstance(part.get("text"), str):
            text += part["text"]
        elif kind == "image":
            text += f"{IMAGE_MARK}\n"
        else:
            raise OptionError(f"A message has a part of type {kind!r}; expected 'text' with its text, or 'image'.")
    return text


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise OptionError(
            "The prompt is not valid Unicode; check the terminal's encoding (UTF-8 is expected)."
        ) from None
