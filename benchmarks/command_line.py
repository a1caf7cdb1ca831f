"""What the command lines of several scripts have in common: numbers as options, and how a script ends."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from elastickv.errors import UsageError


def whole_number(text: str) -> int:
    """Return a whole number of 1 or more, as the `type` of an option.

    Raises
    ------
    argparse.ArgumentTypeError : if the text is none.
    """
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number, 1 or more")
    return int(text)


def exit_with(main: Callable[[], int | None]) -> None:
    """Run a script's `main` and exit with its status (None: 0); with one line and status 2 after a `UsageError`."""
    try:
        sys.exit(main())
    except UsageError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
