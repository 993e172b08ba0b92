"""The application: what is common to all commands, and the entry point that turns known errors into one line.

Answers go to stdout; everything else goes to stderr. Exit codes: 0 done, 1 something the user can mend, 130 Ctrl-C.
"""

from __future__ import annotations

import signal
import sys
import warnings
from typing import Annotated

import typer

from mlx_fastvlm import __version__
from mlx_fastvlm.cli import calibrate_resolution, caption, chat, describe, embed, kernels, models, serve, watch
from mlx_fastvlm.cli.bench import bench
from mlx_fastvlm.cli.eval import evaluation
from mlx_fastvlm.cli.terminal import say
from mlx_fastvlm.errors import FastVLMError, FastVLMWarning

_INTERRUPTED = 130  # exit code of a program that Ctrl-C ended
# The base of every wrong-usage error. Newer typers carry a copy of click, older ones use click itself; both lead here.
_UsageErrors = typer.BadParameter.__mro__[2]

app = typer.Typer(
    name="mlx-fastvlm",
    help="Run Apple's FastVLM on MLX: describe pictures, chat about them, caption folders, convert checkpoints.",
    epilog="Start without any download: mlx-fastvlm describe examples/shapes-two.png --model demo",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for _command in (
    describe.describe, chat.chat, caption.caption, watch.watch, embed.embed, serve.serve,
    models.convert, models.quantize, models.fidelity, models.verify, models.info,
    calibrate_resolution.calibrate_resolution,
    kernels.tune, kernels.selftest,
):  # fmt: skip
    app.command()(_command)
app.add_typer(evaluation)
app.add_typer(bench)


def _show_version(asked: bool) -> None:
    if asked:
        say(f"mlx-fastvlm {__version__}")
        raise typer.Exit()


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        say(context.get_help())


def main() -> None:
    """Entry point: run the command line, with known errors as one line on stderr."""
    signal.signal(signal.SIGTERM, _interrupt)  # clean up as on Ctrl-C
    warnings.showwarning = _show_warning
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal that cannot show a character shows "?"
    try:
        code = app(standalone_mode=False) or 0
        sys.stdout.flush()
        if code == _INTERRUPTED:  # typer has caught the Ctrl-C
            raise KeyboardInterrupt
    except FastVLMError as error:
        code = _fail(str(error))
    except _UsageErrors as error:
        message = error.format_message().replace("Value error, ", "").rstrip(".")  # pydantic's words, typer's message
        code = _fail(f"{message}. See: mlx-fastvlm --help")
    except (KeyboardInterrupt, typer.Abort):
        print("\nStopped.", file=sys.stderr)
        code = _INTERRUPTED
    except OSError as error:
        code = _fail(f"The output cannot be written: {error.strerror or error}.")
    sys.exit(code)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _show_warning(message: Warning | str, category: type[Warning], *where: object) -> None:
    """A warning of ours as one line, without the place in the code; others as Python shows them."""
    text = f"Note: {message}\n" if issubclass(category, FastVLMWarning) else None
    print(text or warnings.formatwarning(message, category, *where[:2]), end="", file=sys.stderr)


def _fail(message: str) -> int:
    print(f"mlx-fastvlm: {' '.join(message.split())}", file=sys.stderr)
    return 1
