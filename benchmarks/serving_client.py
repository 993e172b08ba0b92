"""What a client of the server sees: `mlx-fastvlm serve` in a process of its own, asked over HTTP, answers streamed.

A client is the standard library's: what it adds to the server's times is next to nothing.
"""

from __future__ import annotations

import base64
import json
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException

from .command import BenchmarkError, installed_command
from .machine import resident_bytes

_START_SECONDS = 120  # a large model loads for a while
_ANSWER_SECONDS = 300
_METRICS_PREFIX = "mlx_fastvlm_"


@dataclass(frozen=True)
class ServedAnswer:
    """One answer as its client saw it. Times are of the performance counter, in seconds.

    Attributes:
        start: the picture's bytes are at hand, nothing is sent.
        first: the first words were there.
        end: the last event was there.
        text: all words.
        tokens: of the answer, as the server counts them.
        stages: the server's own times up to the first token, in seconds.
    """

    start: float
    first: float
    end: float
    text: str
    tokens: int
    stages: dict[str, float]

    @property
    def ttft(self) -> float:
        """Seconds to the first words."""
        return self.first - self.start


@dataclass(frozen=True)
class ServedModel:
    """A running server.

    Attributes:
        port: on this machine.
        model_id: what it calls its model.
        pid: its process.
    """

    port: int
    model_id: str
    pid: int

    def rss(self) -> int:
        """Bytes resident now. Raises BenchmarkError if the server has ended."""
        size = resident_bytes(self.pid)
        if size is None:
            raise BenchmarkError("The server has ended before its time.")
        return size

    def figures(self) -> dict[str, float]:
        """/metrics of the server's only model, by name without prefix and labels."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=_ANSWER_SECONDS)
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
        connection.close()
        pairs = (line.rpartition(" ") for line in lines if not line.startswith("#"))
        return {name.removeprefix(_METRICS_PREFIX).partition("{")[0]: float(value) for name, _, value in pairs}

    def ask(self, client: str, picture: bytes, kind: str, question: str, max_tokens: int) -> ServedAnswer:
        """Send a question about a picture, over a connection of its own, and read the answer's events as they come.

        Args:
            client: whose turn it is when others ask too.
            picture: a file's content.
            kind: its media type.
            question: about it.
            max_tokens: longest answer.

        Raises:
            BenchmarkError: the server answers with an error, or not at all.
        """
        start = time.perf_counter()
        url = f"data:{kind};base64,{base64.b64encode(picture).decode()}"
        content = [{"type": "text", "text": question}, {"type": "image_url", "image_url": {"url": url}}]
        body = {
            "model": self.model_id,
            "user": client,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        connection = HTTPConnection("127.0.0.1", self.port, timeout=_ANSWER_SECONDS)
        try:
            connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != 200:
                raise BenchmarkError(f"The server answers {response.status}: {response.read(500).decode()}")
            return _read(start, response)
        except (OSError, HTTPException) as error:
            raise BenchmarkError(f"The server does not answer ({error!r}).") from None
        finally:
            connection.close()


@contextmanager
def serve(model: str, dtype: str, *options: str) -> Iterator[ServedModel]:
    """A server on a free port, and afterwards the end of it.

    Args:
        model: as `mlx-fastvlm serve --model` takes it.
        dtype: to compute in.
        options: further ones of the command line.

    Raises:
        BenchmarkError: it does not start; its own message is repeated.
    """
    command = [str(installed_command()), "serve", "--model", model, "--dtype", dtype, "--port", "0", *options]
    with tempfile.TemporaryFile("w+") as words, subprocess.Popen(command, stdout=words, stderr=words) as process:
        try:
            port = _wait_for_port(process, words)
            yield ServedModel(port, _model_id(port), process.pid)
        finally:
            process.terminate()


def _read(start: float, lines: Iterator[bytes]) -> ServedAnswer:
    """An answer from the lines of its events."""
    first, texts, tokens, stages = None, [], 0, {}
    for line in lines:
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[len(b"data: ") :])
        if "error" in event:
            raise BenchmarkError(f"The server breaks off: {event['error']['message']}")
        for choice in event["choices"]:
            if words := choice["delta"].get("content"):
                first = first or time.perf_counter()
                texts.append(words)
        tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
        stages = event.get("timings", {}).get("stages", stages)
    end = time.perf_counter()
    return ServedAnswer(start, first or end, end, "".join(texts), tokens, stages)


def _wait_for_port(process: subprocess.Popen, words) -> int:
    """The port that a starting server names once it listens."""
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        words.seek(0)
        said = words.read()
        if named := re.search(r"http://127\.0\.0\.1:(\d+)", said):
            return int(named[1])
        if process.poll() is not None:
            raise BenchmarkError(f"The server does not start: {(said.strip() or 'no message').splitlines()[-1]}")
        time.sleep(0.05)
    raise BenchmarkError(f"The server has not started within {_START_SECONDS} s.")


def _model_id(port: int) -> str:
    """What the server calls its (first) model; asked until it answers, as it names its port before it does."""
    deadline = time.monotonic() + _START_SECONDS
    while True:
        connection = HTTPConnection("127.0.0.1", port, timeout=_ANSWER_SECONDS)
        try:
            connection.request("GET", "/v1/models")
            return json.loads(connection.getresponse().read())["data"][0]["id"]
        except (OSError, HTTPException):
            if time.monotonic() > deadline:
                raise BenchmarkError("The server does not answer.") from None
            time.sleep(0.05)
        finally:
            connection.close()
