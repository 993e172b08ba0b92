"""Fidelity: how far a smaller model strays from the one it was made of, and what it saves.

    from mlx_fastvlm.fidelity import measure, format_fidelity
    print(format_fidelity(measure("./fastvlm-0.5b", "./fastvlm-0.5b-int8", images=["a.jpg", "b.jpg"])))

A tool of measurement, like the benchmarks whose stopwatch and tables it shares; the runtime does not need it.
"""

from mlx_fastvlm.fidelity.command import run
from mlx_fastvlm.fidelity.comparison import DEFAULT_MAX_TOKENS, DEFAULT_PROMPTS, measure
from mlx_fastvlm.fidelity.plot import plot_fidelity
from mlx_fastvlm.fidelity.report import format_fidelity, read_fidelity, write_card_entry
from mlx_fastvlm.fidelity.results import Fidelity

__all__ = [
    "DEFAULT_MAX_TOKENS",
    "DEFAULT_PROMPTS",
    "Fidelity",
    "format_fidelity",
    "measure",
    "plot_fidelity",
    "read_fidelity",
    "run",
    "write_card_entry",
]
