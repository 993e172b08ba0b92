"""The chat without a terminal: what lines mean, what commands do, how answers are drawn, and talking through pipes."""

import io
import os
import random
import re
import signal
import stat
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pyte
import pytest
from rich.console import Console

from mlx_fastvlm import Conversation, generate, load, reuse
from mlx_fastvlm.cli import chat_view
from mlx_fastvlm.cli.chat_commands import COMMANDS, Order, Question, file_name, parse, parse_setting, picture_names
from mlx_fastvlm.cli.chat_completion import proposals
from mlx_fastvlm.cli.chat_editor import open_history
from mlx_fastvlm.cli.chat_keys import StopRequest, stop_on_ctrl_c
from mlx_fastvlm.cli.chat_markdown import markdown_lines, printable
from mlx_fastvlm.cli.chat_session import Session
from mlx_fastvlm.cli.chat_view import TerminalView, View
from mlx_fastvlm.errors import FastVLMError, OptionError
from mlx_fastvlm.generate import SEVERAL_IMAGES
from mlx_fastvlm.reuse import Reuse

EXAMPLES = Path(__file__).parent.parent / "examples"
SHAPES, NUMBER = EXAMPLES / "shapes-two.png", EXAMPLES / "number.png"
FILES = {"/pictures/a.png", "/pictures/my photo.png", "/pictures/it's.png", "a b.png"}


@pytest.mark.parametrize(
    "line, meaning",
    [
        ("What is it?", Question("What is it?")),
        ("  What is it?\nAnd that?  ", Question("What is it?\nAnd that?")),
        ("//image is a word", Question("/image is a word")),
        ("/retry", Order("retry")),
        ("/RETRY ", Order("retry")),
        ("/quit", Order("exit")),
        ("/?", Order("help")),
        ("/image a.png b.png", Order("image", "a.png b.png")),
        ("/system Be brief.\nBe kind.", Order("system", "Be brief.\nBe kind.")),
        ("/pictures/a.png", Order("image", "/pictures/a.png")),
        ("/pictures/my photo.png", Order("image", "/pictures/my photo.png")),
        ("/pictures/a.png What's this?", Question("What's this?", ("/pictures/a.png",))),
        ("'/pictures/my photo.png' /pictures/a.png \nWhich?", Question("Which?", ("/pictures/my photo.png", "/pictures/a.png"))),
        (r"/pictures/my\ photo.png it's what?", Question("it's what?", ("/pictures/my photo.png",))),
        ("file:///pictures/my%20photo.png why", Question("why", ("/pictures/my photo.png",))),
        ("'Tis a question", Question("'Tis a question")),
        ("'a b.png' is no dragged file", Question("'a b.png' is no dragged file")),
    ],
)  # fmt: skip
def test_what_a_line_means(line, meaning):
    assert parse(line, FILES.__contains__) == meaning


@pytest.mark.parametrize(
    "line, told",
    [
        ("/imgae a.png", "did you mean /image?"),
        ("/qiut", "did you mean /quit?"),
        ("/home/me/missing.png", "There is no command /home/me/missing.png"),
        ("/xyz", "As a question: //xyz."),
        ("/retry now", "/retry takes nothing"),
        ("/", "There is no command /"),
    ],
)
def test_what_is_no_command_is_said_in_a_line(line, told):
    with pytest.raises(OptionError, match=re.escape(told)):
        parse(line, FILES.__contains__)


@pytest.mark.parametrize(
    "argument, names",
    [
        ("a.png b.png", ["a.png", "b.png"]),
        ("a b.png", ["a b.png"]),
        ("'a b.png' c.png", ["a b.png", "c.png"]),
        (r"/pictures/my\ photo.png", ["/pictures/my photo.png"]),
        ("/pictures/it's.png", ["/pictures/it's.png"]),
        ("file:///pictures/my%20photo.png", ["/pictures/my photo.png"]),
        ("file://localhost/x/y.png", ["/x/y.png"]),
        ("https://example.org/a%20b.png ~/c.png", ["https://example.org/a%20b.png", "~/c.png"]),
    ],
)
def test_names_of_pictures(argument, names):
    assert picture_names(argument, FILES.__contains__) == names


