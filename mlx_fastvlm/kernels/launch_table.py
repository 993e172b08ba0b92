"""Which launch shape is taken on which generation of chips, where `mlx-fastvlm tune` has not measured any.

Reasoned from published facts, measured on no Apple GPU. What an op's entry lacks is left to the op's own order, which
goes by the work the tests' emulator counts:

- M1 and M2: 8 KB of L1 data cache a core (github.com/philipturner/metal-benchmarks), too little for the rows under a
  depthwise kernel, so its input tile is staged in threadgroup memory, of which two threadgroups or more fit into a
  core's 64 KB. A thread has 128 registers (github.com/dougallj/applegpu), so attention holds one query each, not two.
- M3 on: registers, threadgroup memory and L1 share one on-chip memory, given out as it is used (Apple's "Explore GPU
  advancements in M3 and A17 Pro", 2023): a staged tile takes room from the cache that would hold the same values, so rows
  are read directly.
- M5: its GPU cores have matrix units, which MLX's fused attention uses (mlx/backend/metal, the kernels called nax) and
  ours cannot: attention goes to MLX, in heads that zeros widen to what its kernel takes.
- CUDA: a large L1, so rows are read directly. MLX hands attention in half precision to cuDNN, heads of 32 included
  (mlx/backend/cuda/scaled_dot_product_attention.cpp), which runs on tensor cores: the plain op it is.
"""

from __future__ import annotations

from collections.abc import Sequence

Launch = dict[str, int]  # a kernel's launch shape: names and meaning are the op's own
PLAIN = "plain"  # in place of a launch shape: the op is faster without its kernel

_STAGED_TILES = (
    {"staged": 1, "lanes": 4, "tiles": 4, "rows": 16, "width": 4},
    {"staged": 1, "lanes": 2, "tiles": 4, "rows": 8, "width": 4},
)
_ONE_QUERY = ({"threads": 128, "queries": 1, "block": 32},)
_SMALL_L1: dict[str, Sequence[Launch | str]] = {"depthwise_conv": _STAGED_TILES, "self_attention": _ONE_QUERY}

# family → op → launch shapes, the first that the kernel can run is taken, or PLAIN
PREFERRED: dict[str, dict[str, Sequence[Launch | str]]] = {
    "M1": _SMALL_L1,
    "M2": _SMALL_L1,
    "M3": {},
    "M4": {},
    "M5": {"self_attention": ({"padded_to": 64},)},
    "cuda": {"self_attention": (PLAIN,)},
}


def default_launch(op: str, family: str | None, candidates: Sequence[Launch]) -> Launch | str:
    """The launch shape for a family of chips, or PLAIN: the first preferred one that is on offer, else the first offered.

    Args:
        op: name of the op.
        family: see `chip.Chip`.
        candidates: the launch shapes on offer, at least one.
    """
    preferred = PREFERRED.get(family or "", {}).get(op, ())
    return next((launch for launch in preferred if launch == PLAIN or launch in candidates), candidates[0])
