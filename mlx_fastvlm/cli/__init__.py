"""The command line: `mlx-fastvlm describe | convert | quantize | fidelity | verify | info | tune | selftest | bench`."""

from mlx_fastvlm.cli.app import main
from mlx_fastvlm.cli.describe import PRESET_PROMPTS, Preset

__all__ = ["PRESET_PROMPTS", "Preset", "main"]