def test_an_open_quote_in_names_is_said():
    with pytest.raises(OptionError, match="quote"):
        picture_names("it's.png b.png", FILES.__contains__)


@pytest.mark.parametrize(
    "argument, name",
    [
        ("chat.json", "chat.json"),
        ("my chat.json", "my chat.json"),
        ("'my chat.json'", "my chat.json"),
        ("it's", "it's"),
    ],
)
def test_names_of_saved_chats(argument, name):
    assert file_name(argument) == name


@pytest.mark.parametrize(
    "argument, setting",
    [
        ("temp 0.7", ("temp", 0.7)),
        ("--top-p=0.9", ("top_p", 0.9)),
        ("Max_Tokens = 12", ("max_tokens", 12)),
        ("seed none", ("seed", None)),
        ("resolution 512", ("resolution", 512)),
        ("resolution none", ("resolution", None)),
        ("fit native", ("fit", "native")),
    ],
)
def test_settings(argument, setting):
    assert parse_setting(argument) == setting


@pytest.mark.parametrize("argument", ["temp", "temp hot", "top_k 1.5", "tmep 1", "max_tokens none"])
def test_settings_that_are_none(argument):
    with pytest.raises(OptionError, match="expected"):
        parse_setting(argument)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name in ("photo.png", "photo two.JPG", "notes.txt", ".hidden.png", "chat.json", "pictures/inner.webp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "before, completed",
    [
        ("/im", ["/image "]),
        ("/s", ["/system ", "/save ", "/set ", "/stats"]),
        ("/image ", [r"/image photo\ two.JPG", "/image photo.png", "/image pictures/"]),
        ("/image pho", [r"/image photo\ two.JPG", "/image photo.png"]),
        ("/image 'photo t", [r"/image photo\ two.JPG"]),
        (r"/image photo.png photo\ t", [r"/image photo.png photo\ two.JPG"]),
        ("/image pictures/", ["/image pictures/inner.webp"]),
        ("/image .h", ["/image .hidden.png"]),
        ("/image missing/", []),
        ("/load ", ["/load chat.json", "/load pictures/"]),
        ("/set te", ["/set temp "]),
        ("/clear ", []),
        ("pho", []),
    ],
)
def test_completion(before, completed, folder):
    assert sorted(before[: len(before) - p.replaces] + p.text for p in proposals(before)) == sorted(completed)


