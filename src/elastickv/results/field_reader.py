"""Looks figures up in the JSON of a result."""

from typing import Any

from elastickv.errors import UsageError

LEAST, LARGEST = 1e-30, 1e30  # of figures: their ratios and products are finite
LEAST_TIME, LONGEST_TIME = 1e-9, 1e9  # milliseconds or seconds: from less than a cycle to days


class Reader:
    """Looks figures up in a file, and names file and key where one is missing or no figure."""

    def __init__(self, source: str, value: dict[str, Any]) -> None:
        self.source, self.value = source, value

    def at(self, *path: str, kind: type | None = None) -> Any:
        """Return what is there, which must be of the kind."""
        found: Any = self.value
        for key in path:
            if not isinstance(found, dict) or key not in found:
                raise self.refused(f"lacks {'.'.join(path)}")
            found = found[key]
        if kind is not None and not isinstance(found, kind):
            raise self.refused(f"has a {type(found).__name__} in {'.'.join(path)}, where a {kind.__name__} should be")
        return found

    def optional(self, *path: str) -> Any:
        """Return what is there; None where it, or something above it, is missing or null."""
        found: Any = self.value
        for key in path:
            found = found.get(key) if isinstance(found, dict) else None
        return found

    def number(self, *path: str) -> float:
        """Return a number that is 0 or more."""
        found = self.at(*path)
        if isinstance(found, bool) or not isinstance(found, (int, float)) or not 0 <= found <= LARGEST:
            raise self.refused(f"has {'.'.join(path)} = {str(found)[:40]}, which is no figure")
        return float(found)

    def positive(self, *path: str) -> float:
        """Return a number above 0."""
        found = self.number(*path)
        if found < LEAST:
            raise self.refused(f"has {found:g} in {'.'.join(path)}")
        return found

    def count(self, *path: str) -> int:
        """Return a whole number from 1 up."""
        found = self.positive(*path)
        if found != int(found):
            raise self.refused(f"has {found} in {'.'.join(path)}, which is no whole number")
        return int(found)

    def text(self, *path: str) -> str:
        """Return a text."""
        return str(self.at(*path, kind=str))

    def times(self, found: Any, name: str) -> tuple[float, ...]:
        """Return a list of times, each of which must be a positive number."""
        if not isinstance(found, list) or not all(type(t) in (int, float) and LEAST_TIME <= t <= LONGEST_TIME for t in found):
            raise self.refused(f"has {name} that are not all positive times of {LEAST_TIME:g} to {LONGEST_TIME:g}")
        return tuple(map(float, found))

    def rounds(self, found: Any, name: str) -> tuple[float, ...]:
        """Return the sums of lists of times."""
        if not isinstance(found, list):
            raise self.refused(f"has {name} that are no rounds of times")
        return tuple(sum(self.times(tokens, name)) for tokens in found)

    def refused(self, what: str) -> UsageError:
        """Return the error that says what is wrong with the file."""
        return UsageError(f"{self.source} {what}: cut off, edited or not of this program; measure again")
