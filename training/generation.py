"""Greedy answers of the demo model in PyTorch, for evaluation."""

from collections import defaultdict

import torch
from transformers import DynamicCache

from training.model import FastVLM
from training.packing import Packer
from training.prompts import END

MAX_NEW_TOKENS = 64


@torch.no_grad()
def answer_all(
    model: FastVLM, packer: Packer, image_features: torch.Tensor, asked: list[tuple[int, str]], batch: int = 128
) -> list[str]:
    """One greedy answer per (picture index, prompt); image_features (B, N, hidden). Equally long prompts run together."""
    by_length = defaultdict(list)
    for index, (picture, prompt) in enumerate(asked):
        ids = packer.prompt_ids(prompt)
        by_length[len(ids)].append((index, picture, ids))
    answers = [""] * len(asked)
    for group in by_length.values():
        for start in range(0, len(group), batch):
            indices, pictures, ids = zip(*group[start : start + batch], strict=True)
            tokens = greedy(model, torch.tensor(ids), image_features[list(pictures)], packer.tokenizer.token_to_id(END))
            for index, row in zip(indices, tokens, strict=True):
                answers[index] = packer.tokenizer.decode(row)
    return answers


def greedy(model: FastVLM, input_ids: torch.Tensor, image_features: torch.Tensor, end: int) -> list[list[int]]:
    """Most likely tokens after each row of input_ids (B, L), up to and without the end token."""
    cache = DynamicCache()
    hidden = model.decode(input_ids, image_features, cache=cache)
    steps = []
    alive = torch.ones(len(input_ids), dtype=torch.bool)
    while len(steps) < MAX_NEW_TOKENS:
        token = model.logits(hidden[:, -1]).argmax(-1)
        steps.append(token)
        alive &= token != end
        if not alive.any():
            break
        hidden = model.decode(token[:, None], None, cache=cache)
    rows = torch.stack(steps, 1).tolist()
    return [row[: row.index(end)] if end in row else row for row in rows]
