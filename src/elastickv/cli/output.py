"""Where a result goes: a file, standard output, or both."""

from pathlib import Path

from elastickv.cli.errors import show
from elastickv.reports.files import write_text


def deliver(path: Path | None, written: str, shown: str) -> None:
    """Write a result into its file and show it: where one of the two fails, the other still happens.

    Raises
    ------
    UsageError : if the file cannot be written; it is then as it was.
    """
    try:
        if path is not None:
            write_text(path, written)
    finally:
        show(shown)
