"""Progress on stderr: a bar on a terminal, a line per phase elsewhere."""

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


class Bar:
    """Shows phases and samples; a context manager."""

    def __init__(self, estimate_over_s: float = 30.0) -> None:
        self._console = Console(stderr=True, highlight=False)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeRemainingColumn(),
        )
        self._progress = Progress(
            *columns,
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
            speed_estimate_period=estimate_over_s,
        )
        self._task = self._progress.add_task("starting", total=None)

    def __enter__(self) -> "Bar":
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def phase(self, name: str) -> None:
        """Begin a phase."""
        if self._progress.disable:
            print(f"elastickv: {name}", file=sys.stderr, flush=True)
        self._progress.reset(self._task, description=name, total=None)

    def progress(self, done: int, total: int) -> None:
        """Show `done` of `total` samples."""
        self._progress.update(self._task, completed=done, total=total)
