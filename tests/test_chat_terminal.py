"""The chat in a terminal: real sessions behind a pseudo-terminal, keys in, the screen looked at."""

import re
import shutil
import stat
import sys
import termios
from pathlib import Path

import pytest

from mlx_fastvlm import Conversation, load
from tests.terminal_session import TerminalSession

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
PROGRAM = [sys.executable, "-c", "from mlx_fastvlm import cli; cli.main()", "chat"]
CTRL_C, CTRL_D, CTRL_J, CTRL_R, ALT_ENTER, TAB, UP = "\x03", "\x04", "\n", "\x12", "\x1b\r", "\t", "\x1b[A"


@pytest.fixture
def folder(tmp_path):
    """A folder with pictures, where the chat runs."""
    for name in ("shapes-two.png", "number.png"):
        shutil.copy(EXAMPLES / name, tmp_path)
    shutil.copy(EXAMPLES / "number.png", tmp_path / "my photo.png")
    return tmp_path


@pytest.fixture
def chat(folder):
    """Begin a chat in a terminal: arguments → session, to be used in a `with` block."""

    def started(*arguments, model="demo", **terminal):
        return TerminalSession([*PROGRAM, *arguments, "--model", model], folder=folder, **terminal)

    return started


def test_a_conversation(chat, folder):
    expected = Conversation(*load("demo"), folder / "shapes-two.png")
    expected.ask("How many shapes are there?")
    with chat("shapes-two.png") as session:
        session.wait_for_prompt()
        assert "Reading shapes-two.png… " in session.text()
        assert session.enter("How many shapes are there?") == "two"
        described = " ".join(session.enter("Describe this image.").split())
        assert described == expected.ask("Describe this image.")
        assert session.enter("/retry").split("\n", 1)[1] == session.enter("/retry").split("\n", 1)[1]
        assert "known from before" in session.enter("/stats")
        assert session.enter("/save chat.json") == "Saved 2 questions to chat.json."
        session.keys(CTRL_C)
        session.wait_for("leaves the chat.\n\n>")
        session.keys(CTRL_D)
        assert session.ended() == 0
    with chat("--load", "chat.json", "number.png", "--plain") as session:
        session.wait_for_prompt()
        assert "Reading number.png… " in session.text() and "one image at a time" in session.text()
        assert "1. [shapes-two.png] How many shapes are there?\n   two" in session.enter("/history")
        session.keys(UP * 5)  # what was entered in the session before is at hand
        session.wait(lambda: session.cursor_line() == "> Describe this image.", "an earlier question")
        session.keys(CTRL_C)
        session.wait_for_prompt()
        session.keys(CTRL_R + "many")
        session.wait_for("How many shapes are there?\n")
        session.keys("\r")
        session.wait(lambda: session.cursor_line() == "> How many shapes are there?", "the question found")
        session.keys(CTRL_C)
        session.wait_for_prompt()
        assert session.enter("/clear")
        assert session.enter("/image my photo.png").startswith("Reading my photo.png… ")
        assert session.enter("What is written in this image? Output only the text in the image.") == "406"
        session.keys("/exit\r")
        assert session.ended() == 0
    history = folder / "cache" / "chat-history"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600 and "+/exit" in history.read_text()


def test_keys(chat, folder):
    with chat() as session:
        session.wait_for_prompt()
        session.keys("/ima" + TAB)
        session.wait(lambda: session.cursor_line() == "> /image", "a command completed")
        session.keys("my" + TAB)
        session.wait(lambda: session.cursor_line() == r"> /image my\ photo.png", "a file completed")
        session.keys("\r")
        session.wait_for("Reading my photo.png… ")
        session.wait_for_prompt()
        assert session.enter("/undo") == "Took back my photo.png."
        session.paste(f"file://{folder}/my%20photo.png ")
        session.wait_for("my%20photo.png")
        session.keys("\r")
        session.wait(lambda: session.text().count("Reading my photo.png… ") == 2, "the picture dropped")
        session.wait_for_prompt()

        session.paste("one\ntwo\r\nthree")
        session.wait(lambda: session.cursor_line() == "  three", "the lines pasted")
        session.keys(CTRL_J + "four" + ALT_ENTER + "five\\\rsix")
        session.wait(lambda: session.cursor_line() == "  six", "the lines typed")
        session.keys("\r")
        session.wait_for_prompt()
        assert session.enter("/history").startswith("1. [my photo.png] one\ntwo\nthree\nfour\nfive\nsix\n")

        session.keys("forget this")
        session.wait_for("> forget this")
        session.keys(CTRL_C)
        session.wait_for_prompt()
        assert "forget this" not in session.text()
        session.terminate()
        assert session.ended() == 143
        assert is_at_rest(session)


def test_ctrl_c_stops_the_answer_and_the_next_one_is_exact(chat, folder, converted_folder):
    random_model = converted_folder("inference")
    endless = ("--max-tokens", 30_000, "--repetition-penalty", 0.5)  # what was said gets ever likelier: no end comes
    with chat("number.png", *endless, "--stats", model=random_model, rows=8, columns=50) as session:
        session.wait_for_prompt()
        session.keys("Go on.\r")
        session.wait(lambda: is_long(session), "an answer longer than the screen")
        session.keys("gone")  # is not shown in the answer; as in a shell, Ctrl-C drops what was typed before it
        for _ in range(3):
            before = session.text()
            session.wait(lambda before=before: session.text() != before, "more of the answer")
            assert "gone" not in session.text()
        session.keys(CTRL_C + "/set max_tokens 8\r")  # what comes after it waits for the prompt
        session.wait_for("max_tokens is 8 now.")
        session.wait_for_prompt()
        assert session.text().count("Stopped. The next question") == 1
        assert session.text().count("/set max_tokens 8") == 1
        session.enter("And now?")
        assert "Saved 2 questions" in session.enter("/save chat.json")
        session.enter("/set max_tokens 30000")
        before = len(session.lines())
        session.keys("Go on.\r")
        session.wait(lambda: is_long(session, before), "another long answer")
        session.terminate()
        assert session.ended() == 143
        assert is_at_rest(session)
    model, processor = load(random_model)
    first, second = Conversation.load(model, processor, folder / "chat.json").turns
    assert len(first.answer) > 200
    again = Conversation.load(model, processor, folder / "chat.json").branch(1)
    assert again.ask("And now?", max_tokens=8, repetition_penalty=0.5) == second.answer


def is_long(session, lines_before=0):
    """Whether the answer in progress is taller than the screen, or many lines of it have been finished."""
    return "⋮" in session.text() or len(session.lines()) > lines_before + 30


def test_the_transcript_in_the_docs_is_what_happens(folder):
    """But for the times, which differ, and where lines break because of them."""
    text = (ROOT / "docs" / "chat.md").read_text(encoding="utf-8")
    command, transcript = re.search(
        r"<!-- transcript: mlx-fastvlm chat (.*) -->\n```\n(.*?)```", text, re.DOTALL
    ).groups()
    *questions, last = re.findall(r"^> (.*)", transcript, re.MULTILINE)
    assert last == "/exit"
    with TerminalSession([*PROGRAM, *command.split()], folder=ROOT, rows=100) as session:
        session.wait_for_prompt()
        for question in questions:
            session.enter(question)
        session.keys("/exit\r")
        assert session.ended() == 0
        assert without_times(session.text()) == without_times(transcript)


def without_times(shown):
    return re.sub(r"\d+\.\d+", "N", shown).split()


def is_at_rest(session):
    """Whether the terminal is as a shell expects it."""
    return bool(termios.tcgetattr(session.child.child_fd)[3] & termios.ECHO)
