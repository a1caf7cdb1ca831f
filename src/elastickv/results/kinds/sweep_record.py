"""Lines of a sweep's file that hold no result: its header, and cells that were not measured."""

from dataclasses import dataclass, field
from typing import Any

from elastickv.benchmark.from_dict import from_dict


@dataclass(frozen=True)
class SweepHeader:
    """What a sweep was to measure, as far as reports show it."""

    command: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class SweepCell:
    """A cell: axis -> value, what became of it, and why it has no result."""

    cell: dict[str, Any]
    status: str
    reason: str | None = None

    @property
    def name(self) -> str:
        """The cell as messages call it."""
        return " ".join(f"{axis}={value}" for axis, value in self.cell.items())

    @property
    def why(self) -> str:
        """Why it has no result."""
        return self.reason or self.status


def sweep_record(value: Any, source: str) -> SweepHeader | SweepCell | None:
    """Return a line of a sweep; None where it is none.

    Raises
    ------
    UsageError : naming the key that is missing or of another type.
    """
    if isinstance(value, dict) and "cell" in value and "status" in value:
        return from_dict(SweepCell, value, source)
    return from_dict(SweepHeader, value["sweep"], source) if isinstance(value, dict) and "sweep" in value else None
