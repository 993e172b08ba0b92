"""High dynamic range to what a picture file would hold: 8-bit sRGB, as a screen without HDR shows it.

PyAV's own conversion to RGB takes the codes as they are, which makes HDR video gray and flat.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np

WHITE_NITS = 203.0  # of a white page in HDR video (ITU-R BT.2408)

_PEAK_NITS = 1000.0  # at which HLG is shown (ITU-R BT.2100, system gamma 1.2)
_KNEE = 0.8  # of white's light: what is brighter than this is compressed, so that highlights keep some shape
_STEPS = 4096  # of light, of which 8-bit sRGB can tell fewer apart
_BT2020_TO_BT709 = np.array(  # linear light (ITU-R BT.2087, inverse)
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], np.float32
)


def pq_nits(code: np.ndarray) -> np.ndarray:
    """Light of SMPTE ST 2084 codes.

    Args:
        code: values in [0, 1].

    Returns:
        Of the same shape, in nits (cd/m²), 0 … 10000.
    """
    root = code ** (1 / 78.84375)
    return 10_000 * (np.maximum(root - 0.8359375, 0) / (18.8515625 - 18.6875 * root)) ** (1 / 0.1593017578125)


def hlg_scene(code: np.ndarray) -> np.ndarray:
    """Scene light in [0, 1] of hybrid log-gamma codes in [0, 1] (ARIB STD-B67)."""
    return np.where(code <= 0.5, code**2 / 3, (np.exp((code - 0.55991073) / 0.17883277) + 0.28466892) / 12)


def tone_map(codes: np.ndarray, *, is_hlg: bool) -> np.ndarray:
    """HDR video's codes as 8-bit sRGB.

    Args:
        codes: (H, W, 3) uint16 RGB of full range, with BT.2020's primaries.
        is_hlg: hybrid log-gamma rather than perceptual quantization (SMPTE ST 2084).

    Returns:
        (H, W, 3) uint8 sRGB. A white page of `WHITE_NITS` is nearly white.
    """
    if is_hlg:
        scene = _table(hlg_scene)[codes]
        luminance = scene @ np.array([0.2627, 0.6780, 0.0593], np.float32)
        light = scene * (_PEAK_NITS / WHITE_NITS * luminance**0.2)[..., None]
    else:
        light = _table(pq_nits)[codes] / np.float32(WHITE_NITS)
    light = np.maximum(light @ _BT2020_TO_BT709.T, 0)
    brightest = np.maximum(light.max(axis=-1, keepdims=True), _KNEE)
    light *= (1 - (1 - _KNEE) * np.exp((_KNEE - brightest) / (1 - _KNEE))) / brightest  # all three alike: the hue stays
    return _srgb_codes()[np.minimum(light * (_STEPS - 1) + 0.5, _STEPS - 1).astype(np.uint16)]


@cache
def _table(transfer: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """What a transfer function makes of every 16-bit code."""
    return transfer(np.arange(65536) / 65535).astype(np.float32)


@cache
def _srgb_codes() -> np.ndarray:
    """8-bit sRGB of `_STEPS` even steps of light."""
    light = np.arange(_STEPS) / (_STEPS - 1)
    encoded = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return np.round(255 * encoded).astype(np.uint8)
