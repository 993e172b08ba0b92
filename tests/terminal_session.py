"""A program in a terminal of its own, as a person at the keyboard meets it: keys go in, the screen is looked at.

pexpect runs the program behind a pseudo-terminal; pyte is the terminal, and answers what the program asks it.
"""

import os
import signal
import time

import pexpect
import pyte

SECONDS = 60  # a wait that takes longer has failed; nothing waits without looking


class TerminalSession:
    """A running program and its screen, to be used in a `with` block that ends it.

    Args:
        command: program and arguments.
        rows, columns: size of the screen.
        environment: variables beyond this process's.
        folder: where it runs.
    """

    def __init__(self, command, rows=24, columns=80, environment=None, folder=None):
        self._screen = pyte.HistoryScreen(columns, rows, history=10_000, ratio=1)
        self._screen.write_process_input = lambda data: self.child.send(data)  # the terminal's own replies
        self._stream = pyte.ByteStream(self._screen)
        self.child = pexpect.spawn(
            command[0],
            [str(argument) for argument in command[1:]],
            dimensions=(rows, columns),
            env={**os.environ, "TERM": "xterm-256color", **(environment or {})},
            cwd=folder,
        )
        self.child.delaybeforesend = None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.child.close(force=True)

    def keys(self, text):
        """Press keys; Enter is \\r, as keyboards send it."""
        self.child.send(text)

    def paste(self, text):
        """What a terminal sends when text is pasted into a program that asked to be told."""
        self.keys(f"\x1b[200~{text}\x1b[201~")

    def lines(self):
        """All lines so far, those that scrolled out of sight included, without spaces at their ends."""
        above = ["".join(line[i].data for i in range(self._screen.columns)) for line in self._screen.history.top]
        return [line.rstrip() for line in [*above, *self._screen.display]]

    def text(self):
        return "\n".join(self.lines()).rstrip()

    def cursor_line(self):
        return self._screen.display[self._screen.cursor.y].rstrip()

    def wait(self, seen, what=""):
        """Read until `seen()` is true of the screen."""
        deadline = time.monotonic() + SECONDS
        while not seen():
            assert time.monotonic() < deadline, f"never came: {what}\n{self.text()}"
            try:
                self._stream.feed(self.child.read_nonblocking(65536, timeout=1))
            except pexpect.TIMEOUT:
                pass
            except pexpect.EOF:
                assert seen(), f"ended before it came: {what}\n{self.text()}"

    def wait_for(self, text):
        self.wait(lambda: text in self.text(), repr(text))

    def wait_for_prompt(self):
        self.wait(lambda: self.cursor_line() == ">", "an empty prompt")

    def enter(self, line):
        """Type a line and send it; returns what is shown until the next prompt."""
        self.keys(line)
        self.wait(lambda: self.cursor_line().endswith(line[-40:].rstrip()), f"{line!r} typed")
        before = len(self.lines_until_cursor())
        self.keys("\r")
        self.wait_for_prompt()
        return "\n".join(self.lines_until_cursor()[before:-1]).strip()

    def lines_until_cursor(self):
        above = len(self._screen.history.top)
        return self.lines()[: above + self._screen.cursor.y + 1]

    def ended(self):
        """The exit code, once everything that the program wrote is on the screen."""
        while True:
            try:
                self._stream.feed(self.child.read_nonblocking(65536, timeout=SECONDS))
            except pexpect.EOF:
                break
        self.child.wait()
        return self.child.exitstatus if self.child.exitstatus is not None else -self.child.signalstatus

    def terminate(self):
        self.child.kill(signal.SIGTERM)
