"""Several questions about one picture as one decoder sequence.

The context (system line and picture) stands once; each question with its answer is a segment that sees the context and
itself only, at the positions it would have alone. The result is the same as one sequence per question, only cheaper.
"""

from dataclasses import dataclass

import torch
from tokenizers import Tokenizer

from training import prompts
from training.data import IGNORE


@dataclass
class Packed:
    """input_ids, position_ids, labels, weights: (B, L); mask: bool (B, 1, L, L), True where attention is allowed.

    `labels[b, t]` is the token to predict from position t, or IGNORE.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    mask: torch.Tensor


class Packer:
    """Turns dialogues into `Packed` batches.

    Args:
        num_image_tokens: feature rows per picture of the trained size.
    """

    def __init__(self, tokenizer: Tokenizer, num_image_tokens: int):
        self.tokenizer = tokenizer
        self.before = self.encode(prompts.before_image())
        self.image = [prompts.IMAGE_TOKEN_INDEX] * num_image_tokens

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def prompt_ids(self, prompt: str) -> list[int]:
        """A whole prompt for one picture, up to where the answer starts."""
        return self.before + self.image + self.encode(prompts.after_image(prompt))

    def _row(self, dialogue: list[tuple[str, str]], context: list[int]) -> list[list]:
        """Columns: token, position, segment, label, weight."""
        row = [[token, at, 0, IGNORE, 0.0] for at, token in enumerate(self.before + context)]
        start = len(row)
        for segment, (prompt, answer) in enumerate(dialogue, 1):
            asked = self.encode(prompts.after_image(prompt))
            told = self.encode(answer + prompts.END)
            tokens = asked + told
            labels = [IGNORE] * (len(asked) - 1) + told + [IGNORE]
            weight = len(told) ** -0.5
            for at, (token, label) in enumerate(zip(tokens, labels, strict=True)):
                row.append([token, start + at, segment, label, weight if label != IGNORE else 0.0])
        return row

    def pack(
        self,
        conversations: list[list[tuple[str, str]]],
        contexts: list[str] | None = None,
        num_image_tokens: int | None = None,
    ) -> Packed:
        """Pack one dialogue per picture, of another size if so many rows are given.

        With `contexts`, those texts stand where the pictures would.
        """
        image = self.image if num_image_tokens is None else [prompts.IMAGE_TOKEN_INDEX] * num_image_tokens
        spans = [image] * len(conversations) if contexts is None else [self.encode(text) for text in contexts]
        rows = [self._row(dialogue, span) for dialogue, span in zip(conversations, spans, strict=True)]
        length = max(map(len, rows))
        padded = torch.tensor([row + [[0, 0, -1, IGNORE, 0.0]] * (length - len(row)) for row in rows])
        input_ids, position_ids, segment, labels = padded[..., :4].long().unbind(-1)
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        same = (segment[:, :, None] == segment[:, None, :]) | (segment[:, None, :] == 0)
        return Packed(input_ids, position_ids, labels, padded[..., 4], (causal & same)[:, None])
