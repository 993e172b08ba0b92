"""`mlx-fastvlm bench …`: the benchmarks as commands.

Each benchmark has its own parser (see benchmarks/command.py); the arguments are handed to it as they are, so that the
command and `python -m mlx_fastvlm.benchmarks.NAME` are one thing. A benchmark is imported when it is asked for.
"""

from __future__ import annotations

from importlib import import_module

import typer

from mlx_fastvlm.benchmarks import COMMANDS
from mlx_fastvlm.cli.terminal import say

bench = typer.Typer(
    name="bench",
    help="Measure: time to first token, peers, kernels.",
    epilog="Every command explains itself: mlx-fastvlm bench ttft --help",
    rich_markup_mode=None,
    invoke_without_command=True,
)
# --help too is the benchmark's own.
_AS_THEY_ARE = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


@bench.callback()
def _group(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        say(context.get_help())


def _run(context: typer.Context) -> None:
    module = import_module(f"mlx_fastvlm.benchmarks.{context.info_name.replace('-', '_')}")
    module.main(context.args)


for _name, _summary in COMMANDS.items():
    bench.command(_name, help=_summary, context_settings=_AS_THEY_ARE, add_help_option=False)(_run)
