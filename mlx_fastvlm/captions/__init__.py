"""Captions of many pictures.

captioning.py makes them, from pictures that read_ahead.py's threads read; picture_files.py says which pictures, output.py
and rows.py where captions go in files, and metadata.py how they get into the pictures' own.
"""

from mlx_fastvlm.captions.captioning import Caption, caption_images

__all__ = ["Caption", "caption_images"]
