"""The plan of a sweep: cells, each a set of options of `bench`, in a random order."""

import hashlib
import json
import math
import random
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from elastickv.benchmark.options import AXES, SETTINGS, Options
from elastickv.errors import UsageError
from elastickv.inputs import parse_json, read_text
from elastickv.results.kinds.sweep_record import cell_key, cell_name
from elastickv.sweeps import baseline_cells
from elastickv.sweeps.axes import MAX_CELLS, converted, values

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Cell = dict[str, Any]
key, name = cell_key, cell_name
MAX_PLAN_BYTES = 1 << 24

PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {
        "seq": [512, 1024],
        "compress": [1.5],
        "recipe": ["auto", "int8"],
        "heads": [4],
        "kv_heads": [2],
        "dim": [64],
        "reps": 6,
        "warmup": 2,
        "inner_loops": 4,
        "cache": "hot",
    },
}


@dataclass(frozen=True)
class SweepPlan:
    """The cells of a sweep in the order they are measured.

    Attributes
    ----------
    cells : axis -> value of each; of a baseline 'program' and 'model'.
    settings : what all cells share, as JSON values.
    refused : key of a cell that `bench` refuses -> why. Cells that share each of its values are measured.
    """

    cells: tuple[Cell, ...]
    settings: dict[str, Any]
    refused: dict[str, str]

    @classmethod
    def of(cls, inputs: Mapping[str, Any]) -> "SweepPlan":
        """Return the plan that axes, settings and `cells` (tables of axes, each a Cartesian product by itself) make.

        `baseline` and `model` add a cell for each pair of theirs; alone they are the whole plan.

        Raises
        ------
        UsageError : if a name is unknown, or `bench` refuses a value in each of its cells.
        """
        inputs = {_known(label): value for label, value in inputs.items() if value is not None}
        settings = {label: converted(label, value) for label, value in inputs.items() if label in SETTINGS}
        shared = {axis: values(axis, inputs[axis]) for axis in AXES if axis in inputs}
        tables = inputs.get("cells", [{}])
        if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
            raise UsageError("cells must be a list of tables of axes, and not empty")
        references = baseline_cells.cells(inputs)
        if references and not shared and "cells" not in inputs:
            tables = []
        cells: dict[str, Cell] = {key(cell): cell for cell in references}
        for table in tables:
            axes = shared | {_axis(label): values(_axis(label), value) for label, value in table.items()}
            axes = {axis: axes[axis] for axis in AXES if axis in axes}
            count = math.prod(map(len, axes.values()))
            if len(cells) + count > MAX_CELLS:
                raise UsageError(f"the plan has more than {MAX_CELLS} cells: give fewer values to an axis")
            for point in product(*axes.values()):
                cell = dict(zip(axes, point, strict=True))
                cells[key(cell)] = cell
        order = list(cells.values())
        random.Random(settings.get("seed", Options.seed)).shuffle(order)
        plain = {label: str(value) if isinstance(value, Path) else value for label, value in settings.items()}
        plan = cls(tuple(order), plain, {})
        plan.refused.update(plan._judged())
        return plan

    def options(self, cell: Cell, device: int | None = None, command: tuple[str, ...] = ()) -> Options:
        """Return the cell as options of `bench`: always paired.

        Raises
        ------
        UsageError : as `bench` does.
        """
        settings = self.settings | ({"input": Path(self.settings["input"])} if "input" in self.settings else {})
        return Options(**settings, **cell, paired=True, device=device, command=command)

    def request(self, cell: Cell, device: int | None, command: tuple[str, ...]) -> dict[str, Any]:
        """Return the request for a cell to the measuring process, as JSON values.

        Raises
        ------
        UsageError : as `bench` does.
        """
        if baseline_cells.is_baseline(cell):
            return {"baseline": baseline_cells.request(cell, self.settings, device), "command": list(command)}
        plain = asdict(self.options(cell, device, command))
        return {"bench": plain | {"input": None if plain["input"] is None else str(plain["input"])}}

    @property
    def hash(self) -> str:
        """Hash of the cells, their order and their settings."""
        return hashlib.sha256(json.dumps([self.cells, self.settings], sort_keys=True).encode()).hexdigest()[:16]

    @property
    def header(self) -> dict[str, Any]:
        """What a sweep's file says of its plan, as JSON values; the hash follows from `planned` and `settings`."""
        cells = {"cells": len(self.cells), "axes": self.axes, "settings": self.settings}
        return cells | {"planned": [dict(cell) for cell in self.cells]}

    @property
    def axes(self) -> dict[str, list[Any]]:
        """Axis -> its values in any cell."""
        axes: dict[str, dict[Any, None]] = {}
        for cell in self.cells:
            for axis, value in cell.items():
                axes.setdefault(axis, {})[value] = None
        return {axis: sorted(axes[axis]) for axis in (*AXES, *baseline_cells.AXES) if axis in axes}

    def _judged(self) -> dict[str, str]:
        refused: dict[str, str] = {}
        accepted: set[tuple[str, Any]] = set()
        judged = [cell for cell in self.cells if not baseline_cells.is_baseline(cell)]
        for cell in judged:
            try:
                self.options(cell)
                accepted.update(cell.items())
            except UsageError as error:
                refused[key(cell)] = str(error)
        for cell in judged:
            # A value that no cell can have is a mistake; one that only some combinations refuse is part of the grid.
            if key(cell) in refused and (not accepted or any(item not in accepted for item in cell.items())):
                raise UsageError(refused[key(cell)])
        return refused


def read_plan(path: Path) -> dict[str, Any]:
    """Return the content of a plan's file, TOML or JSON, as `SweepPlan.of` takes it.

    Raises
    ------
    UsageError : if it cannot be read or is neither.
    """
    text = read_text(path, f"`plan` {path}", "give a TOML or JSON file", MAX_PLAN_BYTES)
    try:
        plan = parse_json(text) if path.suffix.lower() == ".json" else tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        kind = "JSON" if path.suffix.lower() == ".json" else "TOML"
        raise UsageError(f"`plan` {path} is no {kind} ({error}): mend it, or give another file") from None
    if not isinstance(plan, dict) or not plan:
        raise UsageError(f"`plan` {path} names no axis: write lines such as seq = [1024, 4096]")
    try:
        return {_known(label): value for label, value in plan.items()}
    except UsageError as error:
        raise UsageError(f"`plan` {path}: {error}") from None


def merged(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the axes and settings of all parts.

    Raises
    ------
    UsageError : if two of them hold one name.
    """
    union: dict[str, Any] = {}
    for part in parts:
        for label, value in part.items():
            if label in union:
                raise UsageError(f"{label} is set both in the plan and outside of it: set it once")
            union[label] = value
    return union


def _known(label: str) -> str:
    spelt = label.replace("-", "_")
    if spelt not in (*AXES, *SETTINGS, *baseline_cells.NAMES, "cells"):
        raise UsageError(
            f"{label} is unknown: axes are {', '.join(AXES)}; settings {', '.join(SETTINGS)}; and cells, baseline and model"
        )
    return spelt


def _axis(label: str) -> str:
    if label.replace("-", "_") not in AXES:
        raise UsageError(f"{label} in cells is unknown: axes are {', '.join(AXES)}")
    return label.replace("-", "_")
