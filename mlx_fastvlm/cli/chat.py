"""`mlx-fastvlm chat`: talk about pictures, in a terminal or through pipes."""

from __future__ import annotations

import io
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlx_fastvlm import __version__
from mlx_fastvlm.cache_folder import cache_home
from mlx_fastvlm.cli.chat_commands import refuse_standard_input
from mlx_fastvlm.cli.chat_keys import StopRequest, keys_kept_for_later, leave_on_sigterm, stop_on_ctrl_c
from mlx_fastvlm.cli.options import (
    ComputeDType,
    FitOption,
    KvBits,
    MaxTokens,
    RepetitionPenalty,
    ResolutionOption,
    Seed,
    Stop,
    System,
    Temp,
    TopK,
    TopP,
)
from mlx_fastvlm.cli.terminal import Model, Revision, load_model
from mlx_fastvlm.errors import FastVLMWarning
from mlx_fastvlm.loading import DEFAULT_MODEL
from mlx_fastvlm.options import DEFAULT_MAX_TOKENS, GenerationOptions

if TYPE_CHECKING:
    from mlx_fastvlm.cli.chat_session import Session
    from mlx_fastvlm.cli.chat_view import View
    from mlx_fastvlm.image_content import ImageContent

_HISTORY_FILE = "chat-history"  # in the cache folder
_HOW_TO_LEAVE = "Ctrl-D or /exit leaves the chat."


class Context(str, Enum):
    error = "error"
    slide = "slide"


def chat(
    images: Annotated[
        list[str] | None,
        typer.Argument(metavar="IMAGE", help="Pictures to talk about: files or http(s) URLs.", show_default=False),
    ] = None,
    model: Model = DEFAULT_MODEL,
    load: Annotated[Path | None, typer.Option(help="Go on with a chat that /save wrote.", show_default=False)] = None,
    system: System = None,
    resolution: ResolutionOption = None,
    fit: FitOption = None,
    context: Annotated[
        Context, typer.Option(help="When the context is full: say so, or leave out the oldest turns.")
    ] = Context.error,
    max_tokens: MaxTokens = DEFAULT_MAX_TOKENS,
    temp: Temp = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Seed = None,
    stop: Stop = None,
    dtype: ComputeDType = None,
    kv_bits: KvBits = None,
    revision: Revision = None,
    plain: Annotated[bool, typer.Option("--plain", help="Show answers as they are, not as markdown.")] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Show times and token rates after every answer.")] = False,
) -> None:
    """Talk about pictures: ask, ask again, show another one.

    \b
    mlx-fastvlm chat photo.jpg
    mlx-fastvlm chat photo.jpg --temp 0.7 --stats
    mlx-fastvlm chat --load chat-20250131-101500.json
    printf 'What is it?\\nWhich color?\\n' | mlx-fastvlm chat photo.jpg > answers.txt

    Inside, /help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves. Without a terminal, each line of standard
    input is a question, answers go to standard output, everything else to standard error.
    """
    settings = {
        "max_tokens": max_tokens,
        "temp": temp,
        "top_p": top_p,
        "top_k": top_k,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "resolution": resolution,
        "fit": fit and fit.value,
    }
    from mlx_fastvlm.cli.chat_session import Session
    from mlx_fastvlm.conversation import Conversation
    from mlx_fastvlm.conversation_file import load_conversation
    from mlx_fastvlm.reuse import Reuse

    GenerationOptions(**settings, kv_bits=kv_bits)
    # What is wrong with these should be known before seconds of loading.
    pictures = [_read(name) for name in images or ()]
    if load is not None:
        load_conversation(load)

    in_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    view = _view(in_terminal, plain)
    with keys_kept_for_later() if in_terminal else nullcontext(), _warnings_shown(view):
        if in_terminal:
            view.note(f"mlx-fastvlm {__version__} with {model}. /help lists the commands. {_HOW_TO_LEAVE}")
        loaded, processor = load_model(model, dtype, revision)
        how = {
            "context": context.value,
            "reuse": Reuse(loaded, processor),
            "stop": stop or (),
            "kv_bits": kv_bits,
        }
        given = {} if system is None else {"system": system}
        if load is None:
            conversation = Conversation(loaded, processor, pictures, **how, **given)
        else:
            conversation = Conversation.load(loaded, processor, load, image=pictures, **how, **given)
        session = Session(
            conversation,
            view,
            load=lambda path: Conversation.load(loaded, processor, path, **how),
            stopping=stop_on_ctrl_c if in_terminal else lambda: nullcontext(StopRequest()),
            settings=settings,
            file=load,
            statistics=stats,
        )
        if in_terminal:
            _talk_in_terminal(session, view)
        else:
            _talk_by_lines(session)


def _read(name: str) -> ImageContent:
    """A picture, known to be one."""
    from mlx_fastvlm.image_content import recognize
    from mlx_fastvlm.image_decoding import open_image

    refuse_standard_input(name)
    content = recognize(name)
    open_image(content.open())
    return content


def _view(in_terminal: bool, plain: bool) -> View:
    from mlx_fastvlm.cli.chat_view import LineView, TerminalView, terminal_console

    return TerminalView(terminal_console(), markdown=not plain) if in_terminal else LineView()


@contextmanager
def _warnings_shown(view: View) -> Iterator[None]:
    """What the library warns of, as notes of the chat."""
    from mlx_fastvlm.generate import SEVERAL_IMAGES

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", re.escape(SEVERAL_IMAGES), FastVLMWarning)  # the chat says it itself
        warnings.showwarning = lambda message, *where, **more: view.note(str(message))
        yield


def _talk_in_terminal(session: Session, view: View) -> None:
    from mlx_fastvlm.cli.chat_editor import LineEditor

    editor = LineEditor(Path(os.path.expanduser(cache_home())) / _HISTORY_FILE)
    if editor.history_error:
        view.note(editor.history_error)
    work: Callable[[], bool | None] | None = session.prepare  # None while a line is read
    with leave_on_sigterm():
        while True:
            try:
                if work is not None and work() is False:
                    return
                work = None
                view.note("")
                work = partial(session.enter, editor.read())
            except EOFError:
                return
            except KeyboardInterrupt:
                view.note(_HOW_TO_LEAVE if work is None else "Stopped.")
                work = None


def _talk_by_lines(session: Session) -> None:
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # what is not UTF-8 fails as a question, not as a program
    session.prepare()
    for line in sys.stdin:
        if not session.enter(line):
            return