def test_completion_in_the_home_folder(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    assert [p.text for p in proposals("/image ~/pic")] == ["~/pictures/"]


def test_history_is_private_and_bounded(tmp_path):
    path = tmp_path / "cache" / "chat-history"
    history = open_history(path)
    for i in range(100):
        history.store_string(f"question {i}\nwith a second line")
    history = open_history(path, max_bytes=2000)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.stat().st_size <= 2000
    kept = list(history.load_history_strings())
    assert kept == [f"question {i}\nwith a second line" for i in range(99, 99 - len(kept), -1)]
    assert len(kept) > 20
    os.chmod(path, 0o644)
    history = open_history(path)
    history.store_string("new")
    assert next(iter(open_history(path).load_history_strings())) == "new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


MARKDOWN = """A **bold** start of a paragraph that is long enough to wrap around more than once on a small screen, surely.

- one
- two **with words** that wrap around too, since they are long
  - inner

1. first

2. second

10. tenth
```python
x = 1

def f():
    return 1
```
# Head

| a | b |
|---|---|
| 1 | 2 |

Lines
=====
text <b>html</b> and 2 * 3 * 4
next line [link](http://x.y/z)

> quote
> more

---
`code` end 你好世界 🙂 done
"""


class Screen:
    """A terminal's screen and the console that writes to it."""

    def __init__(self, rows, columns):
        self.file = io.StringIO()
        self.written = ""
        self.console = Console(
            file=self.file, force_terminal=True, width=columns, height=rows, color_system="standard", _environ={}
        )
        self._screen = pyte.HistoryScreen(columns, rows, history=10_000, ratio=1)
        self._stream = pyte.Stream(self._screen)

    def text(self):
        """All lines, those that scrolled out of sight included."""
        written = self.file.getvalue()
        self._stream.feed(written[len(self.written) :].replace("\n", "\r\n"))
        self.written = written
        above = ["".join(line[i].data for i in range(self._screen.columns)) for line in self._screen.history.top]
        return "\n".join(line.rstrip() for line in [*above, *self._screen.display]).rstrip()


def pieces_of(text, draw):
    while text:
        length = draw.choice([1, 2, 3, 7, 30])
        yield text[:length]
        text = text[length:]


@pytest.fixture
def every_piece_drawn(monkeypatch):
    """A view may skip drawings to save time; these tests look at each."""
    monkeypatch.setattr(chat_view, "SECONDS_BETWEEN_FRAMES", 0)
    monkeypatch.setattr(chat_view, "SHARE_OF_DRAWING", float("inf"))


@pytest.mark.parametrize("seed", range(12))
def test_a_streamed_answer_ends_as_the_whole_one_looks(seed, every_piece_drawn):
    draw = random.Random(seed)
    screen = Screen(rows=draw.choice([5, 10, 24, 80]), columns=draw.choice([20, 40, 80]))
    with TerminalView(screen.console).answer() as shown:
        for piece in pieces_of(MARKDOWN, draw):
            shown.add(piece)
            screen.text()
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).rstrip() for line in markdown_lines(screen.console, MARKDOWN)]
    assert screen.text() == "\n".join(lines)


def test_growing_text_is_not_drawn_twice(every_piece_drawn):
    screen = Screen(rows=24, columns=40)
    with TerminalView(screen.console).answer() as shown:
        for _ in range(60):
            shown.add("word ")
        assert screen.text().split() == ["word"] * 60
    # Each piece draws one line of at most 40 letters anew, and what moves the cursor; never the lines above.
    assert len(screen.file.getvalue()) < 60 * 60


def test_an_answer_in_progress_never_scrolls_its_own_lines_away(every_piece_drawn):
    screen = Screen(rows=6, columns=20)
    with TerminalView(screen.console).answer() as shown:
        for i in range(100):
            shown.add(f"{i:<9} ")
        lines = screen.text().split("\n")
        assert len(lines) <= 6 and lines[-1].split() == ["98", "99"]
    assert screen.text().split() == [str(i) for i in range(100)]


def test_an_answer_is_complete_after_the_window_has_changed(every_piece_drawn):
    screen = Screen(rows=24, columns=40)
    with TerminalView(screen.console).answer() as shown:
        shown.add("first " * 20)
        screen.console.size = (30, 12)
        shown.add("last " * 20)
    assert screen.text().split()[-40:] == ["first"] * 20 + ["last"] * 20


def test_an_answer_cut_short_is_complete_on_the_screen():
    screen = Screen(rows=24, columns=40)
    with pytest.raises(KeyboardInterrupt), TerminalView(screen.console).answer() as shown:
        for piece in ("Two ", "**shapes", "** and"):
            shown.add(piece)
        raise KeyboardInterrupt
    assert screen.text() == "Two shapes and"


def test_line_breaks_and_html_of_a_model_are_kept():
    screen = Screen(rows=24, columns=40)
    with TerminalView(screen.console).answer() as shown:
        shown.add("STOP\n<b>406</b>\n<div>\nx\n</div>")
    assert screen.text() == "STOP\n<b>406</b>\n<div>\nx\n</div>"


def test_a_model_cannot_command_the_terminal():
    assert printable("a\x1b[2Jb\x07\x9b1m\ud800\n\tc") == "a�[2Jb��1m�\n\tc"
    assert printable("naïve 你好 👩‍👧 a\u00a0b") == "naïve 你好 👩‍👧 a\u00a0b"
    screen = Screen(rows=24, columns=40)
    with TerminalView(screen.console).answer() as shown:
        shown.add("be\x1b[1;1Hfore")
    TerminalView(screen.console).note("a\x1b[1;1Hb [bold]c")
    assert screen.text() == "be�[1;1Hfore\na�[1;1Hb [bold]c"


