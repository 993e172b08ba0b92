"""The parent's side of peers and headline: starts a runner and asks it; see `runner` for the lines between them."""

from __future__ import annotations

import json
import signal
import subprocess
import tempfile
import time
from typing import Any

from .child import module_command
from .command import BenchmarkError


class Unavailable(Exception):
    """This runner cannot run here; the message says why."""


class RunnerProcess:
    """One implementation, loaded in a process of its own. A context manager: leaving it ends the process.

    Args:
        name: a key of `runners.RUNNERS` or `headline_runners.HEADLINE_RUNNERS`.
        python: interpreter that has this package and the implementation.
        options: "device" ("auto" or "cpu", see `machine.use_device`), "blas" ("auto" or "off", see `machine.use_blas`)
            and what the implementation's loader takes.

    Attributes:
        ready: what the runner said when it was loaded.
        start_seconds: from the start of the process to that moment, imports included.

    Raises:
        Unavailable: a library is missing, or the interpreter is.
        BenchmarkError: the runner broke.
    """

    def __init__(self, name: str, python: str, options: dict[str, Any]):
        self.name = name
        self._complaints = tempfile.TemporaryFile()  # noqa: SIM115 - closed in __exit__
        command = module_command("mlx_fastvlm.benchmarks.runner", name, json.dumps(options), python=python)
        start = time.perf_counter()
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._complaints, text=True
            )
        except OSError as error:
            self._complaints.close()
            raise Unavailable(f"{python} cannot be started ({error.strerror})") from None
        try:
            self.ready = self._receive()
            if "unavailable" in self.ready:
                raise Unavailable(self.ready["unavailable"])
        except BaseException:
            self.close()
            raise
        self.start_seconds = time.perf_counter() - start

    def ask(self, **request: Any) -> dict[str, Any]:
        """One reply, such as `runner.answer` gives."""
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the runner has ended; _receive tells why
        return self._receive()

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self._process.kill()
        self._process.communicate()
        self._complaints.close()

    def __enter__(self) -> RunnerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _receive(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            if self._process.wait() == -signal.SIGKILL:
                raise BenchmarkError(f"The {self.name} runner was killed, probably for want of memory.")
            self._complaints.seek(0)
            lines = self._complaints.read().decode(errors="replace").strip().splitlines()
            reason = lines[-1] if lines else f"exit code {self._process.returncode}"
            raise BenchmarkError(f"The {self.name} runner broke: {reason}")
        return json.loads(line)
