"""The self-check: on random input, every folded part must give what the checkpoint's own parts give."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import mlx.core as mx

from mlx_fastvlm.errors import CheckpointError

from .reparameterize import AnySite, ConvSite, ScaledLinearSite
from .tensors import Tensors

TOLERANCE = 1e-4  # relative to the largest output; float32 rounding alone stays below 1e-5
_MAP_SIDE = 8  # pixels: large enough that a 7×7 kernel sees borders and an interior


@dataclass(frozen=True)
class SelfCheck:
    """What the check measured.

    Attributes:
        sites: how many folded parts were compared.
        max_relative_error: largest |folded − unfolded| over the largest |unfolded|, over all parts.
        worst_site: where that was.
    """

    sites: int
    max_relative_error: float
    worst_site: str


def self_check(found: Iterable[AnySite], tensors: Tensors) -> SelfCheck:
    """Compare every folded site with its unfolded computation in float32.

    Raises:
        CheckpointError: a fold disagrees by more than TOLERANCE, so the checkpoint is not what it seems.
    """
    errors: dict[str, float] = {}
    for site in found:
        if isinstance(site, ConvSite):
            errors[site.target] = _conv_error(site, tensors)
        elif isinstance(site, ScaledLinearSite) and site.layer_scale is not None:
            errors[site.target] = _linear_error(site, tensors)
    worst = max(errors, key=lambda target: math.inf if math.isnan(errors[target]) else errors[target])
    if not errors[worst] <= TOLERANCE:  # not `>`, which NaN would pass
        raise CheckpointError(
            f"Folding {worst} changes its output by {errors[worst]:.1e} (relative; at most {TOLERANCE:.0e} is expected). "
            "The checkpoint is damaged or not FastVLM's."
        )
    return SelfCheck(sites=len(errors), max_relative_error=errors[worst], worst_site=worst)


def _conv_error(site: ConvSite, tensors: Tensors) -> float:
    x = mx.random.normal((1, _MAP_SIDE, _MAP_SIDE, site.conv.in_channels), key=mx.random.key(0))
    kernel, bias = site.kernel_and_bias(tensors)
    return _relative_error(site.conv(x, kernel) + bias, site.plain(tensors, x))


def _linear_error(site: ScaledLinearSite, tensors: Tensors) -> float:
    folded = site.fold(tensors)
    weight, bias = folded[f"{site.target}.weight"], folded[f"{site.target}.bias"]
    x = mx.random.normal((_MAP_SIDE, weight.shape[1]), key=mx.random.key(0))
    return _relative_error(x @ weight.T + bias, site.plain(tensors, x))


def _relative_error(folded: mx.array, plain: mx.array) -> float:
    return (mx.abs(folded - plain).max() / mx.maximum(mx.abs(plain).max(), 1e-30)).item()
