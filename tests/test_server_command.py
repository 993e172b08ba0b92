"""`mlx-fastvlm serve` as a process: what it prints, what it refuses, how it ends and comes back."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from mlx_fastvlm import loading
from mlx_fastvlm.cli.options import Fit
from mlx_fastvlm.cli.serve import serve
from mlx_fastvlm.errors import OptionError
from tests.live_server import example, long_answer, openai_or_skip, user

openai = openai_or_skip()

COMMAND = [sys.executable, "-c", "from mlx_fastvlm.cli import main; main()", "serve"]


@contextmanager
def process(*options, **environment):
    """A server of the demo model on a free port, with its greeting."""
    settings = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
        "env": {**os.environ, **environment},
    }
    with subprocess.Popen([*COMMAND, "--model", "demo", *options], **settings) as started:
        try:
            greeting = ""
            while "Ctrl-C" not in greeting:
                line = started.stdout.readline()
                assert line, started.stderr.read()
                greeting += line
            yield started, greeting
        finally:
            started.kill()


def url_in(greeting: str) -> str:
    return re.search(r"http://[^ \n]+/v1", greeting)[0]


def client(greeting: str, key: str = "none"):
    url = url_in(greeting).replace("0.0.0.0", "127.0.0.1")
    return openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=30)


def long_stream(client):
    question = [user("Hello")]
    return client.chat.completions.create(model="demo", messages=question, stream=True, **long_answer(150))


def port_in(greeting: str) -> str:
    return re.search(r":(\d+)/v1", greeting)[1]


def test_it_says_how_to_call_it_and_ends_with_ctrl_c_though_a_client_listens():
    with process("--port", "0", "--host", "0.0.0.0", MLX_FASTVLM_API_KEY="s3cret") as (server, greeting):
        assert 'model="demo"' in greeting and f"curl {url_in(greeting)}/models" in greeting
        assert "s3cret" not in greeting and "Bearer" in greeting
        with pytest.raises(openai.AuthenticationError):
            client(greeting, "wrong").models.list()
        asked = {"model": "demo", "messages": [user("Hello", example("word.png"))], "max_tokens": 1}
        client(greeting, "s3cret").chat.completions.create(**asked, extra_body={"resolution": 320})  # not worth a note
        stream = long_stream(client(greeting, "s3cret"))
        next(stream)
        server.send_signal(signal.SIGINT)
        out, err = server.communicate(timeout=30)
        assert (server.returncode, out, err) == (0, "Stopped.\n", "")


def test_a_killed_server_comes_back_on_the_same_port():
    with process("--port", "0") as (server, greeting):
        stream = long_stream(client(greeting))
        next(stream)
        server.kill()
        server.wait(10)
        with pytest.raises(Exception, match="(?i)connection error|peer closed|incomplete|reset|disconnected"):
            list(stream)
    with process("--port", port_in(greeting)) as (again, greeting_again):
        assert url_in(greeting_again) == url_in(greeting)
        completions = client(greeting_again).chat.completions
        answer = completions.create(model="demo", messages=[user("Hello")], max_tokens=2)
        assert answer.usage.completion_tokens <= 2
        again.terminate()
        assert again.wait(20) == 0


def test_every_running_stream_of_a_server_that_is_told_to_stop_ends_or_says_why():
    with process("--port", "0") as (server, greeting):
        streams = [long_stream(client(greeting)) for _ in range(3)]
        streams.append(
            client(greeting).chat.completions.create(model="demo", messages=[user("Hello")], stream=True, max_tokens=3)
        )
        for stream in streams:
            next(stream)
        server.send_signal(signal.SIGTERM)
        endings = [ending_of(stream) for stream in streams]
        out, err = server.communicate(timeout=30)
    assert (server.returncode, out, err) == (0, "Stopped.\n", "")
    assert all(ending in ("stop", "length", "stopping") for ending in endings), endings
    assert endings[-1] in ("stop", "length")  # it had time enough


def ending_of(stream) -> str:
    """The reason that the last chunk gives, or "stopping" where an error says so."""
    try:
        return [choice.finish_reason for chunk in stream for choice in chunk.choices][-1]
    except openai.APIError as error:
        return "stopping" if "stopping" in str(error) else repr(error)


def test_a_killed_server_comes_back_at_once_though_clients_are_connected():
    with process("--port", "0") as (server, greeting):
        streams = [long_stream(client(greeting)) for _ in range(3)]
        for stream in streams:
            next(stream)
        server.kill()  # and the next one does not even wait for its end
        with process("--port", port_in(greeting)) as (again, greeting_again):
            assert url_in(greeting_again) == url_in(greeting)
            completions = client(greeting_again).chat.completions
            answer = completions.create(model="demo", messages=[user("Hello")], max_tokens=2)
            assert answer.usage.completion_tokens <= 2
            assert again.poll() is None
        for stream in streams:
            stream.close()


def test_a_second_server_on_a_port_says_so_in_one_line():
    with process("--port", "0") as (_, greeting):
        second = subprocess.run(
            [*COMMAND, "--model", "demo", "--port", port_in(greeting)], capture_output=True, text=True, timeout=60
        )
    assert second.returncode == 1 and second.stdout == ""
    assert re.fullmatch(rf".*port {port_in(greeting)} cannot be used \(.*in use.*\).*--port.*\n", second.stderr)


def test_several_models_and_how_they_see_pictures(tmp_path):
    copy = tmp_path / "second"
    shutil.copytree(Path(loading.__file__).parent / "assets" / "demo", copy)
    with process("--port", "0", "--model", str(copy), "--resolution", "320") as (_, greeting):
        assert greeting.startswith("demo, ")
        cards = list(client(greeting).models.list())
        assert [card.mlx_fastvlm["default_resolution"] for card in cards] == [320, 320]
        for card in cards:
            assert client(greeting).chat.completions.create(model=card.id, messages=[user("Hello")], max_tokens=1).id


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("resolution", 300, "multiple of 64"),
        ("fit", Fit.tiles, "--fit pad, crop or native"),
        ("max_image_mp", 0, "max_image_mp is 0"),
        ("api_key", "sésame", "ASCII"),
        ("api_key", "open sesame", "no spaces"),
        ("api_key", "", "ASCII"),
    ],
)
def test_what_cannot_be_had_is_said_at_the_start(option, value, words):
    with pytest.raises(OptionError, match=words):
        serve(model=["demo"], port=0, **{option: value})


def test_a_port_in_use_is_said_to_be_so():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(OptionError, match=f"{port} cannot be used .*in use.*--port"):
            serve(model=["demo"], port=port)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "example.org", "192.168.0.1"])
def test_others_need_a_key(host):
    with pytest.raises(OptionError, match="--api-key"):
        serve(model=["demo"], host=host)


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(OptionError, match=r"needs uvicorn: run `pip install 'mlx-fastvlm\[server\]'`"):
        serve(model=["demo"])


def test_a_wrong_limit_is_said_to_be_so():
    with pytest.raises(OptionError, match="max_request_mb is 0"):
        serve(model=["demo"], max_request_mb=0)
