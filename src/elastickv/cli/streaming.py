"""Stream text to standard output, and a line with its speed to standard error if that is a terminal."""

import sys
import time
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from elastickv.cli.detokenizer import IncrementalDetokenizer
from elastickv.cli.progress import TimeLeft
from elastickv.cli.standard_streams import silence

_REFRESHES_PER_S = 8


class LiveText:
    """Writes tokens as text; a context manager.

    On a terminal the current line is above the speed, and moves up when it is full.

    Parameters
    ----------
    keep_going : whether to take further tokens when standard output cannot be written any more, because its reader has left or
        its disk is full.

    Attributes
    ----------
    text : the decode of all tokens. Set at the end.
    error : why standard output could not be written, or None.
    """

    def __init__(self, tokenizer: Any, keep_going: bool = False) -> None:
        self._detokenizer, self._keep_going, self.text = IncrementalDetokenizer(tokenizer), keep_going, ""
        self.error: OSError | None = None
        self._pieces: list[str] = []
        self._unwritten = ""
        self._console = Console(stderr=True, highlight=False, markup=False)
        self._together = self._console.is_terminal and sys.stdout.isatty()
        self._live: Live | None = None
        self._left = TimeLeft()
        self._first: float | None = None
        self._count = 0

    def __enter__(self) -> "LiveText":
        if self._console.is_terminal:
            self._live = Live(console=self._console, transient=True, refresh_per_second=_REFRESHES_PER_S, redirect_stdout=False)
            self._live.start()
            self._left.begin()
            self._live.update(Text("reading the prompt", style="dim"))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._pieces.append(self._detokenizer.end())
        self.text, streamed = self._detokenizer.whole(), "".join(self._pieces)
        if self._live is not None:
            self._live.stop()
        if self._count and not isinstance(error, OSError):
            # What was written cannot be taken back. Only a tokenizer that rewrites earlier text makes the two differ.
            written = streamed[: len(streamed) - len(self._unwritten) - len(self._pieces[-1])]
            rest = (self.text if self.text.startswith(written) else streamed)[len(written) :]
            self._write(rest + ("" if self.text.endswith("\n") else "\n"))

    def reading(self, done: int, total: int) -> None:
        """Show that `done` of `total` layers have read the prompt."""
        self._left.update(done, total)
        if self._live is not None and not self._count:
            self._live.update(Text(f"reading the prompt: {done / total:.0%}, {self._left}", style="dim"))

    def add(self, ids: Any) -> None:
        """Take the next token, a tensor of one."""
        self._count += 1
        now = time.perf_counter()
        self._first = self._first or now
        piece = self._detokenizer.add(int(ids.reshape(-1)[0]))
        self._pieces.append(piece)
        self._unwritten += piece
        if not self._together:
            self._write(self._unwritten)
            self._unwritten = ""
        if self._live is not None:
            speed = f"{(self._count - 1) / (now - self._first):.1f} tokens/s, " if self._count > 1 else ""
            line = Text(f"{speed}{self._count} tokens", style="dim")
            self._live.update(Group(Text(self._unfinished()), line) if self._together else line)

    def _write(self, text: str) -> None:
        if self.error is not None:
            return
        try:
            sys.stdout.write(text)
            sys.stdout.flush()
        except OSError as error:
            if not self._keep_going:
                raise
            self.error = error
            silence()

    def _unfinished(self) -> str:
        """Print full lines above the speed, and return the one that is being written."""
        width = max(20, self._console.width - 1)
        while "\n" in self._unwritten or len(self._unwritten) > width:
            line, newline, _ = self._unwritten.partition("\n")
            if len(line) > width:
                space = line.rfind(" ", 1, width + 1)
                line, newline = (line[: space + 1], "") if space > 0 else (line[:width], "")
            self._console.print(Text(line.rstrip(" ")))
            self._unwritten = self._unwritten[len(line) + len(newline) :]
        return self._unwritten
