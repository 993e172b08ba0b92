"""A server on a free port of this machine, for tests that call it as clients do."""

from __future__ import annotations

import base64
import re
import threading
import time
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from mlx_fastvlm.batch_generate import BatchGenerator
from mlx_fastvlm.server.limits import Limits

if TYPE_CHECKING:
    import openai

    from mlx_fastvlm.server.engine import Engine
    from mlx_fastvlm.server.run import Server

EXAMPLES = Path(__file__).parent.parent / "examples"


def openai_or_skip():
    """OpenAI's client library; without it or the server's own, the test file is skipped."""
    for module in ("fastapi", "uvicorn", "prometheus_client"):
        pytest.importorskip(module)
    return pytest.importorskip("openai")


@dataclass
class LiveServer:
    """A running server and how to reach it."""

    url: str  # ends in /v1
    engine: Engine
    server: Server
    key: str = "none"

    @property
    def port(self) -> int:
        return int(self.url.removesuffix("/v1").rpartition(":")[2])

    def openai(self) -> openai.OpenAI:
        import openai

        return openai.OpenAI(base_url=self.url, api_key=self.key, max_retries=0, timeout=60)

    def http(self, **settings) -> httpx.Client:
        # verify: to load the certificates, of which none is needed here, takes longer than most requests.
        return httpx.Client(base_url=self.url.removesuffix("/v1"), timeout=60, verify=False, **settings)

    def ask(self, question: str = "Describe this image.", *images: str | bytes, **options) -> Any:
        return self.openai().chat.completions.create(model="demo", messages=[user(question, *images)], **options)

    def figures(self) -> dict[str, float]:
        """/metrics by name and labels, without the common prefix; of all models together."""
        page = self.http().get("/metrics", headers={"Authorization": f"Bearer {self.key}"}).text
        return figures_of(page)

    def wait_for(self, name: str, value: float) -> None:
        """Return once a figure has reached a value."""
        wait_until(lambda: self.figures().get(name, 0) == value, f"{name} is not {value}")


def figures_of(page: str) -> dict[str, float]:
    """A page of /metrics; see `LiveServer.figures`."""
    figures: dict[str, float] = {}
    for line in page.splitlines():
        if not line.startswith("#"):
            name, _, value = line.removeprefix("mlx_fastvlm_").rpartition(" ")
            name = re.sub(r',?model="[^"]*"', "", name).replace("{,", "{").replace("{}", "")
            figures[name] = figures.get(name, 0) + float(value)
    return figures


@contextmanager
def serving(
    model,
    processor,
    limits: Limits | None = None,
    grace_seconds: float = 0.2,
    defaults: Mapping[str, Any] | None = None,
    others: Mapping[str, tuple] | None = None,
    **settings,
):
    """A `LiveServer` of the model "demo" in a thread, and afterwards the end of it.

    Args:
        model, processor: from `load`.
        limits, grace_seconds: of the server.
        defaults: options of the model's answers that requests leave open.
        others: more models by their names, as `load` gives them.
        settings: of `create_app`.
    """
    from mlx_fastvlm.server.app import ServedModel, create_app
    from mlx_fastvlm.server.run import Server, open_socket

    models = [ServedModel("demo", model, processor, defaults or {})]
    models += [ServedModel(name, *loaded) for name, loaded in (others or {}).items()]
    app = create_app(models, limits=limits or Limits(), **settings)
    with open_socket("127.0.0.1", 0) as listener:
        server = Server(app, grace_seconds)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        port = listener.getsockname()[1]
        wait_until(lambda: server.started, "the server has not started")
        try:
            engine = app.state.engines["demo"]
            yield LiveServer(f"http://127.0.0.1:{port}/v1", engine, server, settings.get("api_key") or "none")
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()


@dataclass
class SlowSteps:
    """Makes the steps of all engines wait: for a while each, or until they are let go."""

    seconds: float = 0.0
    may_go: threading.Event = field(default_factory=threading.Event)

    def install(self, monkeypatch) -> None:
        slow = self

        class SlowGenerator(BatchGenerator):
            def step(self, hurry: bool = False):
                slow.may_go.wait(30)
                time.sleep(slow.seconds)
                return super().step(hurry)

        monkeypatch.setattr("mlx_fastvlm.server.engine.BatchGenerator", SlowGenerator)


def long_answer(items: int) -> dict[str, Any]:
    """Fields of a request whose answer takes at least so many steps, whatever the model would rather say."""
    schema = {"type": "array", "items": {"type": "boolean"}, "minItems": items, "maxItems": items}
    form = {"type": "json_schema", "json_schema": {"name": "many", "schema": schema}}
    return {"max_tokens": 900, "response_format": form}


def user(question: str, *images: str | bytes) -> dict[str, Any]:
    """A user's message, images last as most clients send it."""
    urls = [image if isinstance(image, str) else data_url(image) for image in images]
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"role": "user", "content": [{"type": "text", "text": question}, *parts]}


def example(name: str) -> bytes:
    return (EXAMPLES / name).read_bytes()


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def wait_until(is_so, complaint: str, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, complaint
        time.sleep(0.02)
