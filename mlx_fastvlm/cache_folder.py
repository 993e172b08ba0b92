"""Where mlx-fastvlm keeps what it can make again: $MLX_FASTVLM_CACHE, else ~/.cache/mlx-fastvlm (or XDG_CACHE_HOME's).

Each kind of content has a folder of its own there, which its file names: converted models, tuned launch shapes.
"""

from __future__ import annotations

import os
from pathlib import Path

CACHE_VARIABLE = "MLX_FASTVLM_CACHE"


def cache_home() -> Path:
    """The folder as named: it need not exist, and a `~` is not expanded."""
    if os.environ.get(CACHE_VARIABLE):
        return Path(os.environ[CACHE_VARIABLE])
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "mlx-fastvlm"
