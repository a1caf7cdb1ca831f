"""Values from outside, Python or a file, converted to the types of the options."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from elastickv.benchmark.options import TYPES
from elastickv.errors import UsageError

MAX_NUMBER = 10**15
_WHOLE = (int, np.integer)
_DESCRIPTIONS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", Path: "the name of a file"}


def typed(name: str, value: Any, several: bool = False) -> Any:
    """Return one value as the type of the option; a text that spells a number is one.

    Parameters
    ----------
    several : whether a list is accepted too, which the message of an error then says.

    Raises
    ------
    UsageError : if it is of another type, or a number that would not fit into arithmetic.
    """
    kind = TYPES[name]
    if isinstance(value, str) and kind in (int, float):
        with suppress(ValueError):
            return _bounded(name, kind(value))
    elif kind is int and isinstance(value, _WHOLE) and not isinstance(value, bool):
        return _bounded(name, int(value))
    elif kind is float and isinstance(value, (float, np.floating, *_WHOLE)) and not isinstance(value, bool):
        return float(_bounded(name, value))
    elif kind is Path and isinstance(value, (str, Path)):
        return Path(value)
    elif type(value) is kind:
        return value
    lists = several and kind in (int, float)
    remedy = "write lists as 1,2,4 and ranges as 2-8*2 or 1-9+4" if lists else f"give {_DESCRIPTIONS[kind]}"
    raise UsageError(f"`{name}`={value} is not {_DESCRIPTIONS[kind]}: {remedy}")


def _bounded(name: str, number: Any) -> Any:
    # Not NaN, not infinite, and no whole number that would not fit into arithmetic.
    if not -MAX_NUMBER <= number <= MAX_NUMBER:
        raise UsageError(f"`{name}`={str(number)[:40]} is out of range: at most {MAX_NUMBER:g} is accepted")
    return number
