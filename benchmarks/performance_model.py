"""From a chip's published figures and a list of launches to a predicted time. A model: nothing here is measured.

A launch takes as long as the slowest of three things, and then the overhead of being launched:
  memory   device bytes at the chip's bandwidth
  compute  operations at its arithmetic's speed (matrix products at that of neural accelerators where it has some)
  on-core  loads and stores of threads at 64 bytes a cycle and core
Three numbers say what share of a peak programs reach, and one is fitted:
  BANDWIDTH_SHARE   published measurement, not fitted
  COMPUTE_SHARE     published measurement, not fitted
  LAUNCH_SECONDS    fitted to one published point, marked in published_points.py
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .apple_chips import Chip
from .op_work import Launch

# Hübner et al., "Apple vs. Oranges", https://arxiv.org/abs/2502.05317: the M4 reached up to 100 of its 120 GB/s, and 2.9
# float32 TFLOPS in Apple's own matrix product; the hardware table behind apple_chips.py says 4.6.
BANDWIDTH_SHARE = 100 / 120
COMPUTE_SHARE = 2.9 / 4.6
# A core's data cache delivers 64 bytes in the cycle in which its arithmetic does 256 operations (M1 and M2 families,
# https://github.com/philipturner/metal-benchmarks at dc2adc6). Taken for threadgroup memory and later families too.
ON_CORE_BYTES_PER_FLOP = 64 / 256
# One launch behind another it depends on. Fitted; others measured 2 to 3 µs a call from PyTorch on Metal
# (https://github.com/modular/modular/issues/6566).
LAUNCH_SECONDS = 2.53e-6

BOUNDS = ("memory", "compute", "on-core", "launch")


@dataclass(frozen=True)
class Prediction:
    """Predicted seconds of some launches, split by what they wait for.

    Attributes:
        waits: each of BOUNDS → seconds; their sum is the time.
        launches: how many.
    """

    waits: Mapping[str, float]
    launches: int

    @property
    def seconds(self) -> float:
        return sum(self.waits.values())

    def share(self, bound: str) -> float:
        """Share of the time spent waiting for one of BOUNDS."""
        return self.waits[bound] / self.seconds


def predict(launches: Iterable[Launch], chip: Chip) -> Prediction:
    """The time of launches that run one after the other. Raises ValueError if there are none or one does no work."""
    waits = dict.fromkeys(BOUNDS, 0.0)
    count = 0
    for launch in launches:
        seconds = _seconds(launch, chip)
        slowest = max(seconds, key=lambda name: seconds[name])
        if seconds[slowest] <= 0:
            raise ValueError(f"{launch} moves and computes nothing")
        waits[slowest] += seconds[slowest]
        waits["launch"] += LAUNCH_SECONDS
        count += 1
    if count == 0:
        raise ValueError("there is nothing to predict")
    return Prediction(waits, count)


def _seconds(launch: Launch, chip: Chip) -> dict[str, float]:
    arithmetic = chip.flops.value * COMPUTE_SHARE
    return {
        "memory": launch.device_bytes / (chip.bandwidth.value * BANDWIDTH_SHARE),
        "compute": launch.matmul_flops / (chip.matmul_flops * COMPUTE_SHARE) + launch.vector_flops / arithmetic,
        "on-core": launch.on_core_bytes / (arithmetic * ON_CORE_BYTES_PER_FLOP),
    }
