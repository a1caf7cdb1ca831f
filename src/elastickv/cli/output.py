"""Standard output: what a reader that left, or a file that cannot be written, does not take away."""

from collections.abc import Iterator
from contextlib import contextmanager

import click

from elastickv.cli.error_handling import silence


def show(text: str) -> None:
    """Write to standard output; where its reader has left, as `head` does, nobody misses the rest."""
    try:
        click.echo(text, nl=False)
    except BrokenPipeError:
        silence()


@contextmanager
def shown_after(text: str) -> Iterator[None]:
    """Show a result once it is in its files, and all the same where one of them cannot be written."""
    try:
        yield
    finally:
        show(text)
