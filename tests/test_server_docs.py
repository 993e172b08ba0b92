"""What docs/server.md says can be run as it stands there, but for the model, the port and the picture."""

import os
import plistlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_fastvlm import generate, load
from tests.live_server import EXAMPLES, openai_or_skip, serving

openai_or_skip()

DOCS = (Path(__file__).parent.parent / "docs" / "server.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def demo():
    return load("demo")


@pytest.fixture(scope="module")
def live(demo):
    with serving(*demo) as server:
        yield server


def block(language: str, words: str) -> str:
    """The one block of code of a language that has these words."""
    (found,) = [
        code for kind, code in re.findall(r"```(\w+)\n(.*?)```", DOCS, re.DOTALL) if kind == language and words in code
    ]
    return found


def run(command: list[str], code: str, live, folder: Path, **environment: str) -> str:
    """What a block prints, asked of the demo model about a picture with a word."""
    shutil.copy(EXAMPLES / "word.png", folder / "photo.jpg")  # the ending is no matter
    code = code.replace("apple/FastVLM-0.5B", "demo").replace(":8080", f":{live.port}")
    done = subprocess.run(
        [*command, code], capture_output=True, text=True, cwd=folder, timeout=60, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_from_openais_client(live, demo, tmp_path):
    answer = run([sys.executable, "-c"], block("python", "openai.OpenAI"), live, tmp_path)
    assert answer == generate(*demo, "What is on the table?", EXAMPLES / "word.png")


def test_from_anthropics_client(live, demo, tmp_path):
    pytest.importorskip("anthropic")
    answer = run([sys.executable, "-c"], block("python", "anthropic.Anthropic"), live, tmp_path)
    assert answer == generate(*demo, "What is on the table?", EXAMPLES / "word.png")


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_from_curl(live, demo, tmp_path):
    answer = run(["bash", "-c"], block("sh", "photo.jpg"), live, tmp_path)
    assert answer == generate(*demo, "Describe this image.", EXAMPLES / "word.png")


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_from_a_script_for_a_part_of_the_screen(live, demo, tmp_path):
    screencapture = tmp_path / "screencapture"  # a Mac's
    screencapture.write_text(f'#!/bin/sh\ncp "{EXAMPLES / "word.png"}" "$4"\n')
    screencapture.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    answer = run(["bash", "-c"], block("sh", "screencapture"), live, tmp_path, PATH=path)
    assert answer == generate(*demo, "What is this? Answer in one sentence.", EXAMPLES / "word.png", max_tokens=100)


def test_the_launch_agent_runs_the_command():
    agent = plistlib.loads(block("xml", "<plist").encode())
    assert agent["ProgramArguments"][0].endswith("/mlx-fastvlm") and agent["ProgramArguments"][1] == "serve"
    assert agent["RunAtLoad"] is agent["KeepAlive"] is True


def test_every_option_that_is_named_is_one():
    command = [sys.executable, "-c", "from mlx_fastvlm.cli import main; main()", "serve", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"}).stdout
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", DOCS))
    assert named and all(option in shown for option in named), named
