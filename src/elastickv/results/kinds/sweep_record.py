"""Lines of a sweep's file that hold no result: its header, and cells that were not measured."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Annotated, Any

from elastickv.benchmark.from_dict import Bounds, from_dict

MISSING = "missing"
_NOT_MEASURED = "not measured: the sweep ended before it"
_NOT_NAMED = "which ones its header does not say"
_MOST_CELLS = 100_000  # of a plan
_MOST_NAMES = 8  # in a sentence


def cell_name(cell: Mapping[str, Any]) -> str:
    """Return a cell as messages write it."""
    return " ".join(f"{axis}={value:g}" if isinstance(value, float) else f"{axis}={value}" for axis, value in cell.items())


def cell_key(cell: Mapping[str, Any]) -> str:
    """Return the key that identifies a cell."""
    return json.dumps(cell, sort_keys=True)


@dataclass(frozen=True)
class SweepHeader:
    """What a sweep was to measure, as far as it is used here.

    Attributes
    ----------
    cells : how many; None where the header does not say.
    axes : axis -> its values in any cell.
    planned : the cells, in the order of measuring; older files have none.
    """

    command: list[str] = field(default_factory=list)
    cells: Annotated[int | None, Bounds(0, _MOST_CELLS)] = None
    axes: dict[str, list[Any]] = field(default_factory=dict)
    planned: list[dict[str, Any]] | None = None

    def missing(self, measured: Iterable[Mapping[str, Any]]) -> "MissingCells":
        """Return the planned cells that are not among `measured`."""
        keys, planned = {cell_key(cell) for cell in measured}, list(self._planned_cells())
        named = [cell for cell in planned if cell_key(cell) not in keys]
        total = len(planned) if self.cells is None else self.cells
        # A cell of no plan takes no other one's place.
        count = max(len(named), total - len(keys))
        return MissingCells(total, total - count, count, named)

    def _planned_cells(self) -> Iterable[Mapping[str, Any]]:
        """Yield every cell, as far as the header says which they are."""
        if self.planned is not None:
            return self.planned
        if not self.axes or self.cells is None or math.prod(map(len, self.axes.values())) != self.cells:
            return ()  # A plan of several tables is no product.
        return (dict(zip(self.axes, point, strict=True)) for point in product(*self.axes.values()))


@dataclass(frozen=True)
class MissingCells:
    """The planned cells that a sweep's file does not hold.

    Attributes
    ----------
    planned, held : how many cells the header announces, and how many of them the file holds.
    count : how many are missing.
    cells : those that the header names.
    """

    planned: int
    held: int
    count: int
    cells: list[Mapping[str, Any]]

    def sentence(self, source: str) -> str:
        """Return how many cells are missing, and which; the first few of many."""
        names = [cell_name(cell) for cell in self.cells[:_MOST_NAMES]]
        if len(names) < self.count:
            names.append(f"{self.count - len(names)} more" if names else _NOT_NAMED)
        held = f"{self.held} of {self.planned} planned cells"
        return f"{source} is incomplete: it holds {held}; missing: {', '.join(names)}"

    def records(self) -> list[dict[str, Any]]:
        """Return a record for each, and one for those that have no name."""
        records = [{"cell": dict(cell), "status": MISSING, "reason": _NOT_MEASURED} for cell in self.cells]
        unnamed = self.count - len(records)
        if unnamed:
            records.append({"cell": {}, "status": MISSING, "reason": f"{unnamed} cells are missing; {_NOT_NAMED}"})
        return records


@dataclass(frozen=True)
class SweepCell:
    """A cell: axis -> value, what became of it, and why it has no result."""

    cell: dict[str, Any]
    status: str
    reason: str | None = None

    @property
    def name(self) -> str:
        """The cell as messages call it."""
        return cell_name(self.cell)

    @property
    def why(self) -> str:
        """Why it has no result."""
        return self.reason or self.status


@dataclass(frozen=True)
class UnmeasuredCell:
    """A cell without a result: its sweep, its name, what became of it, and why."""

    sweep: str
    cell: str
    status: str
    why: str


def sweep_record(value: Any, source: str) -> SweepHeader | SweepCell | None:
    """Return a line of a sweep; None where it is none.

    Raises
    ------
    UsageError : naming the key that is missing or of another type.
    """
    if isinstance(value, dict) and "cell" in value and "status" in value:
        return from_dict(SweepCell, value, source)
    return from_dict(SweepHeader, value["sweep"], source) if isinstance(value, dict) and "sweep" in value else None
