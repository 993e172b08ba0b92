"""Python processes that a measurement starts: their command lines, and the pipe they answer through.

None of them imports what lies in the current folder.
`python -m` and `python -c` put the current folder first on sys.path, where a photo folder's own `random.py` would be
run in place of the standard library's. Python has a switch against that only from 3.11 on (-P).
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any, TextIO

_LEAVE_FOLDER = "import sys; sys.path[:] = [entry for entry in sys.path if entry]\n"
_RUN_MODULE = "import runpy; runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"


def module_command(module: str, *arguments: str, python: str = sys.executable) -> list[str]:
    """What `python -m module arguments` does, without the current folder on the path."""
    return code_command(_RUN_MODULE, module, *arguments, python=python)


def code_command(code: str, *arguments: str, python: str = sys.executable) -> list[str]:
    """What `python -c code arguments` does, without the current folder on the path."""
    return [python, "-c", _LEAVE_FOLDER + code, *arguments]


def claim_stdout() -> TextIO:
    """In a child: keep stdout for replies; whatever else writes to it reaches stderr."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return replies


def send(replies: TextIO, message: dict[str, Any]) -> None:
    """In a child: one reply, one JSON line."""
    replies.write(json.dumps(message) + "\n")
    replies.flush()
