"""Checkpoint → folded MLX folder. Installs as mlx_fastvlm.convert; nothing here is imported while answering."""

from .pipeline import convert

__all__ = ["convert"]
