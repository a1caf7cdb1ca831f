"""How a long run reports its phases and progress."""

from elastickv.backends.protocol import Reporter as Reporter


class SilentReporter:
    """A reporter that shows nothing."""

    def phase(self, name: str) -> None:
        """Ignore."""

    def progress(self, done: int, total: int) -> None:
        """Ignore."""


SILENT = SilentReporter()
