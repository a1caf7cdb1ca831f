"""JSON that line tools can read: indented, one scalar a line, plain decimals (never 1e-05), NaN refused."""

import json
import math
from collections.abc import Iterator
from decimal import Decimal
from typing import Any


def dumps(value: Any) -> str:
    """Return `value` as indented JSON with a newline at the end.

    Raises
    ------
    ValueError : if a number is NaN or infinite: no figure may be one.
    """
    return "".join(_pieces(value, "\n")) + "\n"


def plain(number: float) -> str:
    """Return the shortest decimal that reads back as `number`, without an exponent."""
    if not math.isfinite(number):
        raise ValueError(f"{number} is not a figure")
    text = format(Decimal(repr(float(number))), "f")
    return text if "." in text else text + ".0"


def _pieces(value: Any, newline: str) -> Iterator[str]:
    inner = newline + "  "
    if isinstance(value, dict):
        if not value:
            yield "{}"
            return
        for i, (key, item) in enumerate(value.items()):
            yield ("{" if i == 0 else ",") + inner + json.dumps(str(key)) + ": "
            yield from _pieces(item, inner)
        yield newline + "}"
    elif isinstance(value, (list, tuple)):
        if not value:
            yield "[]"
            return
        for i, item in enumerate(value):
            yield ("[" if i == 0 else ",") + inner
            yield from _pieces(item, inner)
        yield newline + "]"
    elif isinstance(value, float):
        yield plain(value)
    else:
        yield json.dumps(value)
