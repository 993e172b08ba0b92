"""Which files make up a checkpoint or an adapter, told from their names alone.

The hub's downloads, the cache and the converter agree on it here; what the files hold is the converter's matter.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")  # the first that a folder has is read
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")  # the first that a folder has is read
PROJECTOR = "mm_projector.bin"  # all that LLaVA's first training stage stores
TRAINER_FILES = ("non_lora_trainables.bin", PROJECTOR)  # what LLaVA's trainer stores beside LoRA

_SMALL = ("*.json", "merges.txt", "*.jinja", "LICENSE*", "ACKNOWLEDGEMENTS*", "README.md")
_OF_ADAPTER = {*ADAPTER_WEIGHTS, *TRAINER_FILES}
_TRAINING_STATE = re.compile(r"training_args\.bin|(optimizer|scheduler|scaler|rng_state\w*)\.(bin|pt|pth)")
_TRAINING_RECORD = ("trainer_state.json",)


def is_training_state(name: str) -> bool:
    """Whether a file with a weight's suffix is known to hold a trainer's state instead."""
    return _TRAINING_STATE.fullmatch(name) is not None


def is_projector_alone(names: Iterable[str]) -> bool:
    """Whether a folder with these files holds LLaVA's projector and no model."""
    names = set(names)
    return PROJECTOR in names and not any(
        re.fullmatch(r"(pytorch_)?model(-\d+-of-\d+)?\.(safetensors|bin)", name) for name in names
    )


def wanted_files(names: Iterable[str]) -> list[str]:
    """What of a repository is needed to convert it.

    Args:
        names: paths of all its files, with slashes.

    Returns:
        Small files at the top, an adapter's files, Core ML packages, and the weights in one format: PyTorch's only where
        there are no safetensors. No trainer's state and nothing else in folders.
    """
    top, wanted = [], []
    for name in names:
        folder, _, below = name.partition("/")
        if below and folder.endswith(".mlpackage"):
            wanted.append(name)
        elif not below and not is_training_state(name) and name not in _TRAINING_RECORD:
            top.append(name)
    wanted += [name for name in top if any(fnmatchcase(name, pattern) for pattern in _SMALL)]
    wanted += [name for name in TRAINER_FILES if name in top]
    wanted += [name for name in ADAPTER_WEIGHTS if name in top][:1]
    weights = [name for name in top if name.endswith(WEIGHT_SUFFIXES) and name not in _OF_ADAPTER]
    formats = ([name for name in weights if name.endswith(suffix)] for suffix in WEIGHT_SUFFIXES)
    return wanted + next((found for found in formats if found), [])
