"""The command line; `mlx-fastvlm --help` lists the commands, each in a file here."""

from mlx_fastvlm.cli.app import main
from mlx_fastvlm.cli.describe import PRESET_PROMPTS, Preset

__all__ = ["PRESET_PROMPTS", "Preset", "main"]
