"""How a result came about, whichever program wrote it."""

from collections.abc import Iterable
from typing import Any

from elastickv.html_report.report_data import IntervalEstimate, Provenance
from elastickv.results.readers import Reader

_SURROUNDINGS = (
    ("driver", ("gpu", "driver")),
    ("driver", ("machine", "driver")),
    ("compute capability", ("gpu", "sm")),
    ("operating system", ("environment", "os")),
    ("processor", ("environment", "cpu")),
    ("threads", ("environment", "threads")),
    ("python", ("environment", "python")),
    ("commit", ("environment", "commit")),
)


def provenance(reader: Reader, device: str, warnings: Iterable[Any]) -> Provenance:
    """Return how a result came about; what a file does not tell is left out.

    Parameters
    ----------
    warnings : everything that limits what the result shows, in any order; doubles are told once.
    """
    environment: dict[str, str] = {}
    for name, path in _SURROUNDINGS:
        value = reader.optional(*path)
        if value is not None:
            environment.setdefault(name, str(value))
    versions = reader.optional("environment", "versions")
    for name in ("torch", "transformers"):
        value = reader.optional("environment", name)
        if value is not None:
            environment[name] = str(value)
    if isinstance(versions, dict):
        environment |= {str(name): str(version) for name, version in versions.items() if version is not None}
    date = reader.optional("date_utc") or reader.optional("environment", "date_utc") or ""
    command = reader.optional("configuration", "command") or reader.optional("command") or ()
    if isinstance(command, str) or not isinstance(command, (list, tuple)):
        command = (str(command),)
    return Provenance(
        source=reader.source,
        device=device,
        date=str(date)[:16].replace("T", " "),
        command=tuple(map(str, command)),
        environment=environment,
        warnings=tuple(dict.fromkeys(str(warning) for warning in warnings)),
    )


def estimate(reader: Reader, *path: str) -> IntervalEstimate | None:
    """Return the interval of a time or of a ratio of times; None where it is missing or null."""
    if reader.optional(*path) is None:
        return None
    return IntervalEstimate(*(reader.positive(*path, name) for name in ("estimate", "low", "high")))


def lines(reader: Reader, *path: str) -> list[str]:
    """Return the texts of a list that may be missing."""
    found = reader.optional(*path)
    return [str(line) for line in found] if isinstance(found, list) else []


def reasons(reader: Reader, *path: str) -> dict[str, str]:
    """Return what a mapping of names to reasons says; it may be missing."""
    found = reader.optional(*path)
    return {str(name): str(reason) for name, reason in found.items()} if isinstance(found, dict) else {}


def optional_number(reader: Reader, *path: str) -> float | None:
    """Return a number above 0 that may be missing or null."""
    return None if reader.optional(*path) is None else reader.positive(*path)
