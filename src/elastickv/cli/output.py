"""Standard output that survives a reader that leaves and a file that cannot be written."""

from collections.abc import Iterator
from contextlib import contextmanager

import click

from elastickv.cli.standard_streams import reader_left, silence


def show(text: str) -> None:
    """Write to standard output; discard the rest if its reader has left, as `head` does."""
    try:
        click.echo(text, nl=False)
    except OSError as error:
        if not reader_left(error):
            raise
        silence()


@contextmanager
def shown_after(text: str) -> Iterator[None]:
    """Show a result after it is written to its files, even if one of them cannot be written."""
    try:
        yield
    finally:
        show(text)
