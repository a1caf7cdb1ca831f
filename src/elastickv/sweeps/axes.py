"""What an axis or a setting may hold: numbers, lists, ranges as llama-bench writes them, converted to the option's own type."""

import re
from collections.abc import Iterator
from typing import Any

from elastickv.benchmark.option_types import MAX_NUMBER, TYPES, typed
from elastickv.errors import UsageError

AXES = (
    "seq", "batch", "compress", "recipe", "heads", "kv_heads", "dim", "dtype", "cache", "sinks", "window", "anchor_every",
)  # fmt: skip
# What all cells share. The sweep itself says the rest: devices, pairing, its own time limit.
SETTINGS = (
    "backend", "reps", "warmup", "inner_loops", "truncate", "until_ci_percent", "inference", "decode_tokens", "layers",
    "graphs", "peers", "input", "dense", "seed",
)  # fmt: skip
MAX_CELLS = 100_000

_NUMBER = r"([0-9]+(?:\.[0-9]+)?)"
_RANGE = re.compile(rf"{_NUMBER}-{_NUMBER}(?:([+*]){_NUMBER})?")


def values(name: str, given: Any) -> list[Any]:
    """Return what an axis takes, in order, each once.

    Parameters
    ----------
    given : a text such as '1024,4096' or '1,2-8*2', one value, or a list of values. An element of a list is taken as it is.

    Raises
    ------
    UsageError : if it is empty or holds what the option can't be.
    """
    if isinstance(given, str):
        found = [value for term in _terms(name, given) for value in _expanded(name, term)]
    elif isinstance(given, (list, tuple, range)):
        found = [converted(name, value) for value in given]
    else:
        found = [converted(name, given)]
    if not found:
        raise UsageError(f"--{_option(name)} is empty: give at least one value")
    return list(dict.fromkeys(found))


def listed(name: str, given: Any) -> list[str]:
    """Return the texts that a name takes: one text with commas, or a list of texts as they are.

    Raises
    ------
    UsageError : if it is empty, or holds what is no text.
    """
    found = [term.strip() for term in given.split(",")] if isinstance(given, str) else given
    if not isinstance(found, (list, tuple)) or not found or not all(isinstance(text, str) and text for text in found):
        raise UsageError(f"--{_option(name)}={given} is no list of names: give at least one")
    return list(dict.fromkeys(found))


def converted(name: str, value: Any) -> Any:
    """Return one value as the option's type.

    Raises
    ------
    UsageError : if it is of another.
    """
    return typed(name, value, several=True)


def _option(name: str) -> str:
    return name.replace("_", "-")


def _terms(name: str, text: str) -> list[str]:
    """Split a list. A recipe has commas itself: `key=value` belongs to the recipe before it, and semicolons part any two."""
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
        raise UsageError(
            f"--{_option(name)}={term} is no range: write first-last, first-last+step or first-last*factor, upwards"
        )
    number, value = 0, first
    while value <= last * (1 + 1e-12):
        if number == MAX_CELLS:
            raise UsageError(f"--{_option(name)}={term} has more than {MAX_CELLS} values: give a larger step")
        yield value
        number += 1
        # Sums of steps would gather rounding errors.
        value = first + number * step if operation == "+" else first * step**number
