"""Videos for tests, drawn and encoded here: scenes that the demo model describes exactly, and plain pictures."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

from training import scenes

SIDE = 256
SCENE_SEEDS = (5, 51, 8, 3)  # whose captions the demo model gives word for word, also after encoding


def scene(seed: int) -> tuple[np.ndarray, str]:
    """(256, 256, 3) uint8 of a scene, on white where the scene is not square, and its caption."""
    made = scenes.make_scene(seed)
    picture = Image.new("RGB", (SIDE, SIDE), "white")
    picture.paste(scenes.render(made, SIDE))
    return np.asarray(picture), scenes.caption(made)


def plain(color: Sequence[int], width: int = 64, height: int = 48) -> np.ndarray:
    """(H, W, C) uint8 of one color."""
    return np.full((height, width, len(color)), color, np.uint8)


def write_clip(
    path: Path | str,
    pictures: Sequence[np.ndarray],
    *,
    rate: int = 10,
    times: Sequence[float] | None = None,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    options: dict[str, str] | None = None,
    rotation: int | None = None,
    pixel_aspect: Fraction | None = None,
    container_options: dict[str, str] | None = None,
    **color: int,
) -> Path:
    """Encode pictures, (H, W, 3) or (H, W, 4) uint8 or (H, W, 3) uint16, one a frame.

    Args:
        path: its suffix says the container.
        times: of the frames in seconds; None for a steady rate.
        rotation: of the display matrix, degrees counterclockwise.
        color: color_trc, color_primaries, colorspace of the stream, by number.
    """
    import av

    if options is None:
        options = {"crf": "10"} if codec == "libx264" else {}
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = pix_fmt
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if rotation is not None:
            stream.set_display_rotation(rotation)
        if pixel_aspect is not None:
            stream.sample_aspect_ratio = pixel_aspect
        for name, value in color.items():
            setattr(stream.codec_context, name, value)
        for index, picture in enumerate(pictures):
            layout = "rgb48le" if picture.dtype == np.uint16 else "rgba" if picture.shape[2] == 4 else "rgb24"
            frame = av.VideoFrame.from_ndarray(picture, format=layout)
            if color:
                frame.colorspace = color.get("colorspace", 2)
                frame = frame.reformat(format=pix_fmt, dst_colorspace=color.get("colorspace"))
            if times is not None:
                frame.pts, frame.time_base = round(1000 * times[index]), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return Path(path)


def write_sound(path: Path, cover: bytes | None = None) -> Path:
    """A second of silence; with `cover`, the bytes of a PNG file, as an album has one."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le" if path.suffix == ".wav" else "flac", rate=8000)
        picture = None
        if cover is not None:
            picture = container.add_stream("png", rate=1)
            picture.width = picture.height = SIDE
            picture.pix_fmt = "rgb24"
            picture.disposition = av.stream.Disposition.attached_pic.value
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), format="s16", layout="mono")
        sound.sample_rate = 8000
        if picture is not None:
            packet = av.Packet(cover)
            packet.stream, packet.pts, packet.dts = picture, 0, 0
            container.mux(packet)
        container.mux(stream.encode(sound))
        container.mux(stream.encode(None))
    return path
