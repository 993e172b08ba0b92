"""Published figures of the chips that the performance model predicts for: memory bandwidth and arithmetic, with sources.

Only published numbers; what share of them programs reach is the model's business (performance_model.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from .command import BenchmarkError

APPLE = "Apple"
REPORTED = "Apple, by MacRumors"
THIRD_PARTY = "third party"


@dataclass(frozen=True)
class Figure:
    """A published number.

    Attributes:
        value: in base units: bytes per second, operations per second.
        publisher: APPLE, REPORTED or THIRD_PARTY.
        url: where it stands.
    """

    value: float
    publisher: str
    url: str


@dataclass(frozen=True)
class Chip:
    """One chip with all its GPU cores.

    Attributes:
        name: as MLX and users call it, without "Apple".
        gpu_cores: of the largest version, which the figures are of.
        bandwidth: bytes per second between memory and the chip.
        flops: operations per second of the GPU's ordinary arithmetic, two per multiply-add; float16 and float32 alike.
        accelerator_flops: float16 operations per second of the neural accelerators in the GPU's cores, where there are
            some; matrix products run on them.
    """

    name: str
    gpu_cores: int
    bandwidth: Figure
    flops: Figure
    accelerator_flops: Figure | None = None

    @property
    def family(self) -> str:
        """Its generation, "M1" to "M5"."""
        return self.name.split()[0]

    @property
    def matmul_flops(self) -> float:
        """Operations per second that a matrix product can use."""
        return (self.accelerator_flops or self.flops).value


_NEWSROOM = "https://www.apple.com/newsroom"
_HARDWARE_TABLE = "https://github.com/huggingface/huggingface.js/blob/main/packages/tasks/src/hardware.ts"
_HARDWARE_FIX = "https://github.com/huggingface/huggingface.js/pull/1044"  # M3 corrected; M4 and M4 Max added
_ACCELERATORS = (
    "https://tzakharko.github.io/apple-neural-accelerators-benchmark"  # measured on A19, scaled by its author
)


def _apple(gigabytes_per_second: float, page: str) -> Figure:
    return Figure(gigabytes_per_second * 1e9, APPLE, page)


def _third_party(teraflops: float, url: str) -> Figure:
    return Figure(teraflops * 1e12, THIRD_PARTY, url)


CHIPS = (
    Chip(
        "M1 Max",
        32,
        _apple(
            400,
            f"{_NEWSROOM}/2021/10/introducing-m1-pro-and-m1-max-the-most-powerful-chips-apple-has-ever-built/",
        ),
        _third_party(10.4, _HARDWARE_TABLE),
    ),
    Chip(
        "M2",
        10,
        _apple(100, f"{_NEWSROOM}/2022/06/apple-unveils-m2-with-breakthrough-performance-and-capabilities/"),
        _third_party(3.6, _HARDWARE_TABLE),
    ),
    Chip(
        "M2 Ultra",
        76,
        _apple(800, f"{_NEWSROOM}/2023/06/apple-introduces-m2-ultra/"),
        _third_party(27.2, _HARDWARE_TABLE),
    ),
    Chip("M3", 10, _apple(100, "https://support.apple.com/en-us/117735"), _third_party(4.1, _HARDWARE_FIX)),
    Chip(
        "M4",
        10,
        _apple(120, f"{_NEWSROOM}/2024/05/apple-introduces-m4-chip/"),
        _third_party(4.6, _HARDWARE_FIX),
    ),
    Chip(
        "M4 Max",
        40,
        _apple(546, f"{_NEWSROOM}/2024/10/apple-introduces-m4-pro-and-m4-max/"),
        _third_party(18.4, _HARDWARE_FIX),
    ),
    Chip(
        "M5 Max",
        40,
        Figure(
            614e9,
            REPORTED,
            "https://www.macrumors.com/2026/03/03/apple-unveils-macbook-pro-with-m5-pro-and-m5-max-chips-with-neural-accelerators/",
        ),
        _third_party(18, _ACCELERATORS),
        _third_party(70, _ACCELERATORS),
    ),
)


def chip_named(name: str) -> Chip:
    """The chip called `name`, in any case, with or without "Apple". Raises BenchmarkError if there is none."""
    wanted = name.lower().removeprefix("apple ").strip()
    for chip in CHIPS:
        if chip.name.lower() == wanted:
            return chip
    known = ", ".join(chip.name for chip in CHIPS)
    raise BenchmarkError(f"No figures are known for a chip {name!r}; known: {known}.")
