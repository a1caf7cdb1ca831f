"""Progress on stderr: a bar with the time left on a terminal, lines at most every ten seconds elsewhere."""

import sys
import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from elastickv.backends.compilation_report import Interruption, compilation_report

LINES_EVERY_S = 10.0
Clock = Callable[[], float]


class TimeLeft:
    """Estimates how long a phase still takes from the steps done so far.

    A count that falls begins anew: some phases count several things in a row.
    """

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self.begin()

    def begin(self, done: int = 0) -> None:
        """Begin a phase of which `done` steps took no time."""
        self._start = self._last = self._clock()
        self._first, self._done, self._total = done, done, 0

    def update(self, done: int, total: int) -> None:
        """Take in that `done` of `total` steps are done now."""
        if done < self._done:
            self.begin(done)
        if done > self._done:
            self._last = self._clock()
        self._done, self._total = done, total

    def seconds(self) -> float | None:
        """Return the seconds left; None before the first step is done and after the last."""
        steps = self._done - self._first
        if steps <= 0 or self._done >= self._total:
            return None
        of_a_step = (self._last - self._start) / steps
        return max(0.0, of_a_step * (self._total - self._done) - (self._clock() - self._last))

    def __str__(self) -> str:
        left = self.seconds()
        return f"{_minutes(self._clock() - self._start)} so far" if left is None else f"{_minutes(left)} left"


class _TimeColumn(ProgressColumn):
    def __init__(self, left: TimeLeft) -> None:
        super().__init__()
        self._left = left

    def render(self, task: Task) -> Text:
        return Text(str(self._left), style="progress.remaining")


class _ShareColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text("" if task.total is None else f"{task.percentage:>3.0f} %", style="progress.percentage")


class Bar:
    """Shows phases, their progress and the time left, and the compilation of kernels; a context manager.

    Without a terminal every phase has a line; with `short`, of a command that usually ends at once, only those that last.
    """

    def __init__(self, console: Console | None = None, clock: Clock = time.monotonic, short: bool = False) -> None:
        # The file itself: a loader redirects `sys.stderr` for a while.
        self._console = console or Console(file=sys.stderr, highlight=False)
        self._short = short
        self._clock, self._left, self._name, self._said = clock, TimeLeft(clock), "", clock()
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            _ShareColumn(),
            _TimeColumn(self._left),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
            # Results that go to a file must not be drawn on the terminal instead.
            redirect_stdout=sys.stdout.isatty(),
        )
        self._task = self._progress.add_task("starting", total=None)
        self._compilation = compilation_report(Interruption(self, lambda: self._name))

    def __enter__(self) -> "Bar":
        self._compilation.__enter__()
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()
        self._compilation.__exit__(kind, error, trace)

    def phase(self, name: str) -> None:
        """Begin a phase."""
        self._name = name
        self._left.begin()
        if not self._short:
            self._line(name)
        self._progress.reset(self._task, description=name, total=None)

    def progress(self, done: int, total: int) -> None:
        """Show `done` of `total` steps of the phase."""
        self._left.update(done, total)
        self._progress.update(self._task, completed=done, total=total)
        if self._due() and 0 < done < total:
            self._line(f"{self._name}: {done / total:.0%}, {self._left}")

    def _due(self) -> bool:
        """Return whether enough time has passed for another line."""
        return self._clock() - self._said >= LINES_EVERY_S

    def _line(self, text: str) -> None:
        """Print a line where there is no bar."""
        self._said = self._clock()
        if self._progress.disable:
            print(f"elastickv: {text}", file=self._console.file, flush=True)


def _minutes(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole} s" if whole < 100 else f"{whole // 60} min {whole % 60:02} s"
