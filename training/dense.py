"""Dense supervision that stands in for the tower's image-text pretraining; its heads are thrown away afterwards."""

import torch
from torch import nn
from torch.nn import functional as F

from training.data import DENSE_LABELS, IGNORE


class DenseHeads(nn.Module):
    """Classifiers on the tower's maps.

    `region` reads each cell of the stride-16 map after stage 3. On the final map, the `cell_` labels read a 3×3 grid,
    `character` the whole map in order, and the others its maximum over positions.
    """

    def __init__(self, middle_channels: int, channels: int, map_side: int, width: int = 128):
        super().__init__()
        self.cell_names = [name for name in DENSE_LABELS if name.startswith("cell_")]
        self.pooled_names = [name for name in DENSE_LABELS if name not in (*self.cell_names, "region", "character")]
        cell_outputs = sum(DENSE_LABELS[name][1] for name in self.cell_names)
        pooled_outputs = sum(DENSE_LABELS[name][1] for name in self.pooled_names)
        self.region = nn.Sequential(
            nn.Linear(middle_channels, width), nn.GELU(), nn.Linear(width, DENSE_LABELS["region"][1])
        )
        self.cell = nn.Sequential(nn.Linear(channels, width), nn.GELU(), nn.Linear(width, cell_outputs))
        self.squeeze = nn.Linear(channels, width // 2)
        self.character = nn.Sequential(
            nn.GELU(),
            nn.Linear(width // 2 * map_side**2, 2 * width),
            nn.GELU(),
            nn.Linear(2 * width, DENSE_LABELS["character"][0] * DENSE_LABELS["character"][1]),
        )
        self.spot = nn.Sequential(nn.Linear(channels, width), nn.GELU())
        self.pooled = nn.Linear(width, pooled_outputs)

    def forward(self, middle: torch.Tensor, features: torch.Tensor) -> dict[str, torch.Tensor]:
        """Label name → logits (B, answers, classes)."""
        grid = F.interpolate(features, size=(3, 3), mode="bilinear", align_corners=False)
        tokens = features.flatten(2).transpose(1, 2)
        logits = {
            "region": self.region(middle.flatten(2).transpose(1, 2)),
            "character": self.character(self.squeeze(tokens).flatten(1)).unflatten(-1, DENSE_LABELS["character"]),
        }
        sizes = [DENSE_LABELS[name][1] for name in self.cell_names]
        logits |= zip(self.cell_names, self.cell(grid.flatten(2).transpose(1, 2)).split(sizes, -1), strict=True)
        sizes = [DENSE_LABELS[name][1] for name in self.pooled_names]
        pooled = self.pooled(self.spot(tokens).amax(1, keepdim=True))
        logits |= zip(self.pooled_names, pooled.split(sizes, -1), strict=True)
        return logits


def dense_loss(logits: dict[str, torch.Tensor], labels: dict[str, torch.Tensor]) -> torch.Tensor:
    """Sum over label kinds of the mean cross-entropy over answered entries; kinds absent from the batch count 0."""
    total = torch.zeros(())
    for name, values in labels.items():
        summed = F.cross_entropy(logits[name].flatten(0, 1), values.flatten(), ignore_index=IGNORE, reduction="sum")
        total = total + summed / (values != IGNORE).sum().clamp(min=1)
    return total


@torch.no_grad()
def dense_accuracy(logits: dict[str, torch.Tensor], labels: dict[str, torch.Tensor]) -> dict[str, tuple[int, int]]:
    """Label name → (right, answered)."""
    counts = {}
    for name, values in labels.items():
        known = values != IGNORE
        right = (logits[name].argmax(-1) == values) & known
        counts[name] = (int(right.sum()), int(known.sum()))
    return counts
