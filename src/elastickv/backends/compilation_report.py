"""Report the compilation of kernels, which happens when a first cache is made, in the middle of another phase."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from elastickv.backends.protocol import Reporter

_CURRENT: ContextVar[Reporter | None] = ContextVar("compilation_report", default=None)


class Interruption:
    """A reporter that shows a phase within another one, and resumes the other one when all steps are done."""

    def __init__(self, report: Reporter, current: Callable[[], str]) -> None:
        """Interrupt the phase that `current` names."""
        self._report, self._current = report, current
        self._interrupted: str | None = None

    def phase(self, name: str) -> None:
        """Begin the phase within."""
        self._interrupted = self._current()
        self._report.phase(name)

    def progress(self, done: int, total: int) -> None:
        """Show `done` of `total` steps; after the last one, go back."""
        self._report.progress(done, total)
        if done >= total and self._interrupted is not None:
            interrupted, self._interrupted = self._interrupted, None
            self._report.phase(interrupted)


@contextmanager
def compilation_report(report: Reporter) -> Iterator[None]:
    """Report to `report` what is compiled within the block by backends that were loaded without a reporter."""
    token = _CURRENT.set(report)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def current_report() -> Reporter | None:
    """Return the reporter of the innermost `compilation_report`; None outside of one."""
    return _CURRENT.get()
