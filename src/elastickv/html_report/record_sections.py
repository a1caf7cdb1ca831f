"""The sections on how results came about: warnings, environments, commands."""

import shlex
from collections import defaultdict
from collections.abc import Iterable, Sequence

from elastickv.html_report.content import Section, tables
from elastickv.html_report.report_data import Provenance, ReportData

_MOST_NAMES = 6
_MOST_COLUMNS = 6  # of settings that differ; more are one column


def warnings(data: ReportData) -> Section:
    """Return every warning and telemetry flag, the cells that sweeps did not measure, and what was left out."""
    said: dict[str, list[str]] = defaultdict(list)
    for provenance in data.provenance:
        for warning in provenance.warnings:
            said[warning].append(data.names[provenance.source])
    said_rows = ({"warning": what, "results": str(len(names)), "which": _listed(names)} for what, names in said.items())
    several = len({cell.sweep for cell in data.unmeasured}) > 1
    cells = (
        {"sweep": _file_name(cell.sweep) if several else "", "status": cell.status, "cell": cell.cell, "why": cell.why}
        for cell in data.unmeasured
    )
    unreadable = ({"file and reason": reason} for reason in data.unreadable)
    left = ({"note": note} for note in data.notes)
    clean = sum(not provenance.warnings for provenance in data.provenance)
    shown = [
        *tables("What the results themselves say", said_rows, ("warning", "which")),
        *tables("Files that cannot be read or are no result, and are left out", unreadable, ("file and reason",)),
        *tables("Cells of sweeps that have no result", cells, ("sweep", "status", "cell", "why")),
        *tables("What was left out of the input files", left, ("note",)),
    ]
    return Section(
        "warnings",
        "Warnings",
        f"{clean} of {len(data.provenance)} results came without a warning or a telemetry flag."
        if data.provenance
        else "There is no result.",
        tables=shown or tables("Warnings", [{"warning": "none"}], ("warning",)),
    )


def environment(data: ReportData) -> Section:
    """Return what the results were measured in: one row for results that share all of it."""
    groups: dict[tuple[tuple[str, str], ...], list[Provenance]] = defaultdict(list)
    for provenance in data.provenance:
        machine = {"device": provenance.device, **provenance.environment}
        groups[tuple(machine.items())].append(provenance)
    settings = list(dict.fromkeys(name for items in groups for name, _ in items))
    values = {name: [dict(items).get(name, "") for items in groups] for name in settings}
    shared = ({"what": name, "value": column[0]} for name, column in values.items() if len(set(column)) == 1)
    rows = []
    for number, members in enumerate(groups.values()):
        dates = sorted(provenance.date for provenance in members)
        own = {name: column[number] for name, column in values.items() if len(set(column)) > 1}
        if len(own) > _MOST_COLUMNS:
            own = {"what differs": "; ".join(f"{name} {value}" for name, value in own.items() if value)}
        rows.append(
            own
            | {"measured, UTC": dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"}
            | {"results": f"{len(members)}: {_listed([data.names[provenance.source] for provenance in members])}"}
        )
    return Section(
        "environment",
        "Environment",
        "Results in one row share everything in it. Compare figures of one row; those of others are of another machine, driver "
        "or version.",
        tables=[
            *tables("The same for all results", shared, ("what", "value")),
            *tables("What differs, and when it was measured", rows, list(rows[0]) if rows else ()),
        ],
        missing="a result",
    )


def commands(data: ReportData) -> Section:
    """Return the exact commands, as the files hold them; results of one command, as of a sweep, together."""
    groups: dict[str, list[str]] = defaultdict(list)
    for source, command in data.sweeps:
        groups[shlex.join(command)].append(source)
    for provenance in data.provenance:
        groups[shlex.join(provenance.command)].append(data.names[provenance.source])
    unknown = groups.pop("", [])
    return Section(
        "commands",
        "Commands",
        "What was typed for each result, as its file holds it. On the same device and versions it measures the same again.",
        commands=[(_listed(names), command) for command, names in groups.items()],
        notes=[f"the command is not in the file: {_listed(unknown)}"] if unknown else (),
        missing="results that hold their command",
    )


def _file_name(source: str) -> str:
    return source.replace("\\", "/").rpartition("/")[2]


def _listed(names: Iterable[str]) -> str:
    """Return names, the first few of many."""
    distinct: Sequence[str] = list(dict.fromkeys(names))
    more = len(distinct) - _MOST_NAMES
    return ", ".join(distinct[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")
