"""How a long run says what it is doing."""

from typing import Protocol


class Reporter(Protocol):
    """Receives the phases and the progress of a run."""

    def phase(self, name: str) -> None:
        """Begin a phase."""

    def progress(self, done: int, total: int) -> None:
        """Show that `done` of `total` steps of the phase are done."""


class SilentReporter:
    """A reporter that shows nothing."""

    def phase(self, name: str) -> None:
        """Ignore."""

    def progress(self, done: int, total: int) -> None:
        """Ignore."""


SILENT = SilentReporter()
