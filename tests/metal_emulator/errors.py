"""The one exception for what a caller of the emulator can mend."""

from __future__ import annotations


class EmulationError(Exception):
    """A kernel that does not compile, or a call that cannot be emulated; the message says which and why."""
