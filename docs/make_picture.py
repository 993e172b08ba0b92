"""Runs commands and saves what the terminal showed as docs/run.svg: `python docs/make_picture.py`, from the repository."""

import shlex
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

COMMANDS = [
    "mlx-fastvlm describe examples/shapes-three.png --model demo --stats",
    'mlx-fastvlm describe examples/shapes-two.png "How many shapes are there?" --model demo',
    "mlx-fastvlm describe examples/word.png --preset read --model demo",
]
WIDTH = 112  # characters


def main() -> None:
    console = Console(record=True, width=WIDTH, force_terminal=True)
    for command in COMMANDS:
        console.print(Text("$ ", style="bold green") + Text(command, style="bold"))
        program, *arguments = shlex.split(command)
        done = subprocess.run(
            [Path(sys.executable).parent / program, *arguments],
            check=True,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        console.print(Text(done.stdout))
    console.save_svg(str(Path(__file__).parent / "run.svg"), title="mlx-fastvlm")


if __name__ == "__main__":
    main()