class RecordingView(View):
    """Keeps what a session shows."""

    def __init__(self):
        self.notes, self.errors, self.statuses, self.answers = [], [], [], []

    def note(self, text):
        self.notes.append(text)

    def error(self, text):
        self.errors.append(text)

    @contextmanager
    def status(self, text):
        self.statuses.append(text)
        yield

    @contextmanager
    def answer(self):
        self.answers.append("")
        yield self

    def add(self, text):
        self.answers[-1] += text

    def end(self):
        pass


class StopAfter(StopRequest):
    """Ctrl-C once so many tokens came."""

    def __init__(self, tokens):
        super().__init__()
        self.tokens = tokens

    @property
    def pressed(self):
        self.tokens -= 1
        return self.tokens <= 0

    @pressed.setter
    def pressed(self, value):
        pass


@pytest.fixture(scope="module")
def demo():
    return load("demo")


SETTINGS = {
    "max_tokens": 64, "temp": 0.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0, "seed": None,
    "resolution": None, "fit": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def known(demo):
    """What all chats of these tests know already, to save time."""
    return Reuse(*demo)


@pytest.fixture
def start(demo, known):
    """Begin a chat with the demo model: keywords of Session and Conversation → (session, view)."""

    def started(*pictures, stopping=lambda: nullcontext(StopRequest()), context="error", **more):
        view = RecordingView()
        session = Session(
            Conversation(*demo, pictures, context=context, reuse=known),
            view,
            load=lambda path: Conversation.load(*demo, path),
            stopping=stopping,
            settings=dict(SETTINGS),
            **more,
        )
        return session, view

    return started


def test_every_command_can_be_carried_out(start):
    session, _ = start()
    assert set(session._commands) | {"exit"} == set(COMMANDS)


def test_questions_are_answered_as_a_conversation_does(start, demo):
    session, view = start(SHAPES)
    session.prepare()
    assert view.statuses == ["Reading shapes-two.png"]
    assert all(session.enter(line) for line in ["How many shapes are there?", "  ", "Describe this image.", "//huh"])
    expected = Conversation(*demo, SHAPES, max_tokens=64)
    answers = [expected.ask(question) for question in ("How many shapes are there?", "Describe this image.", "/huh")]
    assert view.answers == answers
    assert view.errors == []
    assert not session.enter("/exit")


@pytest.mark.filterwarnings("ignore::mlx_fastvlm.errors.FastVLMWarning")
def test_a_picture_shown_goes_with_the_next_question(start, demo):
    session, view = start()
    session.enter("/image")
    session.enter(f"/image {NUMBER}")
    session.enter("What is written in this image? Output only the text in the image.")
    assert view.answers == ["406"]
    assert SEVERAL_IMAGES not in view.notes
    session.enter(f"{SHAPES} How many shapes are there?")
    assert view.notes.count(SEVERAL_IMAGES) == 1
    assert [len(turn.images) for turn in session.conversation.turns] == [1, 1]
    session.enter("/image")
    assert view.notes[-2:] == [str(NUMBER), str(SHAPES)]
    session.enter("/history")
    assert "[number.png]" in view.notes[-2] and "[shapes-two.png]" in view.notes[-1]


def test_retry_replaces_the_answer(start):
    session, view = start(SHAPES)
    session.enter("How many shapes are there?")
    session.enter("/retry")
    assert view.answers == ["two", "two"] and len(session.conversation.turns) == 1
    assert "/set temp" in view.notes[-1]
    for line in ("/set temp 20", "/set seed 3", "/retry"):
        session.enter(line)
    assert view.answers[-1] == session.conversation.turns[0].answer != "two"
    assert "/set seed none" in view.notes[-1] or "/set seed none" in view.notes[-2]


def test_going_back_keeps_the_pictures_at_hand(start):
    session, view = start(SHAPES)
    for line in ("How many shapes are there?", "Describe this image.", f"/image {NUMBER}", "/undo"):
        session.enter(line)
    assert view.notes[-1] == "Took back number.png."
    session.enter("/undo")
    assert [turn.question for turn in session.conversation.turns] == ["How many shapes are there?"]
    session.enter("/undo")
    assert session.conversation.turns == []
    session.enter("How many shapes are there?")  # its picture waited
    assert view.answers[-1] == "two"
    session.enter("Describe this image.")
    session.enter("/branch 0")
    session.enter("How many shapes are there?")
    assert view.answers[-1] == "two" and len(session.conversation.turns) == 1
    session.enter("/clear")
    assert session.conversation.turns == [] and session.conversation.images == ()
    session.enter("/undo")
    assert "nothing to take back" in view.errors[-1]


def test_save_and_load(start, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    session, view = start(SHAPES)
    session.enter("How many shapes are there?")
    session.enter("/save my chat.json")
    session.enter("Describe this image.")
    session.enter("/save")  # to the same file
    other, other_view = start()
    other.enter("/load 'my chat.json'")
    assert other_view.statuses == ["Reading the conversation"]
    assert other.conversation.turns == session.conversation.turns
    for each in (session, other):
        each.enter("What is written in this image?")
    assert other_view.answers[-1] == view.answers[-1]
    (tmp_path / "mine.txt").write_text("mine")
    other.enter("/save mine.txt")
    assert "exists already" in other_view.errors[-1]
    assert (tmp_path / "mine.txt").read_text() == "mine"
    other.enter("/clear")
    other.enter("/save")  # no longer that file
    assert len(list(tmp_path.glob("chat-*.json"))) == 1


def test_the_system_line_is_shown_and_set(start):
    session, view = start(SHAPES)
    for line in ("/system", "/system Answer in one word.", "/system default"):
        session.enter(line)
    assert view.notes == [
        "System line: You are a helpful assistant.",
        "System line: Answer in one word.",
        "System line: You are a helpful assistant.",
    ]
    session.enter("/system Answer in one word.")
    session.enter("How many shapes are there?")
    told = generate(session.conversation.model, session.conversation.processor, "How many shapes are there?", SHAPES,
                    system="Answer in one word.", max_tokens=64)  # fmt: skip
    assert view.answers == [told]


def test_settings_hold_for_the_questions_that_follow(start):
    session, view = start(SHAPES)
    session.enter("/set max_tokens 3")
    session.enter("Describe this image.")
    assert "Cut off after 3 tokens" in view.notes[-1]
    session.enter("/set")
    assert "max_tokens 3" in view.notes[-1] and "seed none" in view.notes[-1]
    session.enter("/set top_p 2")
    session.enter("/set")
    assert "top_p is 2" in view.errors[-1] and "top_p 1" in view.notes[-1]


@pytest.mark.filterwarnings("ignore::mlx_fastvlm.errors.FastVLMWarning")
def test_resolution_and_fit_hold_for_the_pictures_shown_too(start, demo):
    session, view = start(EXAMPLES / "shapes-wide.png")
    session.enter("/stats")
    session.enter("/set resolution 192")
    session.enter("/set fit native")
    assert len(view.statuses) == 2  # the picture was read anew
    session.enter("/stats")
    trained, smaller = (int(note.split()[1]) for note in view.notes if note.startswith("Context: "))
    assert trained - smaller == 16 - 6  # 256 by 256 and 128 by 192 pixels
    session.enter("Describe this image.")
    assert view.answers == [
        generate(
            *demo, "Describe this image.", EXAMPLES / "shapes-wide.png", max_tokens=64, resolution=192, fit="native"
        )
    ]
    for wrong, told in (("/set resolution 200", "192 or 256 is nearest"), ("/set fit wide", "pad, crop, native")):
        session.enter(wrong)
        assert told in view.errors[-1]
    session.enter("/set")
    assert "resolution 192" in view.notes[-1] and "fit native" in view.notes[-1]


def test_statistics_tell_what_was_done_beforehand(start):
    session, view = start(SHAPES, statistics=True)
    session.prepare()
    session.enter("How many shapes are there?")
    shown = "\n".join(view.notes)
    for part in ("Time to first token", "known from before", "tok/s", "Context: ", " of 1024 tokens"):
        assert part in shown
    assert "encode" not in shown  # it was done before
    assert "Before the question: " in shown


@pytest.mark.parametrize(
    "line, told",
    [
        ("/image missing.png", "missing.png"),
        (f"/image {__file__}", "is text"),
        ("/image -", "standard input"),
        ("/load missing.json", "missing.json"),
        ("/load", "Expected the file"),
        ("/branch", "Nothing was said"),
        ("/branch 9", "Nothing was said"),
        ("/save /missing/folder/chat.json", "cannot be written"),
        ("/set color 1", "no option color"),
        ("/help me", "no command /me"),
        ("/nothing", "no command /nothing"),
        ("<image> <image> which?", "<image>"),
        ("\udc80", "Unicode"),
    ],
)
def test_mistakes_are_a_line_and_the_chat_goes_on(line, told, start):
    session, view = start(SHAPES)
    assert session.enter(line)
    assert len(view.errors) == 1 and told in view.errors[0]
    assert session.enter("How many shapes are there?")
    assert view.answers[-1] == "two"


def test_going_back_further_than_there_is(start):
    session, view = start(SHAPES)
    session.enter("How many shapes are there?")
    session.enter("/branch 1")
    assert "below 1" in view.errors[-1] and "/branch 0" in view.errors[-1]


def test_a_full_context_is_said_with_what_to_do(start):
    session, view = start(SHAPES)
    session.enter("How many shapes are there?")
    session.enter("word " * 2000)
    assert "context holds 1024" in view.errors[-1] and "/clear" in view.notes[-1]
    session.enter("How many shapes are there?")
    assert len(view.errors) == 1 and len(session.conversation.turns) == 2
    session, view = start(SHAPES, context="slide")
    for _ in range(3):
        session.enter("How many shapes are there? " + "word " * 300)
    assert view.errors == []
    session.enter("/stats")
    assert "oldest turns are left out" in view.notes[-1]


def test_a_stopped_answer_is_kept_and_the_next_is_exact(start, demo):
    requests = [StopAfter(5), StopRequest()]
    session, view = start(SHAPES, stopping=lambda: nullcontext(requests.pop(0)))
    session.enter("Describe this image.")
    whole = Conversation(*demo, SHAPES).ask("Describe this image.")
    said = view.answers[0]
    assert said and said != whole and whole.startswith(said)
    assert session.conversation.turns[0].answer == said
    assert "Stopped" in view.notes[-1]
    session.enter("How many shapes are there?")
    messages = [
        {"role": "user", "content": "Describe this image."},
        {"role": "assistant", "content": said},
        {"role": "user", "content": "How many shapes are there?"},
    ]
    assert view.answers[1] == generate(*demo, messages, SHAPES, max_tokens=64)


def test_ctrl_c_before_the_first_token_forgets_the_question_only(start, monkeypatch):
    prefill = reuse.prefill

    def interrupted(*arguments):
        logits = prefill(*arguments)
        signal.raise_signal(signal.SIGINT)
        return logits

    session, view = start(SHAPES, stopping=stop_on_ctrl_c)
    monkeypatch.setattr(reuse, "prefill", interrupted)
    for work in (session.prepare, lambda: session.enter("Describe this image.")):
        with pytest.raises(KeyboardInterrupt):
            work()
    assert session.conversation.turns == [] and len(session.conversation.images) == 1
    assert view.answers == [""]
    monkeypatch.undo()
    session.enter("How many shapes are there?")
    assert view.answers[-1] == "two"


def test_ctrl_c_once_tokens_come_waits_for_the_token():
    with stop_on_ctrl_c() as request:
        request.waits = True
        signal.raise_signal(signal.SIGINT)
        assert request.pressed
        request.waits = False
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


@pytest.fixture
def run(command_line):
    """Run `mlx-fastvlm chat` in this process: arguments and lines → (exit code, stdout, stderr)."""
    return lambda *arguments, lines=b"": command_line("chat", *arguments, stdin=lines)


def test_lines_in_answers_out(run):
    lines = f"How many shapes are there?\n\n/image {NUMBER}\n/branch 0\nHow many shapes are there?\n//a\n"
    code, out, err = run(SHAPES, "--model", "demo", lines=lines.encode())
    assert code == 0
    assert out.splitlines()[:2] == ["two", "two"] and len(out.splitlines()) == 3
    assert SEVERAL_IMAGES in err and "UserWarning" not in err


def test_a_bad_line_among_others_goes_to_stderr(run):
    lines = b"How many shapes are there?\n\xff\xfe\n/foo\n/image missing.png\nHow many shapes are there?"
    code, out, err = run(SHAPES, "--model", "demo", lines=lines)
    assert code == 0 and out.count("\n") == 2 and out.startswith("two\n")
    assert [line.startswith("mlx-fastvlm: ") for line in err.splitlines()] == [True] * 3
    assert run(SHAPES, "--model", "demo", lines=b"/exit\nDescribe this image.\n") == (0, "", "")


def test_a_saved_chat_goes_on(run, tmp_path, demo):
    path = tmp_path / "chat.json"
    run(SHAPES, "--model", "demo", "--system", "Be brief.", lines=f"Describe this image.\n/save {path}\n".encode())
    code, out, _ = run("--model", "demo", "--load", path, lines=b"How many shapes are there?\n/save\n")
    expected = Conversation(*demo, SHAPES, system="Be brief.")
    expected.ask("Describe this image.")
    assert (code, out) == (0, expected.ask("How many shapes are there?") + "\n")
    again = Conversation.load(*demo, path)
    assert again.system == "Be brief." and len(again.turns) == 2


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["missing.png"], "missing.png"),
        ([__file__], "test_chat.py is text"),
        (["-"], "standard input"),
        (["--load", "missing.json"], "missing.json"),
        (["--load", __file__], "not a saved conversation"),
        (["--top-p", "2"], "top_p is 2"),
        (["--kv-bits", "7"], "kv_bits is 7"),
        (["--resolution", "500"], "448 or 512 is nearest"),
        (["--context", "grow"], "grow"),
    ],
)
def test_mistakes_at_the_start_are_a_line_before_the_model_loads(arguments, told, run):
    code, out, err = run(*arguments, "--model", "/missing/model", lines=b"Why?\n")
    assert (code, out) == (1, "")
    assert err.count("\n") == 1 and told in err and "/missing/model" not in err


