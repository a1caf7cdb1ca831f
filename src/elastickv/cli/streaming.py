"""Stream text to standard output, and a line with its speed to standard error if that is a terminal."""

import sys
import time
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from elastickv.cli.progress import TimeLeft

_INCOMPLETE = "\ufffd"
_REFRESHES_PER_S = 8


class LiveText:
    """Writes tokens as text; a context manager.

    On a terminal the current line is above the speed, and moves up when it is full.

    Attributes
    ----------
    text : all that was written.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self.text = tokenizer, ""
        self._ids: list[int] = []
        self._settled = 0
        self._shown = 0
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
        self.text += self._decoded(final=True)
        if self._live is not None:
            self._live.stop()
        rest = self.text[self._shown :]
        if self._count:
            sys.stdout.write(rest + ("" if self.text.endswith("\n") else "\n"))
            sys.stdout.flush()

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
        self._ids.append(int(ids.reshape(-1)[0]))
        self.text += self._decoded()
        if not self._together:
            sys.stdout.write(self.text[self._shown :])
            sys.stdout.flush()
            self._shown = len(self.text)
        if self._live is not None:
            speed = f"{(self._count - 1) / (now - self._first):.1f} tokens/s, " if self._count > 1 else ""
            line = Text(f"{speed}{self._count} tokens", style="dim")
            self._live.update(Group(Text(self._unfinished()), line) if self._together else line)

    def _decoded(self, final: bool = False) -> str:
        """Return the text that the tokens since the last settled one add: nothing while a character is incomplete."""
        whole = self._tokenizer.decode(self._ids[self._settled :], skip_special_tokens=True)
        before = self._pending
        if whole.endswith(_INCOMPLETE) and not final:
            return ""
        self._pending = whole
        added = whole[len(before) :]
        if whole.endswith("\n"):
            # Decoding can restart at the end of a line, so that long texts are not decoded from the beginning for each token.
            self._settled, self._pending = len(self._ids), ""
        return str(added)

    _pending = ""

    def _unfinished(self) -> str:
        """Print full lines above the speed, and return the one that is being written."""
        width = max(20, self._console.width - 1)
        rest = self.text[self._shown :]
        while "\n" in rest or len(rest) > width:
            line, newline, _ = rest.partition("\n")
            if len(line) > width:
                space = line.rfind(" ", 1, width + 1)
                line, newline = (line[: space + 1], "") if space > 0 else (line[:width], "")
            self._console.print(Text(line.rstrip(" ")))
            self._shown += len(line) + len(newline)
            rest = self.text[self._shown :]
        return rest
