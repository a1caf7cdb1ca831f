"""Matches the runs of two result sets by cell, and warns of what limits a comparison."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from elastickv.errors import UsageError
from elastickv.results.compare.result_sets import ResultSet, cells_by_name
from elastickv.results.compare.runs import BenchmarkRun, Cell
from elastickv.results.kinds.sweep_record import MISSING

Key = tuple[Any, ...]


@dataclass(frozen=True)
class Pair:
    """The runs of one cell on both sides."""

    cell: Cell
    a: list[BenchmarkRun]
    b: list[BenchmarkRun]

    @property
    def figures(self) -> list[str]:
        """The figures that all of them have."""
        return [figure for figure in self.a[0].figures if all(figure in run.figures for run in (*self.a, *self.b))]


@dataclass(frozen=True)
class Match:
    """What belongs together.

    Attributes
    ----------
    pairs : cells that both sides measured.
    only_a, only_b : cells that one side alone measured, and what is known of why.
    other_device : whether the two sides ran on different devices.
    unmeasured : what each side's files say they could not measure.
    """

    pairs: list[Pair]
    only_a: dict[str, str]
    only_b: dict[str, str]
    other_device: bool
    unmeasured: list[str] = field(default_factory=list)


def match(a: ResultSet, b: ResultSet, allow_different_device: bool) -> Match:
    """Return which runs of two result sets are of the same cell: the same workload and options, on the same device.

    Two result sets of one cell each are matched by their workload alone: the options may be what differs.

    Raises
    ------
    UsageError : if there is nothing to compare, or it ran on different devices and that is not allowed.
    """
    devices_a, devices_b = ({run.device for run in side.runs} for side in (a, b))
    other_device = allow_different_device and devices_a != devices_b
    if other_device:
        for side, devices in ((a, devices_a), (b, devices_b)):
            if len(devices) > 1:
                raise UsageError(f"{side.name} holds results of {_list(devices)}: compare one device with one other")
    elif not devices_a & devices_b:
        raise UsageError(
            f"{a.name} was measured on {_list(devices_a)}, {b.name} on {_list(devices_b)}: measure both on one device, or "
            "compare them all the same with `allow_different_device=True`"
        )
    key = _key(a.runs, b.runs, by_device=not other_device)
    cells_a, cells_b = _grouped(a.runs, key), _grouped(b.runs, key)
    common = [k for k in cells_a if k in cells_b]
    if not common and len(cells_a) == len(cells_b) == 1:
        pairs = [_by_workload(a, b)]
        cells_a = cells_b = {}
    else:
        pairs = [Pair(_named(k), cells_a[k], cells_b[k]) for k in common]
    if not pairs:
        raise UsageError(
            f"no cell of {a.name} is in {b.name}: A measured {next(iter(cells_a))[0]}, B {next(iter(cells_b))[0]}; "
            "compare results of the same workloads and options"
        )
    only_a = {str(_named(k)): f"not in {b.name}" for k in cells_a if k not in cells_b}
    only_b = {str(_named(k)): f"not in {a.name}" for k in cells_b if k not in cells_a}
    unmeasured = [
        f"{side.name} did not measure {cell}: {why}"
        for side in (a, b)
        for cell, why in cells_by_name(cell for cell in side.unmeasured if cell.status != MISSING).items()
    ]
    return Match(pairs, only_a, only_b, other_device, unmeasured)


def comparability_warnings(matched: Match) -> Iterator[str]:
    """Yield a line for everything that limits what a comparison shows."""
    pairs = matched.pairs
    if matched.other_device:
        yield f"different devices: A {pairs[0].a[0].device}, B {pairs[0].b[0].device}; times as they stand, not against dense"
    shared = sum(any(run.copies(other) for run in pair.a for other in pair.b) for pair in pairs)
    if shared:
        yield f"A and B hold the same run in {shared} of {len(pairs)} cells: nothing was measured again there"
    differing: Counter[tuple[str, str, str]] = Counter()
    for pair in pairs:
        a, b = ([dict(run.cell.requested) | run.protocol for run in runs] for runs in (pair.a, pair.b))
        for name in dict.fromkeys(name for options in (*a, *b) for name in options):
            if any(options.get(name) is None for options in (*a, *b)):
                continue
            values = [{str(options[name]) for options in of} for of in (a, b)]
            if values[0] != values[1]:
                differing[(name, _list(values[0]), _list(values[1]))] += 1
    for (name, in_a, in_b), count in differing.items():
        yield f"{name} differs: A {in_a}, B {in_b}" + (f" ({count} of {len(pairs)} cells)" if count < len(pairs) else "")
    runs = [run for pair in pairs for run in (*pair.a, *pair.b)]
    if any(run.protocol["program"] == "the original" for run in runs):
        yield (
            "the original program's step computes no softmax over the context, and its files hold no samples: intervals come "
            "from its mean, deviation and count, times as they stand"
        )
    sequential = sum(run.protocol.get("pairing") == "sequential" for run in runs)
    if sequential:
        yield f"{sequential} of {len(runs)} runs measured dense and elastic one after the other: --paired-baseline takes turns"
    incomplete = [run.source for run in runs if not run.complete]
    if incomplete:
        yield f"interrupted, incomplete: {', '.join(incomplete)}"
    for pair in pairs:
        missing = {figure for run in (*pair.a, *pair.b) for figure in run.figures} - set(pair.figures)
        if missing:
            yield f"{pair.cell}: {_list(missing)} measured on one side only, and not compared"
    yield from matched.unmeasured


def _key(a: Sequence[BenchmarkRun], b: Sequence[BenchmarkRun], by_device: bool) -> Callable[[BenchmarkRun], Key]:
    """Return the key that groups runs into cells.

    It has the recipe, or a part of the protocol, where a side measured a cell with several: they are no repetitions.
    """

    def short(run: BenchmarkRun) -> Key:
        return run.cell, run.device if by_device else None

    several: dict[Key, set[str]] = defaultdict(set)
    for side in (a, b):
        for key, runs in _grouped(side, short).items():
            methods = [_method(run) for run in runs]
            several[key] |= {name for name in methods[0] if len({str(method.get(name)) for method in methods}) > 1}

    def key_of(run: BenchmarkRun) -> Key:
        names = several.get(short(run), set())
        return *short(run), tuple((name, str(value)) for name, value in _method(run).items() if name in names)

    return key_of


def _method(run: BenchmarkRun) -> dict[str, Any]:
    """Return what runs must share to be repetitions of one measurement."""
    return {"ran": run.recipe} | run.method


def _grouped(runs: Sequence[BenchmarkRun], key: Callable[[BenchmarkRun], Key]) -> dict[Key, list[BenchmarkRun]]:
    groups: dict[Key, list[BenchmarkRun]] = defaultdict(list)
    for run in runs:
        groups[key(run)].append(run)
    return dict(groups)


def _named(key: Key) -> Cell:
    cell: Cell = key[0]
    return replace(cell, requested=(*cell.requested, *key[-1]))


def _by_workload(a: ResultSet, b: ResultSet) -> Pair:
    cell_a, cell_b = a.runs[0].cell, b.runs[0].cell
    if cell_a.workload != cell_b.workload:
        raise UsageError(
            f"{a.name} measured {Cell(cell_a.workload, ())}, {b.name} {Cell(cell_b.workload, ())}: give results of one workload"
        )
    same = tuple(pair for pair in cell_a.requested if pair in cell_b.requested)
    return Pair(Cell(cell_a.workload, same), a.runs, b.runs)


def _list(values: set[Any]) -> str:
    return ", ".join(sorted(map(str, values)))