def test_options_reach_the_answers(run, demo):
    _, out, _ = run(SHAPES, "--model", "demo", "--max-tokens", 4, "--stop", "shapes", lines=b"Describe this image.\n")
    assert out == generate(*demo, "Describe this image.", SHAPES, max_tokens=4, stop="shapes") + "\n"


def test_fit_changes_what_is_seen(run):
    wide = EXAMPLES / "shapes-wide.png"
    padded, cropped = (
        run(wide, "--model", "demo", "--fit", fit, lines=b"Describe this image.\n")[1] for fit in ("pad", "crop")
    )
    assert padded != cropped


def test_resolution_changes_what_is_seen_and_is_noticed_once(run):
    lines = b"Describe this image.\nDescribe this image.\n"
    _, out, err = run(SHAPES, "--model", "demo", "--resolution", 64, "--max-tokens", 8, lines=lines)
    assert out != run(SHAPES, "--model", "demo", "--max-tokens", 8, lines=lines)[1]
    assert err.count("was trained mainly on images of 256x256 pixels; at 64") == 1


def test_unknown_errors_are_not_swallowed(start):
    session, _ = start()

    def broken(path):
        raise ZeroDivisionError

    session._load = broken
    with pytest.raises(ZeroDivisionError):
        session.enter("/load x.json")
    assert not issubclass(ZeroDivisionError, FastVLMError)
