"""Descriptions of a video's frames, one by one; no model here was trained on video.

source.py says what a name stands for, reader.py gives its frames (frame.py: what a frame looks like, tone_map.py: HDR),
choice.py says which of them are described, describing.py has them described, newest.py is how a live source is kept up
with, and rows.py, cues.py and output.py are about where the descriptions go. Needs PyAV, the extra `video`.
"""

from mlx_fastvlm.video.choice import ChangeGate, Pace
from mlx_fastvlm.video.describing import FrameCaption, describe_frames, describe_newest
from mlx_fastvlm.video.newest import NewestFrame
from mlx_fastvlm.video.reader import open_video
from mlx_fastvlm.video.source import parse_source

__all__ = [
    "ChangeGate",
    "FrameCaption",
    "NewestFrame",
    "Pace",
    "describe_frames",
    "describe_newest",
    "open_video",
    "parse_source",
]
