"""Values of axes and settings: lists, and ranges as llama-bench writes them, converted to the type of the option."""

import re
from collections.abc import Iterator
from typing import Any

from elastickv.benchmark.option_types import MAX_NUMBER, typed
from elastickv.benchmark.options import TYPES
from elastickv.errors import UsageError

MAX_CELLS = 100_000

_NUMBER = r"([0-9]+(?:\.[0-9]+)?)"
_RANGE = re.compile(rf"{_NUMBER}-{_NUMBER}(?:([+*]){_NUMBER})?")


def values(name: str, axis: Any) -> list[Any]:
    """Return the values of an axis, in order, each once.

    Parameters
    ----------
    axis : a text such as '1024,4096' or '1,2-8*2', one value, or a list of values. An element of a list is taken as it is.

    Raises
    ------
    UsageError : if it is empty, or holds a value that the option cannot have.
    """
    if isinstance(axis, str):
        numbers_or_texts = [value for term in _terms(name, axis) for value in _expanded(name, term)]
    elif isinstance(axis, (list, tuple, range)):
        numbers_or_texts = [converted(name, value) for value in axis]
    else:
        numbers_or_texts = [converted(name, axis)]
    if not numbers_or_texts:
        raise UsageError(f"`{name}` is empty: give at least one value")
    return list(dict.fromkeys(numbers_or_texts))


def listed(name: str, names: Any) -> list[str]:
    """Return a list of names: one text with commas is split, a list of texts is taken as it is.

    Raises
    ------
    UsageError : if it is empty, or contains a non-string.
    """
    texts = [term.strip() for term in names.split(",")] if isinstance(names, str) else names
    if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(text, str) and text for text in texts):
        raise UsageError(f"`{name}`={names} is no list of names: give at least one")
    return list(dict.fromkeys(texts))


def converted(name: str, value: Any) -> Any:
    """Return one value as the option's type.

    Raises
    ------
    UsageError : if it is of another.
    """
    return typed(name, value, several=True)


def _terms(name: str, text: str) -> list[str]:
    """Split a list. A recipe may hold commas: `key=value` belongs to the recipe before it; semicolons separate recipes."""
    if name != "recipe":
        return [term.strip() for term in text.split(",")] if text.strip() else []
    if ";" in text:
        return [term.strip() for term in text.split(";") if term.strip()]
    terms: list[str] = []
    for piece in filter(None, map(str.strip, text.split(","))):
        if "=" in piece and terms:
            terms[-1] += f",{piece}"
        else:
            terms.append(piece)
    return terms


def _expanded(name: str, term: str) -> Iterator[Any]:
    match = _RANGE.fullmatch(term) if TYPES[name] in (int, float) else None
    if match is None:
        yield converted(name, term)
        return
    first, last = converted(name, match[1]), converted(name, match[2])
    operation, step = match[3] or "+", converted(name, match[4] or "1")
    grows = (step > 1 and first > 1 / MAX_NUMBER) if operation == "*" else step > 0
    if last < first or not grows:
        raise UsageError(f"`{name}`={term} is no range: write first-last, first-last+step or first-last*factor, upwards")
    number, value = 0, first
    while value <= last * (1 + 1e-12):
        if number == MAX_CELLS:
            raise UsageError(f"`{name}`={term} has more than {MAX_CELLS} values: give a larger step")
        yield value
        number += 1
        # Not by adding steps, which would accumulate rounding errors.
        value = first + number * step if operation == "+" else first * step**number
