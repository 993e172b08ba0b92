"""Command lines of Python processes that a measurement starts: none of them imports what lies in the current folder.

`python -m` and `python -c` put the current folder first on sys.path, where a photo folder's own `random.py` would be
run in place of the standard library's. Python has a switch against that only from 3.11 on (-P).
"""

from __future__ import annotations

import sys

_LEAVE_FOLDER = "import sys; sys.path[:] = [entry for entry in sys.path if entry]\n"
_RUN_MODULE = "import runpy; runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"


def module_command(module: str, *arguments: str, python: str = sys.executable) -> list[str]:
    """What `python -m module arguments` does, without the current folder on the path."""
    return code_command(_RUN_MODULE, module, *arguments, python=python)


def code_command(code: str, *arguments: str, python: str = sys.executable) -> list[str]:
    """What `python -c code arguments` does, without the current folder on the path."""
    return [python, "-c", _LEAVE_FOLDER + code, *arguments]
